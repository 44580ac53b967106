"""Progress: a bar with the time left at a terminal; in a log stage starts, quarters and at most one more line a minute."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vitedge.cli import main
from vitedge.cli._output import progress_bars, time_left


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s left"),
        (45.0, "45 s left"),
        (89.4, "89 s left"),
        (90.0, "2 min left"),
        (12 * 60.0, "12 min left"),
        (59.4 * 60, "59 min left"),
        (59.6 * 60, "1 h 00 min left"),
        (3 * 3600 + 5 * 60.0, "3 h 05 min left"),
        (30 * 3600.0, "30 h 00 min left"),
    ],
)
def test_time_left_is_said_in_words(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


def run(clock: Clock, capsys: pytest.CaptureFixture[str], first: int, total: int, seconds: float) -> list[str]:
    """Lines of a stage from step `first`, that long a step."""
    with progress_bars(clock) as bar:
        progress = bar("train")
        progress(first, total, f"at {first}")
        for done in range(first + 1, total + 1):
            clock.now += seconds
            progress(done, total, f"at {done}")
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_long_stage_says_a_line_a_minute_and_at_its_quarters(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(Clock(), capsys, 0, 400, 1.0)
    assert lines == [
        "train: 0 %, at 0",
        "train: 15 %, 6 min left, at 60",
        "train: 25 %, 5 min left, at 100",
        "train: 40 %, 4 min left, at 160",
        "train: 50 %, 3 min left, at 200",
        "train: 65 %, 2 min left, at 260",
        "train: 75 %, 2 min left, at 300",
        "train: 90 %, 40 s left, at 360",
        "train: 100 %, at 400",
    ]


def test_a_short_stage_says_its_quarters_only(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(Clock(), capsys, 0, 400, 0.01)
    assert [line.split(",")[0] for line in lines] == [f"train: {percent} %" for percent in (0, 25, 50, 75, 100)]


def test_a_resumed_stage_reckons_with_its_own_steps(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(Clock(), capsys, 300, 400, 6.0)
    assert lines[:3] == ["train: 75 %, at 300", "train: 78 %, 9 min left, at 310", "train: 80 %, 8 min left, at 320"]
    assert lines[-1] == "train: 100 %, at 400"


def test_stages_have_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress_bars(clock) as bar:
        first, second = bar("train 1/2"), bar("train 2/2")
        first(0, 10)
        clock.now += 30
        second(0, 0)
        first(1, 10, "still quiet")
        clock.now += 30
        first(2, 10)
    assert capsys.readouterr().err.splitlines() == ["train 1/2: 0 %", "train 2/2: 100 %", "train 1/2: 20 %, 4 min left"]


def test_a_terminal_shows_the_bar_the_time_left_and_the_text() -> None:
    code = (
        "import time\nfrom vitedge.cli._output import progress_bars\n"
        "with progress_bars() as bar:\n"
        "    progress = bar('train')\n"
        "    for done in range(900, 905):\n"  # resumed: the steps before are no part of the pace
        "        progress(done, 1000, f'loss 1.{done}')\n"
        "        time.sleep(0.15)\n"
    )
    master, terminal = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")} | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], stderr=terminal, stdout=subprocess.PIPE, timeout=60, env=environment)
    os.close(terminal)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 0 and done.stdout == b""
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").strip().splitlines()[-1]
    found = re.fullmatch(r"train .+ +90% (\d+) s left +loss 1\.904", last.strip())
    assert found and 5 <= int(found[1]) <= 80, last


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed outright, it would leave its temporary files and its children."""
    left = tmp_path / "left"

    def is_told_to_end() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            left.write_text(folder)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    monkeypatch.setattr("vitedge.host.probe", is_told_to_end)
    before = signal.getsignal(signal.SIGTERM)
    assert main.run(["env"]) == 130
    assert "interrupted" in capsys.readouterr().err and left.is_file() and not Path(left.read_text()).exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("words", [[], ["devices"], ["recipes"], ["data"]])
def test_a_group_without_a_command_shows_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(words) == 2
    told = capsys.readouterr()
    assert told.out == "" and "Usage: vitedge" in told.err and "Commands:" in told.err and "error:" not in told.err
