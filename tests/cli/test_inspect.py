"""`vitedge inspect` through its entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests import tiny
from tests.bench.made import make_images
from tests.inspect import made
from tests.runtimes import files
from vitedge.artifact import Artifact, Manifest, hash_files
from vitedge.cli.inspect import collapse
from vitedge.cli.main import run
from vitedge.inspect.placement import Placed


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    return made.make_build(root / "made", make_images(root / "insects"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_build_folder_end_to_end(build: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(build), "--images", "6"]) == 0
    captured = capsys.readouterr()
    for words in ("blocks.0.norm1", "blocks.0.attn", "train images of insects", "Q/DQ left", "MatMulIntegerToFloat", "dB"):
        assert words in captured.out
    folder = here / "made.inspect"
    assert {path.name for path in folder.iterdir()} == {"inspect.json", "ranges.png", "attention.png", "sqnr.png"}
    for name in ("ranges.png", "attention.png", "sqnr.png"):
        with Image.open(folder / name) as image:
            image.load()
            assert image.size[0] == 1000 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    found = json.loads((folder / "inspect.json").read_text())
    norm = max(found["layernorm_inputs"]["layers"], key=lambda row: row["spread"])
    assert (norm["layer"], norm["widest_channel"], len(norm["low"])) == ("blocks.0.norm1", made.LOUD, made.EMBED)
    assert found["images"] == {"count": 6, "split": "train", "data": "insects", "seed": 0}
    (file,) = found["quantized"]
    assert file["sqnr"]["against"] == "model.fp32.onnx" and len(file["sqnr"]["nodes"]) == 8
    decibels = [row["sqnr_db"] for row in file["sqnr"]["nodes"]]
    assert decibels == sorted(decibels)
    assert file["placement"]["counts"]["int8"] == 6
    # Again into the same folder: a picture that is not drawn anew must not be taken for a new one.
    assert run(["inspect", str(build / "model.fp32.onnx"), "--images", "6", "-o", "made.inspect"]) == 0
    assert {path.name for path in folder.iterdir()} == {"inspect.json", "ranges.png", "attention.png"}


def test_json_alone_on_stdout_and_the_same_for_the_same_seed(build: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results: list[dict[str, Any]] = []
    for seed, folder in (("3", "a"), ("3", "b"), ("4", "c")):
        args = ["inspect", str(build / "model.int8_static.onnx"), "--images", "4", "--seed", seed, "-o", folder, "--no-pictures", "--json"]
        assert run(args) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["schema_version"] == 1 and result["pictures"] == [] and result.pop("folder") == folder
        assert json.loads((here / folder / "inspect.json").read_text())["model"] == result["model"]
        results.append(result)
    assert results[0] == results[1]
    assert results[0]["layernorm_inputs"] != results[2]["layernorm_inputs"]
    assert results[0]["model"]["scheme"] == "int8_static"


def test_without_data_one_line_and_nothing_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.write_vit(here / "m.onnx")
    assert run(["inspect", "m.onnx"]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == "" and len(lines) == 1 and "--data" in lines[0]
    assert not (here / "m.inspect").exists()


def test_foreign_graphs_say_what_they_lack(build: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = str(build.parent / "insects")
    recipe = {"name": "foreign", "model": {"img_size": tiny.SIZE}, "data": {"name": images}}
    recipe["preprocess"] = {"mean": list(tiny.CONTRACT.mean), "std": list(tiny.CONTRACT.std)}
    Path("foreign.yaml").write_text(yaml.safe_dump(recipe))
    files.write_qdq(Path("q.onnx"))
    assert run(["inspect", "q.onnx", "--data", images]) == 2
    assert "--recipe" in capsys.readouterr().err
    assert run(["inspect", "q.onnx", "--recipe", "foreign.yaml", "--images", "3"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no LayerNormalization nodes" in out and "no Softmax nodes" in out and "--against FP32.onnx" in out
    assert "products that run: 2 int8" in out
    assert [path.name for path in Path("q.inspect").iterdir()] == ["inspect.json"]


def test_an_ir_beside_its_float_parent(here: Path, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vitedge.runtimes._openvino_import import import_quietly

    openvino = import_quietly("openvino")
    fp32 = build / "model.fp32.onnx"
    openvino.save_model(openvino.convert_model(str(fp32)), "ir/model.xml", compress_to_fp16=False)
    assert run(["inspect", "ir", "--against", str(fp32), "--data", str(build.parent / "insects"), "--images", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (file,) = result["quantized"] or [None]
    assert file is not None and file["placement"]["runtime"].startswith("openvino")
    assert file["sqnr"]["logits"]["top1_agreement"] == 100.0
    compared = {row["layer"]: row["sqnr_db"] for row in file["sqnr"]["nodes"]}
    assert {"patch_embed.proj", "blocks.0.attn.q", "blocks.0.attn.proj", "head"} <= set(compared)
    assert all(value is None or value > 80 for value in compared.values())  # the same float arithmetic
    assert result["layernorm_inputs"]["layers"][0]["layer"] == "blocks.0.norm1"


def test_errors_are_one_line(build: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = str(build.parent / "insects")
    Path("mine").mkdir()
    Path("mine/attention.png").write_bytes(b"a picture of mine")
    Path("broken.onnx").write_bytes(b"no model")
    cases = [
        ([str(build), "-o", "mine"], 2, "other files"),
        ([str(build), "-o", "broken.onnx"], 2, "a folder"),
        (["broken.onnx", "--data", images], 1, "ONNX"),
        ([str(build), "--against", str(build / "model.int8_static.onnx")], 1, "float ONNX"),
        ([str(build), "--against", "absent.onnx"], 2, "absent.onnx"),
        ([str(build), "--images", "0"], 2, "images"),
        (["absent"], 2, "absent"),
    ]
    for args, code, word in cases:
        assert run(["inspect", *args]) == code, args
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert captured.out == "" and len(lines) == 1 and word in lines[0], (args, lines)
    assert Path("mine/attention.png").read_bytes() == b"a picture of mine"


def test_as_a_program(build: Path, here: Path) -> None:
    command = [sys.executable, "-m", "vitedge", "inspect", str(build / "model.fp32.onnx"), "--images", "4", "--no-pictures", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quantized"] == []
    assert "written to model.fp32.inspect" in done.stderr


def test_blocks_that_are_alike_are_one_row() -> None:
    def product(layer: str, runs_as: str = "int8") -> Placed:
        return Placed(layer, layer, "Q/DQ", runs_as, "kernel", 1)

    rows = collapse((product("blocks.0.mlp.fc1"), product("blocks.1.mlp.fc1"), product("blocks.2.mlp.fc1", "float"), product("head")))
    assert [(name, len(alike)) for name, alike in rows] == [("blocks.*.mlp.fc1", 2), ("blocks.2.mlp.fc1", 1), ("head", 1)]


def write_recipe(steps: list[Any], **changes: Any) -> str:
    """`mine.yaml` here: a two-block ViT of 16 dimensions, for which there are neither data nor weights."""
    model = {"arch": "deit_tiny_patch16_224", "img_size": 8, "patch_size": 4, "weights": "none"}
    model["options"] = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    Path("mine.yaml").write_text(yaml.safe_dump({"model": model, "steps": steps, **changes}))
    return "./mine.yaml"


TRAIN = {"train": {"steps": 2}}


def test_a_recipe_before_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--recipe", write_recipe(["smooth", {"lsq": {"weight_bits": 4}}, TRAIN])]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "mine: deit_tiny_patch16_224 at 8 px",
        "images: random, seed 0; no data set 'cifar10' is at hand",
        "the model as it starts",
        "blocks.*.attn, 2 times",
        "whole model",
        "steps.0 smooth: done smooth changes neither weights nor multiply-accumulates nor bytes",
        "steps.1 lsq, before and after",
        "lsq: weights x1, multiply-accumulates x1, bytes x0.",
        "steps.2 train: not trained",
    ):
        assert words in out, (words, out)
    assert [path.name for path in here.iterdir() if path.name != "cache"] == ["mine.yaml"]
    assert run(["inspect", "--recipe", "./mine.yaml", "--all"]) == 0
    out = capsys.readouterr().out
    assert "blocks.0.attn.qkv" in out and "blocks.1.mlp.fc2" in out and ", 2 times" not in out


def test_a_recipe_as_json_alone_on_stdout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_recipe([{"diffq": {"min_elements": 1}}, TRAIN])
    assert run(["inspect", "--recipe", name, "--seed", "5", "--json", "-o", "kept"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["schema_version"] == 1 and result["recipe"] == "mine" and result["error"] is None
    assert any("random, seed 5" in sentence for sentence in result["about"])
    (diffq, train) = result["steps"]
    assert diffq["after"]["total"]["bytes"] < result["start"]["total"]["bytes"] and train["outcome"] == "not trained"
    assert diffq["after"]["modules"]["blocks.0.mlp.fc1"]["params"] == 16 * 64 + 64
    assert "written to kept" in captured.err and json.loads(Path("kept/inspect.json").read_text()) == result
    assert [path.name for path in Path("kept").iterdir()] == ["inspect.json"]


def test_a_shipped_recipe_with_the_embedded_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--recipe", "deit_tiny_int8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["about"][0] == "weights: deit_tiny_distilled_patch4_32_cifar10.safetensors"
    assert "classes: 10, as the weights have" in result["about"]
    total = result["start"]["total"]
    assert 5e6 < total["params"] < 6e6 and total["bytes"] == 4 * total["params"] and total["macs"] > 64 * 5e6 and result["steps"] == []


def test_a_technique_that_refuses_is_the_exit_code(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_recipe(["lsq", "lsq", "smooth", TRAIN])
    assert run(["inspect", "--recipe", name, "--json"]) == 2
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [step["outcome"] for step in result["steps"]] == ["done", "refused"]
    assert result["error"]["exit_code"] == 2 and "expected a model in float" in result["error"]["message"]
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: {result['error']['message']}"]


def test_questions_that_make_no_sense_are_one_line(build: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_recipe([])
    Path("wrong.yaml").write_text(yaml.safe_dump({"steps": [{"smooth": {"alfa": 0.5}}]}))
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("of mine")
    cases = [
        ([], "MODEL, or --recipe"),
        (["--recipe", "deit_tinny_int8"], "deit_tiny_int8"),
        (["--recipe", "./wrong.yaml"], "alpha"),
        (["--recipe", name, "--against", "fp32.onnx"], "--against"),
        (["--recipe", name, "-o", "mine"], "other files"),
        (["--recipe", name, "--weights", "absent.safetensors"], "absent.safetensors"),
        (["--recipe", name, "--data", "./absent"], "absent"),
        ([str(build), "--all"], "--all"),
        ([str(build), "--weights", "none"], "--weights"),
    ]
    for args, word in cases:
        assert run(["inspect", *args]) == 2, args
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert captured.out == "" and len(lines) == 1 and word in lines[0], (args, lines)


def test_scores_of_a_pruned_build_are_drawn(build: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = made.make_build(here / "pruned", build.parent / "insects")
    path = root / "checkpoint.safetensors"
    path.write_bytes(b"weights")
    histogram = {"mlp": {"edges": [-3.0, -2.0, -1.0], "counts": [1200, 1800], "kept": [0, 1800]}}
    notes = {"steps": [{"train": {}}, {"prune": {"threshold": 0.01, "histogram": histogram}}]}
    manifest = Manifest.load(root)
    manifest.artifacts[path.name] = Artifact(path.name, "checkpoint", "fp32", (path,), hash_files([path]), 7, notes=notes)
    manifest.save()
    assert run(["inspect", "pruned", "--images", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "weights that pruning scored" in out and "1 prune" in out and "1,200 (40.0 %)" in out
    with Image.open("pruned.inspect/importance.png") as image:
        image.load()
        assert image.size[0] == 1000
    result = json.loads(Path("pruned.inspect/inspect.json").read_text())
    assert "importance.png" in result["pictures"] and result["importance"]["reason"] is None
    assert [(one["unit"], one["removed"]) for one in result["importance"]["histograms"]] == [("mlp", 1200)]
    # A file outside of a build has no scores, and the picture of the build must not be taken for its own.
    (here / "alone.onnx").write_bytes((build / "model.fp32.onnx").read_bytes())
    assert run(["inspect", "alone.onnx", "--data", str(build.parent / "insects"), "--images", "2", "-o", "pruned.inspect"]) == 0
    assert "not in a build folder" in capsys.readouterr().out and not Path("pruned.inspect/importance.png").exists()
