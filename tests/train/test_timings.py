"""What candidates took is measured once, told to every process, and read again by a run that goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from vitedge.compress import Timing
from vitedge.train.timings import Timings

ALONE: Any = SimpleNamespace(is_main=True, from_main=lambda content: content)


class Clock:
    """Counts what it is asked, and never says the same twice."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, model: nn.Module) -> Timing:
        self.asked += 1
        return Timing(float(self.asked), {"device": "made", "threads": 2}, "unstable" if self.asked == 2 else "")


def test_the_same_shapes_are_timed_once(tmp_path: Path) -> None:
    clock = Clock()
    timings = Timings(clock, ALONE, tmp_path / "new" / "times.json", "key")
    first, other, again = timings(nn.Linear(3, 4)), timings(nn.Linear(4, 3)), timings(nn.Linear(3, 4))
    assert first == again == Timing(1.0, {"device": "made", "threads": 2}) and other.ms == 2.0 and other.unstable == "unstable"
    assert clock.asked == 2


def test_a_run_that_goes_on_is_told_the_same(tmp_path: Path) -> None:
    path, clock = tmp_path / "times.json", Clock()
    told = Timings(Clock(), ALONE, path, "key")(nn.Linear(3, 4))
    resumed = Timings(clock, ALONE, path, "key")
    assert resumed(nn.Linear(3, 4)) == told and clock.asked == 0
    assert resumed(nn.Linear(5, 5)).ms == 1.0 and clock.asked == 1
    assert Timings(clock, ALONE, path, "key")(nn.Linear(5, 5)).ms == 1.0 and clock.asked == 1


@pytest.mark.parametrize("left", ["another key", "damaged"])
def test_what_cannot_be_taken_is_measured_again(left: str, tmp_path: Path) -> None:
    path, clock = tmp_path / "times.json", Clock()
    Timings(Clock(), ALONE, path, "key")(nn.Linear(3, 4))
    if left == "damaged":
        path.write_text(path.read_text()[:20])
    Timings(clock, ALONE, path, "other" if left == "another key" else "key")(nn.Linear(3, 4))
    assert clock.asked == 1


def test_other_processes_take_what_the_first_one_found(tmp_path: Path) -> None:
    clock = Clock()
    told = {"ms": 7.0, "conditions": {"device": "made"}, "unstable": ""}
    second: Any = SimpleNamespace(is_main=False, from_main=lambda content: told)
    found = Timings(clock, second, tmp_path / "times.json", "key")(nn.Linear(3, 4))
    assert found == Timing(7.0, {"device": "made"}) and clock.asked == 0 and not list(tmp_path.iterdir())
