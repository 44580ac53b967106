"""The guard's time: how much is used, how much is left, and what is being done with it."""

from __future__ import annotations

import time
from collections.abc import Callable

from vitedge.progress import Progress, silent


class Clock:
    """Counts from its making.

    Args:
        minutes: The limit.
        progress: Told of seconds used, with what is being done; never of more than the limit.
        now: Seconds from any zero, never going back.
    """

    def __init__(self, minutes: float, progress: Progress = silent, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._progress = now, progress
        self._began, self._limit = now(), 60 * minutes

    def elapsed(self) -> float:
        """Seconds used."""
        return self._now() - self._began

    def left(self) -> float:
        """Seconds until the limit; 0 from then on."""
        return max(0.0, self._limit - self.elapsed())

    def tell(self, text: str) -> None:
        """Say what is being done."""
        self._progress(min(self.elapsed(), self._limit), self._limit, text)
