"""What commands share on the terminal: people's text on stderr, JSON alone on stdout, progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from vitedge.progress import Progress

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
data_option = click.option("--data", metavar="NAME|PATH", help="Data set: a name, a file or a folder; wins over VITEDGE_DATA.")
weights_option = click.option(
    "--weights",
    metavar="NAME|PATH",
    help="Weights: builtin, pretrained, none, a file or a folder; wins over the recipe and VITEDGE_WEIGHTS.",
)
seed_option = click.option("--seed", type=int, help="Seed; wins over the recipe's.")


def device_option(default: str = "cpu") -> Callable[[Any], Any]:
    """`--device`: the profile by name or path."""
    return click.option(
        "--device", default=default, show_default=True, metavar="NAME|PATH", help="Device profile; see `vitedge devices list`."
    )


def console() -> Console:
    """The terminal for people: stderr, so that stdout stays clean for programs."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None)


def say(text: str) -> None:
    """One line for people."""
    click.echo(text, err=True)


def emit_json(content: Any) -> None:
    """The command's whole standard output under --json; numbers that are not finite become null."""
    click.echo(json.dumps(_finite(content), indent=2, default=str))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and content - content != 0.0:
        return None
    return content


def draws_bars() -> bool:
    """Bars are for a person at a terminal, not for logs."""
    return sys.stderr.isatty() and not os.environ.get("CI") and not os.environ.get("NO_COLOR")


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str], Progress]]:
    """A factory of named bars, one per stage; without a terminal, a line where a stage starts."""
    if not draws_bars():

        def plain(name: str) -> Progress:
            last = [-1]

            def update(done: float, total: float, text: str = "") -> None:
                quarter = int(4 * done / total) if total else 4
                if quarter > last[0]:
                    last[0] = quarter
                    say(f"{name}: {100 * done / total if total else 100:.0f} % {text}".rstrip())

            return update

        yield plain
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console()) as bars:

        def bar(name: str) -> Any:
            task = bars.add_task(name, total=None, text="")
            return lambda done, total, text="": bars.update(task, completed=done, total=total, text=text)

        yield bar
