"""Real workers with a real engine: what they answer, and how they fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.bench.made import tiny_row
from vitedge.bench.isolation import run_worker, time_in_worker
from vitedge.bench.timing import TimingSettings
from vitedge.errors import InputError, UnavailableError, WorkerError
from vitedge.preprocess import Preprocessing

QUICK = TimingSettings(iterations=7, seconds=0.01, warmup_seconds=0.3)


def test_times_every_batch_size_in_ascending_order_and_says_what_ran(tmp_path: Path):
    answers = time_in_worker(tiny_row(tmp_path), (4, 1), QUICK)
    assert [answer["batch_size"] for answer in answers] == [1, 4]
    for answer in answers:
        assert len(answer["samples_ns"]) >= 7
        assert min(answer["samples_ns"]) > 0
        assert sum(answer["samples_ns"]) <= answer["elapsed_ns"]
        assert answer["elapsed_ns"] >= 0.01e9
        assert answer["load_ms"] > 0
        assert answer["first_inference_ms"] > 0
        assert answer["warmup_iterations"] >= 6
        facts = answer["facts"]
        assert (facts["runtime"], facts["provider"], facts["precision"], facts["threads"]) == (
            "onnxruntime",
            "CPUExecutionProvider",
            "fp32",
            1,
        )
    assert answers[0]["peak_rss_mib"] <= answers[1]["peak_rss_mib"]
    assert time_in_worker(tiny_row(tmp_path), (1,), QUICK, describe=False)[0]["facts"] is None


def test_memory_of_the_parent_is_not_the_workers(tmp_path: Path):
    ballast = np.ones(300 << 17)  # 300 MiB, touched
    peak = time_in_worker(tiny_row(tmp_path), (1,), QUICK, describe=False)[0]["peak_rss_mib"]
    assert ballast[-1] == 1
    assert 10 < peak < 250


def test_nothing_but_the_engine_reads_the_file(tmp_path: Path):
    """What parses ONNX would stand in the peak of memory of ONNX files alone."""
    spy = tmp_path / "spy"
    spy.mkdir()
    told = tmp_path / "told"
    (spy / "sitecustomize.py").write_text(
        "import sys\n"
        "class Spy:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        open({str(told)!r}, 'a').write(name + '\\n')\n"
        "sys.meta_path.insert(0, Spy())\n"
    )
    time_in_worker(tiny_row(tmp_path, environment={"PYTHONPATH": str(spy)}), (1,), QUICK, describe=False)
    imported = told.read_text().split()
    assert "onnxruntime" in imported and "onnx" not in imported and "google.protobuf" not in imported


def test_noise_on_stdout_does_not_break_the_answer(tmp_path: Path):
    """Noise from before the worker's first line to after its last, to the descriptor itself as an engine's C++ does."""
    noise = tmp_path / "noise"
    noise.mkdir()
    (noise / "sitecustomize.py").write_text(
        "import os, threading, time\n"
        "def shout():\n"
        "    while True:\n"
        '        os.write(1, b\'{"result": "noise"}\\n[W:onnxruntime] careful\\n\')\n'
        "        time.sleep(0.005)\n"
        "os.write(1, b'noise\\n')\n"
        "threading.Thread(target=shout, daemon=True).start()\n"
    )
    row = tiny_row(tmp_path, environment={"PYTHONPATH": str(noise)})
    assert time_in_worker(row, (1,), QUICK, describe=False)[0]["batch_size"] == 1


def test_a_file_in_the_users_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    assert time_in_worker(tiny_row(tmp_path), (1,), QUICK, describe=False)


def test_a_relative_cache_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The worker runs in another folder; what it decodes once must be where this process looks for it."""
    spy = tmp_path / "spy"
    spy.mkdir()
    told = tmp_path / "told"
    (spy / "sitecustomize.py").write_text(f"import os; open({str(told)!r}, 'w').write(os.environ['VITEDGE_CACHE'])")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITEDGE_CACHE", "cache")
    time_in_worker(tiny_row(tmp_path, environment={"PYTHONPATH": str(spy)}), (1,), QUICK, describe=False)
    assert told.read_text() == str(tmp_path / "cache")


def test_relative_paths_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = tiny_row(tmp_path)
    monkeypatch.chdir(tmp_path)
    relative = replace(row, artifact=replace(row.artifact, files=(Path(row.artifact.path.name),)))
    assert time_in_worker(relative, (1,), QUICK, describe=False)


def test_errors_inside_come_out_as_they_were(tmp_path: Path):
    with pytest.raises(UnavailableError) as caught:
        time_in_worker(tiny_row(tmp_path, provider="CUDAExecutionProvider"), (1,), QUICK)
    assert "CUDAExecutionProvider" in str(caught.value)
    with pytest.raises(InputError):
        row = tiny_row(tmp_path)
        row.artifact.path.write_bytes(b"not a model")
        time_in_worker(row, (1,), QUICK)


def test_a_crash_names_the_exit_and_the_last_line_of_stderr(tmp_path: Path):
    with pytest.raises(WorkerError) as caught:
        run_worker({"action": "no such action", "row": {}}, tiny_row(tmp_path))
    text = str(caught.value)
    assert "exit code 1" in text
    assert "KeyError: 'no such action'" in text
    assert "model.fp32.onnx in onnxruntime" in text
    assert "\n" not in text


def test_a_killed_worker_names_the_signal(tmp_path: Path):
    row = tiny_row(tmp_path)

    def kill_child() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for child in psutil.Process().children():
                if "vitedge.bench.worker" in child.cmdline():
                    os.kill(child.pid, signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_child)
    killer.start()
    with pytest.raises(WorkerError, match="SIGKILL"):
        time_in_worker(row, (1,), TimingSettings(seconds=30))
    killer.join()


def test_a_silent_worker_is_ended(tmp_path: Path):
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(WorkerError, match="sign of life"):
        time_in_worker(tiny_row(tmp_path), (1,), TimingSettings(seconds=60), silence_s=0.1)
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_free_image_size_needs_a_contract(tmp_path: Path):
    from vitedge.bench.worker import input_shape

    row = tiny_row(tmp_path)
    assert input_shape((None, 3, None, None), 2, row) == (2, 3, 8, 8)
    foreign = replace(row, artifact=replace(row.artifact, preprocessing=None))
    assert input_shape((None, 3, 5, 7), 2, foreign) == (2, 3, 5, 7)
    with pytest.raises(InputError, match="fixed image size"):
        input_shape((None, 3, None, None), 2, foreign)
    with pytest.raises(InputError, match="fixed at 1"):
        input_shape((1, 3, 8, 8), 2, row)
    last = replace(row, artifact=replace(row.artifact, preprocessing=Preprocessing(size=8, layout="NHWC").to_json()))
    assert input_shape((None, None, None, 3), 2, last) == (2, 8, 8, 3)
