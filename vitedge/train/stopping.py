"""Ending a run between two steps: SIGINT (Ctrl-C) and SIGTERM ask for it, the loop saves and stops."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# Launchers and service managers send a signal to a group and again to each of its processes: that is one wish, not two.
ECHO_S = 3.0


class Stop:
    """Whether a signal asked the run to end."""

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; a later one, that is no echo of it, does not wait for the step to end, and nothing more is saved."""
        if self.asked and time.monotonic() - self._first > ECHO_S:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, time.monotonic()


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Listen for SIGINT and SIGTERM while a run goes on; outside the main thread, where Python allows no handlers, none are heard."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
