"""What commands share on the terminal: people's text on stderr, JSON alone on stdout, progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
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
seed_option = click.option("--seed", type=click.IntRange(0), help="Seed; wins over the recipe's.")


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
def progress_bars(clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[str], Progress]]:
    """A factory of named bars, one per stage; without a terminal, lines for a log, timed by `clock` in seconds."""
    if not draws_bars():
        yield lambda name: _LogLines(name, clock)
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        max_refresh = 0.5  # seconds; a guess that changes faster cannot be read

        def render(self, task: Task) -> Text:
            left = task.time_remaining
            return Text("" if left is None or task.finished else time_left(left), style="progress.remaining")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeLeft(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console()) as bars:

        def bar(name: str) -> Any:
            task = bars.add_task(name, total=None, text="")
            return lambda done, total, text="": bars.update(task, completed=done, total=total, text=text)

        yield bar


class _LogLines:
    """Progress in a log: a line where a stage starts and at each quarter, else at most one a minute."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name, self.clock = name, clock
        self.quarter = -1
        self.said_at = 0.0
        self.first: tuple[float, float] | None = None

    def __call__(self, done: float, total: float, text: str = "") -> None:
        now = self.clock()
        self.first = self.first or (now, done)
        quarter = int(4 * done / total) if total else 4
        if quarter <= self.quarter and now - self.said_at < 60.0:
            return
        self.quarter, self.said_at = max(quarter, self.quarter), now
        percent = f"{100 * done / total if total else 100:.0f} %"
        say(f"{self.name}: {', '.join(part for part in (percent, self.left(now, done, total), text) if part)}")

    def left(self, now: float, done: float, total: float) -> str:
        """Time left at the pace since the first call, which on a resumed run is not at zero; empty while there is no pace."""
        began, at = self.first or (now, done)
        if now <= began or not at < done < total:
            return ""
        return time_left((now - began) * (total - done) / (done - at))


def time_left(seconds: float) -> str:
    """`45 s left`, `12 min left` or `3 h 05 min left`."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min left" if hours else f"{minutes} min left"


def show_integers(node_counts: dict[str, int]) -> str:
    """What of a graph is in integers, for people: `50 int8`, `49 int4 weights, 1 int8 weights`; empty where nothing is."""
    names = {"int8": "int8", "int4_weights": "int4 weights", "int8_weights": "int8 weights"}
    return ", ".join(f"{node_counts[key]} {name}" for key, name in names.items() if node_counts.get(key))
