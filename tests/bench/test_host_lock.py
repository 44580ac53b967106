"""The host's lock: builders side by side, timing alone, and a killed holder lets go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitedge.bench.host_lock import working

HOLDER = """
import sys
from pathlib import Path
from vitedge.bench.host_lock import working
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


PARENT = """
import subprocess, sys
from pathlib import Path
from vitedge.bench.host_lock import held_files, working
with working("timing", print, Path(sys.argv[2])):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held_files())
    print(child.pid, flush=True)
    sys.stdin.readline()
"""


def test_the_host_is_held_until_the_worker_of_a_killed_holder_is_gone(
    tmp_path: Path, holders: list[Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HOLDER", PARENT)
    holders.append(Holder("timing", tmp_path))
    worker = int(holders[0].says())
    monkeypatch.undo()
    os.kill(worker, signal.SIGSTOP)  # it would end with what it reads, which its parent holds open
    holders[0].process.kill()
    holders[0].process.wait()
    holders.append(Holder("build", tmp_path))
    assert holders[1].says().startswith("waits: ")
    os.kill(worker, signal.SIGKILL)
    assert holders[1].says() == "holds"


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


def test_a_builder_that_times_in_between_waits_for_the_others_and_builds_on(tmp_path: Path, holders: list[Holder]) -> None:
    """As a technique that cuts to a time does, twice in one build; and two such builders do not wait for each other for ever."""
    holders.append(Holder("build", tmp_path))
    assert holders[0].says() == "holds"
    said: list[str] = []

    def told(line: str) -> None:
        said.append(line)
        holders[0].let_go()

    with working("build", said.append, tmp_path):
        assert said == []
        with working("timing", told, tmp_path), working("timing", said.append, tmp_path), working("build", said.append, tmp_path):
            assert len(said) == 1 and "before timing" in said[0] and holders[0].says() == "left"
            holders.append(Holder("build", tmp_path))
            assert holders[1].says().startswith("waits: ")
        assert holders[1].says() == "holds"  # beside this builder
    holders[1].let_go()
    assert holders[1].says() == "left"


def test_two_threads_do_not_time_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    order: list[str] = []

    def second() -> None:
        with working("timing", said.append, tmp_path):
            order.append("second")

    with working("timing", said.append, tmp_path):
        other = threading.Thread(target=second)
        other.start()
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        order.append("first")
    other.join(timeout=20)
    assert order == ["first", "second"] and len(said) == 1


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
