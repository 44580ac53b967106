"""Embedding a model: its checkpoint and the activation ranges that its static int8 is built from without data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.recipes_for_tests import write_recipe
from vitedge.artifact import Manifest, hash_files
from vitedge.cli.main import run
from vitedge.models import weights
from vitedge.models.build import CheckpointMeta, load_checkpoint, read_meta, save_checkpoint
from vitedge.models.embed import embed
from vitedge.preprocess import Preprocessing

STATIC = "model.int8_static.onnx"
SHALLOW = {"depth": 2}
META = CheckpointMeta("test_vit", 16, 8, 3, Preprocessing(size=16).to_json(), ("blue", "green", "red"), options=SHALLOW)


@dataclass(frozen=True)
class Zoo:
    """An embedded model of the tests' own, the checkpoint it came from, and where its data lies and can be hidden."""

    trained: Path
    path: Path
    ranges: Path
    data: Path
    hidden: Path
    recipe: Path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Zoo:
    root = tmp_path_factory.mktemp("zoo")
    data, folder = root / "data", root / "build"
    shutil.copytree(colours, data)
    recipe = write_recipe(
        root,
        data,
        model={"arch": "test_vit", "img_size": 16, "patch_size": 8, "weights": "builtin", "options": SHALLOW},
        steps=[],
        quantize={},
    )
    folder.mkdir()
    shutil.copy(recipe, folder / "recipe.yaml")
    torch.manual_seed(0)
    save_checkpoint(folder / "checkpoint.safetensors", META.create(), META)
    made = Zoo(folder / "checkpoint.safetensors", root / "tiny.safetensors", root / "tiny.ranges.json", data, root / "hidden", recipe)
    embed(folder, made.path, made.ranges)
    content = yaml.safe_load(recipe.read_text())
    content["quantize"] = {"schemes": ["onnxruntime.int8_static", "openvino.int8_static"]}
    recipe.write_text(yaml.safe_dump(content))
    return made


@pytest.fixture
def builtin(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    monkeypatch.setattr(weights, "BUILTIN", zoo.path)
    monkeypatch.setattr(weights, "BUILTIN_RANGES", zoo.ranges)
    return zoo


@pytest.fixture
def without_data(builtin: Zoo) -> Iterator[Zoo]:
    builtin.data.rename(builtin.hidden)
    yield builtin
    builtin.hidden.rename(builtin.data)


def test_the_checkpoint_is_halved_and_keeps_its_header(zoo: Zoo) -> None:
    assert read_meta(zoo.path) == META
    assert 1.9 < zoo.trained.stat().st_size / zoo.path.stat().st_size < 2.05
    trained, embedded = load_checkpoint(zoo.trained)[0].state_dict(), load_checkpoint(zoo.path)[0].state_dict()
    assert all(torch.equal(tensor.half().float(), embedded[name]) for name, tensor in trained.items())


def test_the_ranges_say_what_they_are_of(zoo: Zoo) -> None:
    content = json.loads(zoo.ranges.read_text())
    assert content["checkpoint_sha256"] == hash_files([zoo.path])
    asked = content["made_with"]
    assert (asked["method"], asked["percentile"], asked["images"], asked["seed"]) == ("percentile", 99.999, 256, 0)
    assert asked["preprocessing"] == json.loads(META.preprocessing)
    assert content["calibration"] == {"images": 96, "seed": 0, "data": "data", "split": "train"}  # all there are
    assert content["data_sha256"] and content["tools"].keys() == {"onnx", "onnxruntime"}


def test_without_data_static_int8_is_the_file_that_the_data_gives(builtin: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrated, stored = tmp_path / "calibrated", tmp_path / "stored"
    only = tmp_path / "small.yaml"
    only.write_text(yaml.safe_dump({**yaml.safe_load(builtin.recipe.read_text()), "quantize": {"schemes": ["onnxruntime.int8_static"]}}))
    assert run(["export", "--recipe", str(only), "-o", str(calibrated)]) == 0
    builtin.data.rename(builtin.hidden)
    try:
        assert run(["export", "--recipe", str(builtin.recipe), "-o", str(stored)]) == 0
        said = capsys.readouterr().err
        assert "skip   quantize openvino.int8_static: needs calibration images; run `vitedge export --recipe small --data PATH`" in said
        assert "without images: activation ranges stored with the model, of 96 train images of data" in said
        assert run(["export", "--recipe", str(builtin.recipe), "-o", str(stored), "--dry-run", "--json"]) == 0
        actions = {stage["stage"]: stage["action"] for stage in json.loads(capsys.readouterr().out)["stages"]}
        assert actions["quantize onnxruntime.int8_static"] == "reuse"
    finally:
        builtin.hidden.rename(builtin.data)
    a, b = (Manifest.load(folder).artifacts[STATIC] for folder in (calibrated, stored))
    assert a.sha256 == b.sha256 and "openvino.int8_static" not in Manifest.load(stored).artifacts
    used = {"images": 96, "seed": 0, "data": "data", "split": "train"}
    assert a.notes["calibration"] == {"stored": False, **used} and b.notes["calibration"] == {"stored": True, **used}
    # With the data back, its images are used.
    assert run(["export", "--recipe", str(builtin.recipe), "-o", str(stored), "--dry-run", "--json"]) == 0
    assert [stage["action"] for stage in json.loads(capsys.readouterr().out)["stages"]] == ["reuse", "run", "run", "run"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantize": {"schemes": [{"onnxruntime.int8_static": {"percentile": 99.9}}]}}, "what the recipe asks: percentile: 99.999, 99.9)"),
        ({"quantize": {"calibration": {"images": 32}, "schemes": ["onnxruntime.int8_static"]}}, "images: 256, 32)"),
        ({"preprocess": {"interpolation": "box"}, "quantize": {"schemes": ["onnxruntime.int8_static"]}}, "preprocessing: "),
    ],
)
def test_what_the_ranges_are_not_for_still_needs_images(
    without_data: Zoo, changes: dict[str, object], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(without_data.recipe.read_text()), **changes}))
    assert run(["export", "--recipe", str(recipe), "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    stage = json.loads(capsys.readouterr().out)["stages"][-1]
    assert stage["action"] == "skip" and stage["reason"].startswith("needs calibration images (") and reason in stage["reason"]
    assert stage["reason"].endswith("; run `vitedge export --recipe small --data PATH`, or set VITEDGE_DATA")


def test_ranges_of_another_checkpoint_end_the_build_in_one_line(
    without_data: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.ranges.json"
    foreign.write_text(without_data.ranges.read_text().replace(hash_files([without_data.path]), "f" * 64))
    monkeypatch.setattr(weights, "BUILTIN_RANGES", foreign)
    assert run(["export", "--recipe", str(without_data.recipe), "-o", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "foreign.ranges.json: expected ranges of the checkpoint beside it" in lines[0]


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "vitedge.models.embed", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "recipe.yaml" in done.stderr and "Traceback" not in done.stderr
