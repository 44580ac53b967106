"""A recipe's steps through the command line: a teacher, a student it distils into, and what lies in the build folder then."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file

from tests.data.made import cifar100_members, tar_of, write_images
from tests.recipes_for_tests import write_recipe
from vitedge.artifact import Manifest
from vitedge.cli.main import run
from vitedge.models.build import load_checkpoint
from vitedge.models.heads import head_logits
from vitedge.train.watch import read_metrics

TRAIN = {"batch_size": 16, "lr": 2e-3, "precision": "fp32", "shift": 1, "views": 2, "checkpoint_every": 2}
TEACHER = {"arch": "resnet18", "img_size": 16, "stem": "small", "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}
STUDENT = {"arch": "deit_tiny_distilled_patch16_224", "img_size": None, "patch_size": 4}
STUDENT["options"] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
OWN = {"mean": None, "std": None}
DISTILL = {"distill": {"teacher": "teacher", "kind": "soft", "weight": 0.5, "cache": True}}


def recipe_named(folder: Path, name: str, data: Path, model: dict[str, Any], steps: list[Any]) -> Path:
    path = write_recipe(folder, data, model={**model, "weights": "none"}, steps=steps, preprocess=OWN, quantize={})
    return path.rename(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Path:
    """A folder of build folders with a teacher and a student, and their recipes beside."""
    folder = tmp_path_factory.mktemp("builds")
    teacher = recipe_named(folder, "teacher", colours, TEACHER, [{"train": {**TRAIN, "steps": 30, "optimizer": "sgd", "lr": 0.05}}])
    assert run(["train", "--recipe", str(teacher), "-o", str(folder / "teacher")]) == 0
    steps = [DISTILL, {"train": {**TRAIN, "steps": 24, "patch_drop": 0.5, "ema": 0.8}}, {"train": {**TRAIN, "steps": 10, "drop_path": 0.1}}]
    student = recipe_named(folder, "student", colours, STUDENT, steps)
    assert run(["train", "--recipe", str(student), "-o", str(folder / "student")]) == 0
    return folder


def test_both_heads_and_their_average_are_reported(builds: Path) -> None:
    notes = Manifest.load(builds / "student").artifacts["checkpoint.safetensors"].notes
    assert notes["test"]["images"] == 36 and notes["test"]["top1"] > 80.0
    assert {"top1", "top1_class", "top1_distill", "loss"} <= set(notes["test"])
    distil, first, second = (next(iter(step.values())) for step in notes["steps"])
    assert distil["teacher"]["arch"] == "resnet18" and first["steps"] == 24 and second["steps"] == 10
    assert "top1_distill" in second["history"][-1]


def test_the_folder_holds_metrics_and_curves(builds: Path) -> None:
    lines = read_metrics(builds / "student" / "metrics.jsonl")
    assert {line["stage"] for line in lines} == {0, 1}
    assert [line["step"] for line in lines if line["stage"] == 0 and "loss" in line] == [10, 20, 24]
    assert all({"seconds", "lr", "images_per_s", "data_share"} <= set(line) for line in lines if "loss" in line)
    with Image.open(builds / "student" / "curves.png") as picture:
        assert picture.width > 300
    assert not (builds / "student" / ".work").exists()


def test_size_and_figures_came_from_the_data(builds: Path) -> None:
    resolved = yaml.safe_load((builds / "student" / "recipe.yaml").read_text())
    assert resolved["model"]["img_size"] == 16 and all(0 < value < 1 for value in resolved["preprocess"]["mean"])


def test_the_export_answers_with_the_average_of_both_heads(builds: Path) -> None:
    import onnxruntime

    assert run(["export", "--recipe", str(builds / "student.yaml"), "-o", str(builds / "student")]) == 0
    manifest = Manifest.load(builds / "student")
    model, _ = load_checkpoint(manifest.artifacts["checkpoint.safetensors"].path)
    x_BCHW = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    with torch.inference_mode():
        heads = {name: logits.numpy() for name, logits in head_logits(model, torch.from_numpy(x_BCHW)).items()}
    found = onnxruntime.InferenceSession(manifest.artifacts["model.fp32.onnx"].path).run(None, {"pixels": x_BCHW})[0]
    assert np.abs(found - (heads["class"] + heads["distill"]) / 2).max() < 1e-4
    assert np.abs(heads["class"] - heads["distill"]).max() > 0.01


def test_a_second_training_is_reused(builds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--recipe", str(builds / "student.yaml"), "-o", str(builds / "student"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["action"] == "reuse"


@pytest.mark.parametrize("data", ["photographs", "cifar100"])
def test_other_data_train_by_the_same_command(
    tmp_path: Path, colours: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only `data` changes: classes, mean, deviation and the images' own sizes are found, the validation part is made."""
    if data == "cifar100":
        (tmp_path / "data").mkdir()
        tar_of(tmp_path / "data" / "cifar-100-binary.tar.gz", cifar100_members()[0])
        monkeypatch.setenv("VITEDGE_DATA", str(tmp_path / "data"))
        classes, option = 100, "cifar100"
    else:
        sizes = ((20, 31), (9, 9), (40, 18))
        write_images(tmp_path / data, {"train/cat": 20, "train/dog": 20, "test/cat": 4, "test/dog": 4}, sizes)
        classes, option = 2, str(tmp_path / data)
    steps = [{"train": {**TRAIN, "views": 0, "steps": 3, "randaugment": 1, "erase": 0.5, "cutmix": 1.0}}]
    recipe = recipe_named(tmp_path, "any", colours, {**TEACHER, "img_size": 16}, steps)
    assert run(["train", "--recipe", str(recipe), "-o", str(tmp_path / "out"), "--data", option, "--json"]) == 0
    checkpoint = json.loads(capsys.readouterr().out)["checkpoint"]
    assert len(checkpoint["labels"]) == classes and checkpoint["notes"]["test"]["images"] == (100 if classes == 100 else 8)
    contract = json.loads(checkpoint["preprocessing"])
    assert contract["size"] == 16 and contract["mean"] != [0.485, 0.456, 0.406]


