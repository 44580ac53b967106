"""Slow tier: the real model on real images, from training to the int8 files' top-1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitedge.cli.main import run
from vitedge.recipe import load_recipe
from vitedge.schema import list_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def _real_environment(real_data: Path, real_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITEDGE_DATA", str(real_data))
    monkeypatch.setenv("VITEDGE_WEIGHTS", str(real_weights))


def test_fine_tuning_from_imagenet_weights_learns_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """50 steps of a plain loop reach 72 % on test; the validation split of 120 steps must be well above 75 %."""
    import yaml

    plain = load_recipe("deit_tiny_112_int8").to_plain()
    plain["steps"] = [{"train": {"steps": 120, "batch_size": 64, "lr": 2e-4, "warmup": 0.1}}]
    plain["quantize"] = {}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(plain | {"name": "short"}))
    assert run(["train", "--recipe", str(tmp_path / "short.yaml"), "-o", str(tmp_path / "out"), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["checkpoint"]["notes"]["steps"][0]["train"]
    assert notes["validation_top1"] > 75.0


def test_int8_of_the_reference_base_keeps_its_top1(tmp_path: Path, real_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = real_weights / "deit_tiny_cifar10_112.safetensors"
    assert run(["export", "--recipe", "deit_tiny_112_ptq", "--weights", str(weights), "-o", str(tmp_path / "out")]) == 0
    assert run(["bench", str(tmp_path / "out"), "--rounds", "2", "--seconds", "0.2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["measurements"]
    fp32 = next(row for row in rows if row["artifact"] == "model.fp32.onnx" and row["precision"] == "fp32")
    assert fp32["top1"] == pytest.approx(91.42, abs=0.05)
    for row in rows:
        if row["precision"] == "int8":
            assert row["top1_drop"]["points"] <= 0.5
            assert fp32["size_bytes"] / row["size_bytes"] >= 3.5


def test_the_embedded_model_is_as_good_as_its_card_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert "deit_tiny_int8" in list_files("recipes")
    assert run(["export", "--recipe", "deit_tiny_int8", "-o", str(tmp_path / "out")]) == 0
    assert run(["eval", str(tmp_path / "out" / "model.fp32.onnx"), "--data", "cifar10", "--json"]) == 0
    import vitedge.models.weights as weights

    top1 = json.loads(capsys.readouterr().out)["top1"]
    said = re.search(r"top-1[^\n]*?([0-9]{2}\.[0-9]{2}) %", (weights.ZOO / "README.md").read_text())
    assert said and top1 == pytest.approx(float(said.group(1)), abs=0.02) and top1 >= 72.0
