"""How long work reports itself: a callable that library code calls and only the command line draws."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on."""

    def __call__(self, done: float, total: float, text: str = "") -> None:
        """Say that `done` of `total` units are finished; `text` is what to show beside the bar."""


def silent(done: float, total: float, text: str = "") -> None:
    """Progress that nobody watches."""
