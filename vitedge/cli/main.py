"""The `vitedge` command: finds commands by file name, and turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

import vitedge

_FOLDER = os.path.dirname(__file__)


class LazyGroup(click.Group):
    """A group whose commands are the files of this folder, imported when they run and not before.

    The list in `--help` shows the first line of each file's docstring, read as text: importing
    every command would make `--help` several times slower.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        files = (name[:-3] for name in os.listdir(_FOLDER) if name.endswith(".py"))
        return sorted(name for name in files if not name.startswith("_") and name != "main")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"vitedge.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from vitedge.errors import UsageError, closest

            commands = self.list_commands(ctx)
            raise UsageError(
                "vitedge",
                expected=f"one of {', '.join(commands)}",
                found=f"'{args[0]}'{closest(args[0], commands)}",
                fix="see `vitedge --help`",
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            with open(os.path.join(_FOLDER, f"{name}.py"), encoding="utf-8") as file:
                first = re.match(r'"""(.+?)(?:"""|\n)', file.readline())
            rows.append((name, first.group(1).rstrip(".") if first else ""))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        # Users of other tools of this field type --dry_run and --batch_size.
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@click.version_option(vitedge.__version__, "-V", "--version", prog_name="vitedge")
def cli() -> None:
    """Take a Vision Transformer from PyTorch to an edge device.

    \b
    vitedge export --recipe deit_tiny_int8              model -> ONNX -> int8 -> build/deit_tiny_int8/
    vitedge bench --device cpu                          measure what was built, one table
    vitedge package build/deit_tiny_int8 --device cpu   a bundle that runs without torch
    vitedge verify deit_tiny_int8-cpu.zip               check a bundle on the target

    Exit codes: 0 ok, 1 failure, 2 usage or config, 3 a gate missed (accuracy, size, latency),
    4 device or provider unavailable, 5 measurement unstable.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run one command line; returns the exit code instead of exiting."""
    from vitedge.errors import VitedgeError

    try:
        with _ending_on_sigterm():
            result: Any = cli.main(args, prog_name="vitedge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except VitedgeError as error:
        return _report(error.exit_code, str(error), args)
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "vitedge"
        return _report(error.exit_code, f"{path}: {error.format_message()} See `{path} --help`.", args)
    except (click.Abort, KeyboardInterrupt):
        return _report(130, "interrupted; what was finished is kept, and the same command goes on from there", args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("VITEDGE_DEBUG"):
            raise
        kind = type(error).__name__
        text = " ".join(str(error).split())[:300]
        return _report(1, f"unexpected {kind}: {text} (VITEDGE_DEBUG=1 shows where; please report it with `vitedge env`)", args)


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C: temporary files go, and the row or trial at hand is handed back instead of being found lost."""
    from vitedge import launch

    def end(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    # Outside the main thread Python allows no handlers; a process that waits for others in torch's own code would never come to one.
    if threading.current_thread() is not threading.main_thread() or launch.is_launched():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(code: int, text: str, args: list[str]) -> int:
    """Print an error for people on stderr and, under --json, for programs on stdout."""
    from vitedge import launch

    for line in text.splitlines():
        click.echo(f"error: {line}", err=True)
    if "--json" in args and launch.reports_failures():
        import json

        click.echo(json.dumps({"schema_version": 1, "error": {"exit_code": code, "message": text}}))
    return code