def test_a_technique_that_nothing_follows_is_refused(builds: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [{"train": {**TRAIN, "steps": 2}}, {"distill": {"teacher": "teacher"}}]
    recipe = recipe_named(builds, "late", colours, STUDENT, steps)
    assert run(["train", "--recipe", str(recipe), "-o", str(builds / "late")]) == 2
    assert "steps.1: expected a `train` step after `distill`" in capsys.readouterr().err


@pytest.mark.parametrize("after", [[], [{"fq_vit": {"images": 100}}]], ids=["train", "fq_vit"])
def test_the_last_weights_are_kept_where_training_comes_last(builds: Path, colours: Path, after: list[dict[str, Any]]) -> None:
    out = builds / f"last{len(after)}"
    recipe = recipe_named(builds, out.name, colours, STUDENT, [{"train": {**TRAIN, "steps": 2}}, *after])
    assert run(["train", "--recipe", str(recipe), "-o", str(out)]) == 0
    assert [technique for technique, _ in load_checkpoint(out / "checkpoint.safetensors")[1].structure] == [
        name for step in after for name in step
    ]
    assert (out / "checkpoint.last.safetensors").is_file() == (not after)


def test_integers_are_not_trained_on(builds: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_named(builds, "integers", colours, STUDENT, [{"fq_vit": {"images": 100}}, {"train": {**TRAIN, "steps": 2}}])
    assert run(["train", "--recipe", str(recipe), "-o", str(builds / "integers")]) == 2
    assert "steps.1: expected a float model to train, found one that an earlier step quantized" in capsys.readouterr().err
    assert not (builds / "integers" / "checkpoint.safetensors").exists()


def test_the_float_twin_has_no_gates_and_they_are_not_quantized(builds: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["gates", {"train": {**TRAIN, "steps": 2}}, "lsq"]
    recipe = recipe_named(builds, "gated", colours, STUDENT, steps)
    assert run(["train", "--recipe", str(recipe), "-o", str(builds / "gated")]) == 2
    assert "lsq: blocks.0.attn.qkv: expected a layer without gates" in capsys.readouterr().err
    assert not (builds / "gated" / "checkpoint.safetensors").exists()
    # Written before the technique acted: the model as it would have been saved then.
    twin, header = load_checkpoint(builds / "gated" / "checkpoint.float.safetensors")
    assert header.structure == () and not any(name.endswith(".a") for name in twin.state_dict())


def test_another_teacher_is_another_student(builds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(builds / "student", tmp_path / "student")
    shutil.copytree(builds / "teacher", tmp_path / "teacher")

    def planned() -> tuple[str, str]:
        assert run(["train", "--recipe", str(builds / "student.yaml"), "-o", str(tmp_path / "student"), "--dry-run", "--json"]) == 0
        (stage,) = json.loads(capsys.readouterr().out)["stages"]
        return stage["action"], stage["reason"]

    assert planned() == ("reuse", "nothing changed")
    teacher = tmp_path / "teacher" / "checkpoint.safetensors"
    content = bytearray(teacher.read_bytes())
    content[-1] ^= 1
    teacher.write_bytes(content)
    assert planned() == ("run", "files changed")
    teacher.unlink()
    assert run(["train", "--recipe", str(builds / "student.yaml"), "-o", str(tmp_path / "student")]) == 2
    assert "vitedge train --recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_its_second_step_it_ends_with_the_same_weights(builds: Path, tmp_path: Path, colours: Path) -> None:
    (tmp_path / "teacher").symlink_to(builds / "teacher")
    command = ["train", "--recipe", str(builds / "student.yaml"), "-o", str(tmp_path / "student")]
    running = subprocess.Popen([sys.executable, "-m", "vitedge", *command], stderr=subprocess.DEVNULL)
    state, deadline = tmp_path / "student" / ".work" / "step2" / "train.state.pt", time.monotonic() + 120
    while not state.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    running.kill()
    running.wait()
    assert not (tmp_path / "student" / "checkpoint.safetensors").exists(), "it was too quick to be killed"
    assert run(command) == 0
    expected, found = (load_file(folder / "student" / "checkpoint.safetensors") for folder in (builds, tmp_path))
    assert all(np.array_equal(found[name], tensor) for name, tensor in expected.items())
    steps = [line["step"] for line in read_metrics(tmp_path / "student" / "metrics.jsonl") if line["stage"] == 1 and "loss" in line]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("technique", ["gates", None])
def test_what_costs_accuracy_on_purpose_ends_with_its_last_weights(tmp_path: Path, colours: Path, technique: str | None) -> None:
    """A rate that does the model no good: its best weights are early ones, which have learned little of what goes."""
    train = {"train": {**TRAIN, "steps": 10, "lr": 0.05, "warmup": 0.0, "views": 0, "evaluate_every": 1}}
    recipe = recipe_named(tmp_path, "ruined", colours, STUDENT, [technique, train] if technique else [train])
    assert run(["train", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 0
    notes = Manifest.load(tmp_path / "out").artifacts["checkpoint.safetensors"].notes["steps"][-1]["train"]
    top1 = [one["top1"] for one in notes["history"]]
    assert top1.index(max(top1)) < len(top1) - 1  # else this would show nothing
    assert notes["validation_top1"] == round(top1[-1] if technique else max(top1), 2)
    kept, last = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("checkpoint", "checkpoint.last"))
    assert all(np.array_equal(kept[name], last[name]) for name in kept) == (technique is not None)


def test_gates_that_nothing_trained_are_not_cut_by_and_no_patience_ends_their_training(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"train": {**TRAIN, "steps": 2, "views": 0}}
    untaught = recipe_named(tmp_path, "untaught", colours, STUDENT, ["gates", {"prune": {"score": "gates"}}, train])
    assert run(["train", "--recipe", str(untaught), "-o", str(tmp_path / "a")]) == 2
    assert "expected a `train` step between `gates` and `prune`" in capsys.readouterr().err
    impatient = recipe_named(tmp_path, "impatient", colours, STUDENT, ["gates", {"train": {**train["train"], "patience": 3}}])
    assert run(["train", "--recipe", str(impatient), "-o", str(tmp_path / "b")]) == 2
    assert "steps.1.patience: expected 0 beside `gates`" in capsys.readouterr().err
