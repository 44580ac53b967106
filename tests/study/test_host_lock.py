"""The host's lock: builders side by side, timing alone, and a killed holder lets go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitedge.study.host_lock import working

HOLDER = """
import sys
from pathlib import Path
from vitedge.study.host_lock import working
with working(sys.argv[1], lambda text: print("waits: " + text, flush=True), Path(sys.argv[2])):
    print("holds", flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


class Holder:
    """A process that holds the lock until it is told to let go."""

    def __init__(self, kind: str, folder: Path) -> None:
        command = [sys.executable, "-c", HOLDER, kind, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    made: list[Holder] = []
    yield made
    for holder in made:
        holder.end()


@pytest.mark.parametrize(("first", "second"), [("build", "timing"), ("timing", "build"), ("timing", "timing")])
def test_timing_and_anything_else_wait_for_each_other(tmp_path: Path, holders: list[Holder], first: str, second: str) -> None:
    holders.append(Holder(first, tmp_path))
    assert holders[0].says() == "holds"
    holders.append(Holder(second, tmp_path))
    waits = holders[1].says()
    assert waits.startswith("waits: ") and "waiting for it to end" in waits
    holders[0].let_go()
    assert holders[0].says() == "left"
    assert holders[1].says() == "holds"


def test_builders_work_side_by_side(tmp_path: Path, holders: list[Holder]) -> None:
    holders += [Holder("build", tmp_path), Holder("build", tmp_path)]
    assert [holder.says() for holder in holders] == ["holds", "holds"]


def test_a_killed_holder_lets_go(tmp_path: Path, holders: list[Holder]) -> None:
    holders.append(Holder("timing", tmp_path))
    assert holders[0].says() == "holds"
    holders[0].process.kill()
    holders[0].process.wait()
    said: list[str] = []
    with working("timing", said.append, tmp_path):
        assert said == []


def test_it_can_be_taken_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), working("timing", lambda text: None, tmp_path):
        raise ZeroDivisionError
    said: list[str] = []
    with working("timing", said.append, tmp_path):
        assert said == []
