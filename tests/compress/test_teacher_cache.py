"""The file of logits: whole from the start, shared, killed at any moment, damaged, and without room."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitedge.compress import _teacher_cache
from vitedge.compress._teacher_cache import open_cache
from vitedge.errors import OutputError

SHAPE = (2, 40, 5)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path))
    return tmp_path / "teacher_logits"


def truth(view: int, indices: np.ndarray) -> np.ndarray:
    """What the teacher of these tests answers."""
    return (np.sin(np.arange(5) + 10 * view) + indices[:, None]).astype(np.float16)


def test_rows_are_missing_until_they_are_written() -> None:
    opened, indices = open_cache("a", SHAPE), np.array([3, 39, 0])
    assert not opened.read(1, indices)[1].any()
    opened.write(1, indices[:2], truth(1, indices[:2]))
    for again in (opened, open_cache("a", SHAPE)):
        rows, known = again.read(1, indices)
        assert known.tolist() == [True, True, False]
        assert np.array_equal(rows[:2], truth(1, indices[:2]))
        assert not again.read(0, indices)[1].any()
    assert opened.notes["rows_computed"] == 2 and opened.notes["rows_reused"] == 2 and opened.notes["remade"] is None


def test_it_is_a_npy_file_all_of_whose_bytes_are_on_the_disk(cache: Path) -> None:
    shape = (3, 5000, 100)
    open_cache("a", shape).write(2, np.array([7]), np.ones((1, 100), np.float16))
    found = np.load(cache / "a.npy")
    assert found.shape == shape and found.dtype == np.float16
    assert np.isnan(found).sum() == found.size - 100
    status = (cache / "a.npy").stat()
    assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize("damage", ["short", "long", "empty", "dtype", "shape", "order", "noise"])
def test_another_shape_or_type_or_a_file_cut_short_is_made_again(damage: str, cache: Path) -> None:
    path, indices = cache / "a.npy", np.arange(40)
    open_cache("a", SHAPE).write(0, indices, truth(0, indices))
    content = path.read_bytes()
    if damage in ("short", "long", "empty", "noise"):
        path.write_bytes({"short": content[:-1], "long": content + b"\0", "empty": b"", "noise": b"x" * len(content)}[damage])
    else:
        wrong = {"dtype": np.zeros(SHAPE, np.int16), "shape": np.zeros((2, 5, 40), np.float16)}
        np.save(path, wrong.get(damage, np.asfortranarray(np.zeros(SHAPE, np.float16))))
    again = open_cache("a", SHAPE)
    assert again.notes["remade"].startswith("it had" if damage in ("short", "long") else "it was not float16 of shape (2, 40, 5)")
    assert not again.read(0, indices)[1].any()
    assert open_cache("a", SHAPE).notes["remade"] is None


@given(st.integers(0, 39), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_a_row_cut_short_is_missing(image: int, bytes_written: int) -> None:
    opened, indices = open_cache("torn", SHAPE), np.array([image])
    whole = truth(0, indices)
    torn = np.full_like(whole, np.nan)
    torn.view(np.uint8)[:, :bytes_written] = whole.view(np.uint8)[:, :bytes_written]
    opened.write(0, indices, torn)
    known = opened.read(0, indices)[1]
    assert known.tolist() == [False]


FILL = """
import sys, numpy as np
from vitedge.compress._teacher_cache import open_cache
from tests.compress.test_teacher_cache import SHAPE, truth
opened = open_cache("a", SHAPE)
sys.stdout.write("open\\n"); sys.stdout.flush(); sys.stdin.readline()
for image in range(int(sys.argv[1]), 40, 2):
    opened.write(0, np.array([image]), truth(0, np.array([image])))
sys.stdout.write("done\\n"); sys.stdout.flush(); sys.stdin.readline()
"""


def fill(first: int) -> subprocess.Popen[str]:
    """A process that writes every second row from `first` on, once it is told to, and then waits."""
    return subprocess.Popen([sys.executable, "-c", FILL, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def say(process: subprocess.Popen[str], expected: str) -> None:
    assert process.stdout is not None and process.stdout.readline() == expected


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_share_it_and_a_kill_loses_nothing_that_was_written() -> None:
    indices = np.arange(40)
    with fill(0) as even, fill(1) as odd:
        for process in (even, odd):
            say(process, "open\n")
        go(even)
        say(even, "done\n")
        ours = open_cache("a", SHAPE)
        rows, known = ours.read(0, indices)
        assert known.tolist() == [True, False] * 20
        assert np.array_equal(rows[::2], truth(0, indices[::2]))
        go(odd)
        say(odd, "done\n")
        assert ours.read(0, indices)[1].all()
        for process in (even, odd):
            os.kill(process.pid, signal.SIGKILL)
    rows, known = open_cache("a", SHAPE).read(0, indices)
    assert known.all() and np.array_equal(rows, truth(0, indices))


def test_what_a_kill_left_while_creating_is_cleared(cache: Path) -> None:
    (cache / ".a.npy.x1.part").mkdir(parents=True)
    (cache / ".b.npy.x1.part").mkdir()
    open_cache("a", SHAPE)
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == [".b.npy.x1.part", "a.npy"]


def test_a_full_disk_is_one_line_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_teacher_cache.os, "fsync", full)
    with pytest.raises(OutputError, match="free space there, or set VITEDGE_CACHE to another folder") as caught:
        open_cache("a", SHAPE)
    assert "\n" not in str(caught.value)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set VITEDGE_CACHE"):
        open_cache("a", SHAPE)
