"""A model that is not built yet is exported and timed in a real runtime; nothing here depends on how fast the host is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.compress import made
from tests.recipes_for_tests import write_recipe
from vitedge import latency, plugins
from vitedge.bench.conditions import Settings
from vitedge.bench.timing import TimingSettings
from vitedge.cli.main import run
from vitedge.compress import Timing, prune
from vitedge.compress._prune_cut import trial
from vitedge.device import Device, load_device
from vitedge.errors import UnavailableError
from vitedge.latency import time_model
from vitedge.models.build import create
from vitedge.progress import silent
from vitedge.train.timings import Timings

SIZE, HIDDEN, LEAST = 32, 1024, 256
ALONE: Any = SimpleNamespace(is_main=True, from_main=lambda content: content)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SETTINGS", Settings(rounds=2, timing=TimingSettings(iterations=3, seconds=0.02, warmup_seconds=0.1)))


def vit() -> Any:
    """Two blocks whose time is that of their hidden units: with a quarter of them it has a third of the products."""
    torch.manual_seed(0)
    return create("deit_tiny_patch16_224", SIZE, 4, 4, options={"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 16})


def prune_to(milliseconds: float, timings: Timings) -> tuple[nn.Module, dict[str, Any]]:
    model = vit()
    target = prune.Target(latency_ms=milliseconds)
    config = prune.Config(score="magnitude", units=("mlp",), scope="layer", multiple=LEAST, target=target)
    compressed = prune.apply(model, config, made.context(Path(), contract=replace(made.CONTRACT, size=SIZE), latency=timings))
    notes: dict[str, Any] = compressed.notes["target.latency_ms"]
    return model, notes


@pytest.mark.slow
def test_a_cut_to_a_time_in_a_real_runtime(tmp_path: Path) -> None:
    """Found by timing candidates, which are noted with their conditions; a run that is resumed makes the same cut without a clock."""
    said: list[tuple[str, float, float, str]] = []

    def bar(name: str) -> Any:
        return lambda done, total, text="": said.append((name, done, total, text))

    device = load_device("cpu")
    stopwatch = partial(time_model, size=SIZE, opset=18, device=device, bar=bar)
    timings = Timings(stopwatch, ALONE, tmp_path / "times.json", "key")
    whole, least = vit(), trial(vit(), {(f"blocks.{i}", "mlp"): LEAST for i in (0, 1)})
    random = torch.get_rng_state()
    ends = [timings(whole).ms, timings(least).ms]
    assert torch.equal(torch.get_rng_state(), random) and whole.training
    model, notes = prune_to(sum(ends) / 2, timings)
    trials = notes["trials"]
    assert 3 <= len(trials) <= 4 and [found["ratio"] for found in trials] == sorted({found["ratio"] for found in trials})
    assert trials[0]["ratio"] == 0 and trials[-1]["ratio"] == 0.75 and [trials[0]["ms"], trials[-1]["ms"]] == ends
    assert notes["reached"] in [found["ms"] for found in trials] and notes["reached"] <= notes["limit"]
    conditions = notes["conditions"]
    assert conditions["device"] == "cpu" and conditions["runtime"] in plugins.names("runtimes") and conditions["precision"] == "fp32"
    assert conditions["batch_size"] == 1 and conditions["threads"] >= 1 and conditions["rounds"] == 2
    assert isinstance(conditions["emulated"], bool) and conditions["provider"] and conditions["versions"] and conditions["date"]
    assert said[0] == ("time on cpu", 0, 2, "exporting a candidate") and said[-1][1:3] == (2, 2)

    def stopped(model: nn.Module) -> Timing:
        raise AssertionError("timed again")

    again, told = prune_to(sum(ends) / 2, Timings(stopped, ALONE, tmp_path / "times.json", "key"))
    assert told == notes and [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_a_time_that_cannot_be_had_is_refused_by_the_command_line(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"arch": "test_vit", "img_size": 16, "patch_size": 8, "weights": "none", "options": {"depth": 2}}
    steps = [{"prune": {"score": "magnitude", "target": {"latency_ms": 0.0001}}}, {"train": {"steps": 2, "precision": "fp32"}}]
    recipe = write_recipe(tmp_path, colours, model=model, steps=steps, quantize={})
    assert run(["train", "--recipe", str(recipe), "-o", str(tmp_path / "small")]) == 2
    said = capsys.readouterr().err
    assert "prune.target.latency_ms: expected at most 0.0001, found " in said and "at the least widths" in said
    assert not (tmp_path / "small" / "checkpoint.safetensors").exists()


def test_a_device_that_is_not_here_is_said() -> None:
    absent = {"runtime": "onnxruntime", "provider": "NoSuchExecutionProvider"}
    device = Device.model_validate({"name": "absent", "runtimes": [absent], "source": {"runtimes": "made up"}})
    with pytest.raises(UnavailableError, match="device absent: expected a file that it can run here"):
        time_model(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), 8, 18, device, lambda name: silent)
