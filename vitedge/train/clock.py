"""How long the loop is kept from the model by reading, augmenting and resizing images.

On a CPU that is the time these take. On a GPU work is queued: there it is the time between two marks in
the device's own queue, which holds both its work on the images and its waiting for the host.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """A context that measures what runs inside, and a total to read from time to time."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began: Any = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._began = self._mark() if self._on_gpu else time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self._on_gpu:
            self._marks.append((self._began, self._mark()))
        else:
            self._seconds += time.perf_counter() - self._began

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Seconds since the last call; on a GPU this waits for the device."""
        total, self._seconds = self._seconds, 0.0
        for begin, end in self._marks:
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3
        self._marks.clear()
        return total
