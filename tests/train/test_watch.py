"""Watching a training: metrics survive kills and resuming, TensorBoard reads its events back, the picture shows the data."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitedge.errors import InputError, OutputError, UnavailableError
from vitedge.train.watch import Watcher, read_metrics

NAMES = st.text(min_size=1).filter(lambda name: name not in ("self", "stage", "label", "step"))
VALUES = st.one_of(st.floats(), st.integers(), st.text())


def logged(folder: Path, stages: list[list[int]], **metrics: float) -> Watcher:
    """A watcher that has been told `metrics` at the steps of each stage."""
    watcher = Watcher(folder)
    for index, steps in enumerate(stages):
        watcher.stage(index, f"train {index + 1}/{len(stages)}", 0)
        for step in steps:
            watcher.log(step, **metrics)
    return watcher


def places(folder: Path) -> list[tuple[int, int]]:
    return [(line["stage"], line["step"]) for line in read_metrics(folder / "metrics.jsonl")]


@given(lines=st.lists(st.tuples(st.integers(0, 10**9), st.dictionaries(NAMES, VALUES, max_size=4)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_what_is_logged_is_read(lines: list[tuple[int, dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        watcher = Watcher(Path(folder))
        watcher.stage(2, "train 3/3", 0)
        for step, metrics in lines:
            watcher.log(step, **metrics)
        watcher.close()
        found = read_metrics(Path(folder) / "metrics.jsonl")
    expected = [
        {"stage": 2, "label": "train 3/3", "step": step}
        | {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in metrics.items()}
        for step, metrics in lines
    ]
    assert found == expected
    assert [[type(value) for value in line.values()] for line in found] == [[type(value) for value in line.values()] for line in expected]


def test_a_last_line_cut_anywhere_is_left_out_and_the_training_goes_on(tmp_path: Path) -> None:
    logged(tmp_path, [[10, 20, 30]], loss=0.5).close()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    last = whole.rindex(b"{")
    for end in range(last, len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:end])
        complete = end >= len(whole) - 1  # the newline may be all that is missing
        assert places(tmp_path) == [(0, 10), (0, 20), (0, 30)][: 3 if complete else 2]
        watcher = Watcher(tmp_path)
        watcher.stage(0, "train", 20)
        watcher.log(30, loss=0.25)
        watcher.close()
        lines = read_metrics(tmp_path / "metrics.jsonl")
        assert [(line["step"], line["loss"]) for line in lines] == [(10, 0.5), (20, 0.5), (30, 0.25)]


def test_lines_are_there_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom vitedge.train.watch import Watcher\n"
        "watcher = Watcher(Path(sys.argv[1]))\nwatcher.stage(0, 'train', 0)\n"
        "for step in range(1, 6): watcher.log(step, loss=1.0)\n"
        "assert not {'torch', 'matplotlib', 'tensorboard'} & set(sys.modules)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert places(tmp_path) == [(0, step) for step in range(1, 6)]


@pytest.mark.parametrize("row", [b'{"stage": 0, "st', b"", b"[1]", b'{"stage": 0}', b'{"stage": 0, "step": 1.5}', b"\xff\xfe", b"\0\0\0"])
def test_other_damage_names_the_line(tmp_path: Path, row: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"stage": 0, "step": 1}\n' + row + b'\n{"stage": 0, "step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: expected one JSON object"):
        read_metrics(path)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        Watcher(tmp_path).stage(0, "train", 1)
    assert path.read_bytes().count(b"\n") == 3  # nothing was removed


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train first"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("index", "resumed_step", "kept"),
    [
        (0, 0, []),
        (0, 20, [(0, 0), (0, 10), (0, 20)]),
        (0, 25, [(0, 0), (0, 10), (0, 20)]),
        (1, 0, [(0, 0), (0, 10), (0, 20), (0, 30)]),
        (1, 10, [(0, 0), (0, 10), (0, 20), (0, 30), (1, 0), (1, 10)]),
        (2, 0, [(0, 0), (0, 10), (0, 20), (0, 30), (1, 0), (1, 10), (1, 20)]),
    ],
)
def test_a_resumed_run_shows_no_step_twice(tmp_path: Path, index: int, resumed_step: int, kept: list[tuple[int, int]]) -> None:
    logged(tmp_path, [[0, 10, 20, 30], [0, 10, 20], [0, 10]]).close()
    watcher = Watcher(tmp_path)
    watcher.stage(index, "train", resumed_step)
    assert places(tmp_path) == kept
    watcher.log(resumed_step + 10)
    watcher.close()
    assert places(tmp_path) == [*kept, (index, resumed_step + 10)]


def test_metrics_without_a_stage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stage"):
        Watcher(tmp_path).log(1, loss=1.0)
    watcher = logged(tmp_path, [[1]])
    watcher.close()
    watcher.close()
    with pytest.raises(RuntimeError, match="stage"):
        watcher.log(2)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="expected a place that can be written"):
        Watcher(tmp_path / "file").stage(0, "train", 0)
    watcher = logged(tmp_path, [[1]])
    watcher.close()
    watcher._lines = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115 - every write to it finds the disk full
    with pytest.raises(OutputError, match="free some space"):
        watcher.log(2, loss=0.5)
    with pytest.raises(OutputError, match="free some space"):
        watcher.close()
    watcher.close()


# TensorBoard


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard itself shows of a metric."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_tensorboard_reads_its_events_back_and_each_once(tmp_path: Path) -> None:
    first = Watcher(tmp_path, tensorboard=True)
    first.stage(0, "train 1/2", 0)
    first.log(10, seconds=1.0, loss=2.0, note="text stays out")
    first.log(10, seconds=1.0, validation_top1=40.0)
    first.log(20, seconds=2.0, loss=math.nan)
    first.stage(1, "train 2/2", 0)
    for step in (10, 20, 30):
        first.log(step, seconds=step / 10, loss=step / 100)
    first.close()
    assert scalars(tmp_path / "tensorboard" / "stage0", "loss") == [(10, 2.0)]
    assert scalars(tmp_path / "tensorboard" / "stage0", "validation_top1") == [(10, 40.0)]
    assert scalars(tmp_path / "tensorboard" / "stage1", "loss") == [(10, 0.1), (20, 0.2), (30, 0.3)]

    resumed = Watcher(tmp_path, tensorboard=True)
    resumed.stage(1, "train 2/2", 20)
    resumed.log(30, seconds=3.5, loss=0.9)
    resumed.close()
    assert scalars(tmp_path / "tensorboard" / "stage1", "loss") == [(10, 0.1), (20, 0.2), (30, 0.9)]
    assert scalars(tmp_path / "tensorboard" / "stage0", "loss") == [(10, 2.0)]

    anew = Watcher(tmp_path, tensorboard=True)
    anew.stage(0, "train", 0)
    anew.log(5, loss=3.0)
    anew.close()
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["stage0"]
    assert scalars(tmp_path / "tensorboard" / "stage0", "loss") == [(5, 3.0)]


def test_tensorboards_clock_is_training_time(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path, [[]]).close()
    watcher = Watcher(tmp_path)
    watcher.stage(0, "train", 0)
    watcher.log(1, seconds=100.0, loss=1.0)
    watcher.close()
    watcher = Watcher(tmp_path, tensorboard=True)
    watcher.stage(0, "train", 1)
    watcher.log(2, seconds=160.0, loss=0.5)
    watcher.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "stage0"))
    events.Reload()
    first, second = events.Scalars("loss")
    assert second.wall_time - first.wall_time == pytest.approx(60.0, abs=1e-3)


@pytest.mark.parametrize(("package", "tensorboard", "extra"), [("tensorboard", True, "tensorboard"), ("matplotlib", False, "torch")])
def test_a_missing_package_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, tensorboard: bool, extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError, match=rf"pip install 'vitedge\[{extra}\]'"):
        Watcher(tmp_path, tensorboard)
    assert not list(tmp_path.iterdir())


# The picture


def test_the_picture_shows_the_data(tmp_path: Path) -> None:
    for name, scale in (("run", 1.0), ("same", 1.0), ("other", 2.0)):
        watcher = Watcher(tmp_path / name / "build")
        watcher.stage(0, "train", 0)
        for step in range(1, 6):
            watcher.log(step, seconds=step * 1.0, loss=scale / step, lr=1e-3, images_per_s=100.0)
            watcher.log(step, validation_top1=10.0 * step, validation_top1_class=9.0 * step, validation_top1_distill=8.0 * step)
        assert watcher.draw() == tmp_path / name / "build" / "curves.png"
        watcher.close()
    run, same, other = ((tmp_path / name / "build" / "curves.png") for name in ("run", "same", "other"))
    with Image.open(run) as image:
        image.load()
        assert image.format == "PNG" and image.width == 900
    assert run.stat().st_size < 200_000
    assert run.read_bytes() == same.read_bytes() != other.read_bytes()
    assert sorted(path.name for path in run.parent.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    assert Watcher(tmp_path).draw() is None
    watcher = logged(tmp_path, [[1, 2]], seconds=1.0, loss=math.nan)
    assert watcher.draw() is None
    watcher.close()
    assert not (tmp_path / "curves.png").exists()


def test_drawing_leaves_matplotlib_as_it_is(tmp_path: Path) -> None:
    logged(tmp_path, [[1, 2, 3]], loss=0.5).close()
    code = (
        "import sys\nfrom pathlib import Path\nfrom vitedge.train.watch import Watcher\n"
        "assert Watcher(Path(sys.argv[1])).draw()\n"
        "assert not {'matplotlib.pyplot', 'torch', 'tensorboard'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
