"""How long candidates of a technique take: timed by process 0, told to all, and kept for a run that is resumed.

A measurement never comes out the same twice. A run that goes on where it was stopped, and every process of it, must make the same
model again all the same: what was measured once is therefore read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from vitedge.artifact import digest_of, write_json
from vitedge.compress import Timing
from vitedge.train.processes import Processes

Stopwatch = Callable[[nn.Module], Timing]


class Timings:
    """`Context.latency` of one step.

    Candidates of a step that have the same shapes are the same to a clock: they are timed once.

    Args:
        stopwatch: Times a model on the device.
        processes: Of the run.
        path: Where times are kept, beside what else an interrupted run resumes from.
        key: Identity of the step; times of another key are not taken.
    """

    def __init__(self, stopwatch: Stopwatch, processes: Processes, path: Path, key: str) -> None:
        self.stopwatch, self.processes, self.path, self.key = stopwatch, processes, path, key
        self.kept = _read(path, key) if processes.is_main else {}

    def __call__(self, model: nn.Module) -> Timing:
        """The time of a model, in every process the same."""
        plain: dict[str, Any] | None = None
        if self.processes.is_main:
            shapes = digest_of([(name, list(tensor.shape)) for name, tensor in model.state_dict().items()])
            if shapes not in self.kept:
                self.kept[shapes] = asdict(self.stopwatch(model))
                write_json(self.path, {"key": self.key, "timings": self.kept})
            plain = self.kept[shapes]
        return Timing(**self.processes.from_main(plain))


def _read(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Times by shapes that an earlier, interrupted run left."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none yet, or cut off by a power failure: they are measured again
        return {}
    kept: dict[str, dict[str, Any]] = content["timings"]
    return kept if content["key"] == key else {}
