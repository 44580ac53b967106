"""Many processes: the same training as one, whatever is uneven; and a clear end when one of them is gone.

Real processes on the CPU, joined by gloo, started through the command line as users start them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from tests.recipes_for_tests import write_recipe
from vitedge.train.watch import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"}
# 99 train, 21 validation and 36 test images, 35 a batch: no share of anything is as large as the others.
TRAIN = {"steps": 12, "batch_size": 35, "lr": 1e-3, "precision": "fp32", "shift": 1, "checkpoint_every": 4, "evaluate_every": 4}


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--recipe", str(recipe), "-o", str(out), "--json", *more]


def vitedge(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", *launcher, *(("-m",) if launcher else ()), "vitedge", *arguments]
    return subprocess.run(start, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)


def recipe_of(folder: Path, data: Path, **train: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, data, 0.175, steps=[{"train": {**TRAIN, **train}}], quantize={})


def curve(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A recipe with everything that must not depend on the number of processes, trained by one."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = recipe_of(folder, colours, ema=0.9, randaugment=1, erase=0.25)
    done = vitedge(*command(recipe, folder / "out"))
    assert done.returncode == 0, done.stderr
    return recipe, folder / "out", json.loads(done.stdout)["checkpoint"]["notes"]


@pytest.mark.parametrize(
    "launcher",
    [(), pytest.param(("torch.distributed.run", "--standalone", "--nproc-per-node", "2"), marks=pytest.mark.slow)],
    ids=["--processes", "torchrun"],
)
def test_many_processes_train_what_one_trains(alone: tuple[Path, Path, dict[str, Any]], tmp_path: Path, launcher: tuple[str, ...]) -> None:
    recipe, expected, notes = alone
    count = 2 if launcher else 3
    done = vitedge(*command(recipe, tmp_path / "out", *(() if launcher else ("--processes", "3"))), launcher=launcher)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["checkpoint"]["notes"]
    assert found["steps"][0]["train"]["processes"] == count and found["steps"][0]["train"]["validation_images"] == 21
    assert curve(tmp_path / "out") == pytest.approx(curve(expected), rel=1e-4)
    weights, wanted = load_file(tmp_path / "out" / "checkpoint.safetensors"), load_file(expected / "checkpoint.safetensors")
    assert set(weights) == set(wanted)
    for name, tensor in wanted.items():
        assert abs(weights[name] - tensor).max() < 2e-4, name
    for point, same in zip(found["steps"][0]["train"]["history"], notes["steps"][0]["train"]["history"], strict=True):
        assert point["loss"] == pytest.approx(same["loss"], rel=1e-4)
    assert found["test"]["images"] == 36 and found["test"]["top1"] == pytest.approx(notes["test"]["top1"], abs=100 / 36 + 0.01)


@pytest.mark.slow
def test_two_steps_in_parts_over_two_processes(tmp_path: Path, colours: Path) -> None:
    """Accumulated parts, and a second `train` step that starts from the first one's best weights, in every process."""
    steps = [{"train": {**TRAIN, "accumulate": 2}}, {"train": {**TRAIN, "steps": 4, "accumulate": 2}}]
    recipe = write_recipe(tmp_path, colours, 0.175, steps=steps, quantize={})
    found = []
    for name, more in (("one", ()), ("two", ("--processes", "2", "--seed", "0"))):
        done = vitedge(*command(recipe, tmp_path / name, *more))
        assert done.returncode == 0, done.stderr
        found.append(load_file(tmp_path / name / "checkpoint.safetensors"))
    for name, tensor in found[0].items():
        assert abs(found[1][name] - tensor).max() < 3e-4, name


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_checkpoint_is_good(
    alone: tuple[Path, Path, dict[str, Any]], tmp_path: Path, colours: Path
) -> None:
    recipe, out = recipe_of(tmp_path, colours, steps=200, checkpoint_every=5, evaluate_every=200), tmp_path / "out"
    start = [sys.executable, "-m", "vitedge", "train", "--recipe", str(recipe), "-o", str(out), "--processes", "2"]
    running = subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    state = out / ".work" / "step0" / "train.state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert any(re.search(r"process \d of 2: expected all processes .* run the same command again", line) for line in said), errors
    assert "Traceback" not in errors
    import torch

    step = torch.load(state, weights_only=True)["step"]
    assert 5 <= step < 200 and not (out / "checkpoint.safetensors").exists()
    again = vitedge(*command(recipe, out))
    assert again.returncode == 0 and f"resumed at step {step}" in again.stderr, again.stderr
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl") if "lr" in line]
    assert steps == list(range(10, 201, 10))


def test_sigterm_stops_all_processes_with_a_state_saved(tmp_path: Path, colours: Path) -> None:
    recipe, out = recipe_of(tmp_path, colours, steps=100_000, checkpoint_every=100_000, evaluate_every=100_000), tmp_path / "out"
    start = [sys.executable, "-m", "vitedge", "train", "--recipe", str(recipe), "-o", str(out), "--processes", "2"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    running = subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, "TMPDIR": str(temporary)})
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(running.pid).children(recursive=True)
    assert len(workers) >= 1
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert not psutil.wait_procs(workers, timeout=10)[1], "a worker went on"
    assert (out / ".work" / "step0" / "train.state.pt").exists() and "Traceback" not in errors
    assert not list(temporary.glob("*elastic*")) and not list(temporary.glob("vitedge-launch-*")), "the launcher's logs were left behind"


@pytest.mark.slow
def test_more_processes_than_images_in_a_batch_is_refused(tmp_path: Path, colours: Path) -> None:
    done = vitedge(*command(recipe_of(tmp_path, colours, batch_size=1), tmp_path / "out", "--processes", "2"))
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert "expected an image for each of 2 processes" in done.stderr and "Traceback" not in done.stderr
