"""`vitedge eval` through its entry point."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests import tiny
from tests.bench.made import expected_top1, make_build, make_images, write_profile
from vitedge.cli.main import run


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return ["--device", str(write_profile(tmp_path / "board.yaml"))]


def test_one_file_with_data_named(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    images = make_images(tmp_path / "insects")
    tiny.write_tiny_onnx(Path("m.onnx"))
    assert run(["eval", "m.onnx", *board, "--data", str(images), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert math.isclose(result["top1"], expected_top1(images))
    assert result["images"] == 24
    assert (result["runtime"], result["device"], result["split"]) == ("onnxruntime", "board", "test")
    assert run(["eval", "m.onnx", *board, "--data", str(images)]) == 0
    out = capsys.readouterr().out
    assert f"top-1 {expected_top1(images):.2f} %" in out
    assert "24 test images of insects" in out


def test_gate_exits_3_after_printing(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    images = make_images(tmp_path / "insects")
    root = make_build(tmp_path / "tiny", data=images)
    file = str(root / "model.fp32.onnx")
    limit = expected_top1(images) + 1
    assert run(["eval", file, *board, "--min-top1", str(limit), "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 24
    assert "error: model.fp32.onnx" in captured.err
    assert run(["eval", file, *board, "--min-top1", str(limit - 2)]) == 0


def test_validation_split_and_samples(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    images = make_images(tmp_path / "insects")
    tiny.write_tiny_onnx(Path("m.onnx"))
    assert run(["eval", "m.onnx", *board, "--data", str(images), "--samples", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 5
    assert run(["eval", "m.onnx", *board, "--data", str(images), "--split", "validation", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "validation images" in result["data"]
    assert result["images"] < 12


def test_errors_are_one_line(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    images = make_images(tmp_path / "insects")
    root = make_build(tmp_path / "tiny", data=images)
    tiny.write_tiny_onnx(Path("m.onnx"))
    tiny.write_tiny_onnx(Path("foreign.onnx"), preprocessing=False)
    cases = [
        (["m.onnx"], 2, "--data"),
        (["foreign.onnx", "--data", str(images)], 1, "preprocessing contract"),
        (["m.onnx", "--data", str(images), "--precision", "fp16"], 4, "fp16"),
        (["m.onnx", "--data", str(images), "--runtime", "pytorch"], 2, "pytorch"),
        ([str(root)], 2, "one model file"),
        (["m.onnx", "--data", "cifar11"], 2, "cifar10"),
    ]
    for args, want, word in cases:
        code = run(["eval", *args, *board])
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert (code, word in lines[-1]) == (want, True), captured.err
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert captured.out == ""
