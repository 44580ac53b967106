"""The guard on a model with one layer that int8 ruins: it is found and left in float, and whatever happens a file is whole or not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.guard.made import HOSTILE, LAYERS, guard_job, pictures, write_folder, write_hostile
from tests.recipes_for_tests import write_recipe
from vitedge import plugins
from vitedge.artifact import Artifact, Manifest, hash_files
from vitedge.cli.main import run
from vitedge.errors import FileProblems, InputError, UsageError
from vitedge.evaluate import evaluate
from vitedge.guard import MET, NO_LAYER_LEFT, TIME_UP, GuardJob, can_guard, guard
from vitedge.guard.judge import PROVIDERS
from vitedge.guard.layers import find_layers, open_float
from vitedge.recipe import load_recipe, recipe_from_plain
from vitedge.runtimes import Target

SCHEMES = [("onnxruntime", "int8_static"), ("onnxruntime", "int8_dynamic"), ("openvino", "int8_static")]
IDS = [".".join(pair) for pair in SCHEMES]
LIMIT = {"max_top1_drop": 8.0}


def found_in(artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = artifact.notes["guard"]
    json.dumps(found, allow_nan=False)
    return found


@pytest.mark.parametrize("pair", SCHEMES, ids=IDS)
def test_the_hostile_layer_alone_stays_in_float(pair: tuple[str, str], tmp_path: Path) -> None:
    asked = guard_job(tmp_path, *pair, LIMIT)
    artifact = guard(asked)
    found = found_in(artifact)
    assert found["float_layers"] == [HOSTILE] and found["quantized_layers"] == 3
    assert found["met"] and found["stopped"] == MET and found["top1_drop"] <= 8.0 < found["trials"][0]["top1_drop"]
    assert found["top1_drop_interval"][0] < found["top1_drop"] < found["top1_drop_interval"][1]
    assert found["images"] == 200 and found["top1_fp32"] == 100.0 and pair[0] in found["runtime"]
    assert "16.0 of 200 images" in found["cautions"][0]
    # The table: the hostile layer first, by far, and the only one in float.
    rows = found["layers"]
    assert sorted(row["name"] for row in rows) == sorted(LAYERS)
    assert [row["name"] for row in rows if row["decision"] == "float"] == [HOSTILE] == [rows[0]["name"]]
    assert rows[0]["sqnr_db"] < 10 < min(row["sqnr_db"] for row in rows[1:])
    assert rows[0]["loss_change"] > 10 * max(abs(row["loss_change"]) for row in rows[1:])
    # The file on disk is the one that the notes tell of.
    assert artifact.notes["node_counts"]["int8"] == 3 and artifact.sha256 == hash_files(artifact.files)
    expected = "openvino.int8_static" if pair[0] == "openvino" else f"model.{pair[1]}.onnx"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [expected] == [artifact.name]
    session = plugins.load("runtimes", pair[0]).load(artifact, Target(PROVIDERS[pair[0]]))
    order = np.random.default_rng(0).permutation(200)  # a dynamic file's ranges are those of a batch: the same batches
    quality = evaluate(session, [asked.validation.images[i] for i in order], asked.validation.labels[order], tiny.CONTRACT)
    assert 100.0 - quality.top1 == pytest.approx(found["top1_drop"])


@pytest.mark.parametrize("pair", SCHEMES, ids=IDS)
def test_a_limit_met_at_once_leaves_the_librarys_own_file(pair: tuple[str, str], tmp_path: Path) -> None:
    asked = guard_job(tmp_path, *pair, LIMIT, outlier=1.0)
    found = found_in(guard(asked))
    plain = plugins.load("quantize", pair[0]).quantize(replace(asked.job, folder=tmp_path / "plain"))
    files = [path.relative_to(tmp_path / "plain") for path in plain.files]
    assert hash_files([tmp_path / "out" / name for name in files]) == plain.sha256
    assert found["float_layers"] == [] == found["layers"] and found["stopped"] == MET and len(found["trials"]) == 1


def test_the_file_is_that_of_the_same_exclusion_by_hand(tmp_path: Path) -> None:
    asked = guard_job(tmp_path, "onnxruntime", "int8_static", LIMIT)
    artifact = guard(asked)
    by_hand = guard_job(tmp_path, "onnxruntime", "int8_static", LIMIT, exclude=(HOSTILE,)).job
    # Ranges measured for the first file are used again: they must be the ones that calibration finds.
    assert plugins.load("quantize", "onnxruntime").quantize(replace(by_hand, folder=tmp_path / "plain")).sha256 == artifact.sha256
    assert artifact.notes["settings"]["exclude"] == [HOSTILE]


def test_the_same_guard_twice_is_the_same(tmp_path: Path) -> None:
    notes = []
    for name in ("a", "b"):
        artifact = guard(guard_job(tmp_path / name, "onnxruntime", "int8_static", {**LIMIT, "images": 120}))
        notes.append({**found_in(artifact), "seconds": 0, "sha256": artifact.sha256})
    assert notes[0] == notes[1] and notes[0]["images"] == 120


def test_without_time_the_first_file_is_written_and_says_why(tmp_path: Path) -> None:
    artifact = guard(guard_job(tmp_path, "onnxruntime", "int8_static", {**LIMIT, "minutes": 0}))
    found = found_in(artifact)
    assert found["stopped"] == TIME_UP and not found["met"] and found["top1_drop"] > 8.0
    assert found["float_layers"] == [] == found["layers"] and artifact.path.is_file()


def test_time_that_ends_while_layers_are_ranked_is_kept_to(tmp_path: Path) -> None:
    class Hands:
        """A clock that stands still until the ranking begins, then jumps ten minutes at each look."""

        now, running = 0.0, False

        def __call__(self) -> float:
            self.now += 600.0 * self.running
            return self.now

    hands = Hands()

    def watch(done: float, total: float, text: str = "") -> None:
        assert 0 <= done <= total
        hands.running = hands.running or text.startswith("sensitivity of layer 1 ")

    asked = guard_job(tmp_path, "onnxruntime", "int8_static", {**LIMIT, "minutes": 10})
    found = found_in(guard(replace(asked, job=replace(asked.job, progress=watch), now=hands)))
    assert found["stopped"] == TIME_UP and len(found["trials"]) == 1
    # One layer's loss was measured, the worst one's by SQNR; the others follow by SQNR.
    assert [row["loss_change"] is None for row in found["layers"]] == [False, True, True, True]
    assert found["layers"][0]["name"] == HOSTILE
    assert [row["sqnr_db"] for row in found["layers"]] == sorted(row["sqnr_db"] for row in found["layers"])


def test_where_no_layer_is_left_the_best_is_written(tmp_path: Path) -> None:
    keep = ("/mlp/fc2/*", "/patch_embed/*", "/head/*")
    found = found_in(guard(guard_job(tmp_path, "onnxruntime", "int8_static", LIMIT, exclude=keep)))
    assert found["stopped"] == NO_LAYER_LEFT and not found["met"] and found["quantized_layers"] == 1
    assert [row["name"] for row in found["layers"]] == [HOSTILE]


def test_an_interrupted_guard_leaves_what_was_there(tmp_path: Path) -> None:
    asked = guard_job(tmp_path, "onnxruntime", "int8_static", LIMIT)

    def interrupt(done: float, total: float, text: str = "") -> None:
        if text.startswith("file 2"):
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.int8_static.onnx").write_text("from before", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        guard(replace(asked, job=replace(asked.job, progress=interrupt)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.int8_static.onnx"]
    assert (tmp_path / "out" / "model.int8_static.onnx").read_text(encoding="utf-8") == "from before"


def test_a_later_file_that_fails_ends_the_search_with_the_best_before_it(tmp_path: Path) -> None:
    asked = guard_job(tmp_path, "onnxruntime", "int8_static", LIMIT)

    def fail(done: float, total: float, text: str = "") -> None:
        if text.startswith("file 2"):
            raise InputError("the library", expected="a model", found="one it does not like", fix="see")

    artifact = guard(replace(asked, job=replace(asked.job, progress=fail)))
    found = found_in(artifact)
    assert found["stopped"].startswith("failed: the library: expected a model") and not found["met"]
    assert artifact.path.is_file() and len(found["layers"]) == 4


def test_what_cannot_be_judged_is_refused_and_nothing_written(tmp_path: Path) -> None:
    asked = guard_job(tmp_path, "onnxruntime", "int8_static", LIMIT)
    cases: list[tuple[type[Exception], str, GuardJob]] = [
        (InputError, "images", replace(asked, validation=replace(asked.validation, images=[], labels=np.zeros(0, np.int64)))),
        (InputError, "at most 4 classes", replace(asked, validation=replace(asked.validation, labels=np.full(200, 9)))),
        (UsageError, "calibration images", replace(asked, job=replace(asked.job, calibration=None))),
        (
            UsageError,
            "preprocessing contract",
            replace(asked, job=replace(asked.job, source=replace(asked.job.source, preprocessing=None))),
        ),
    ]
    for kind, message, wrong in cases:
        with pytest.raises(kind, match=message):
            guard(wrong)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`quantize` of the hostile model with images of its own, 60 of which are the validation part."""
    folder = tmp_path_factory.mktemp("cli")
    source = write_hostile(folder / "hostile.onnx")
    data = write_folder(folder / "data", pictures(source, 600, seed=2))
    return ["quantize", str(source), "--data", str(data), "--scheme", "onnxruntime.int8_static", "--images", "32"]


def test_the_command_line_tells_every_layer_and_why_it_stopped(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--max-top1-drop", "5", "-o", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)["artifacts"][0]["guard"]
    assert found["met"] and found["float_layers"] == [HOSTILE] and found["images"] == 60
    modules = ("patch", "fc1", "fc2", "head")  # that the weights are named after
    for word in (*modules, "SQNR", "loss change", "float", "limit met", "3.0 of 60 images", "1 layers in float, 3 quantized"):
        assert word in captured.err, word
    assert "warning" not in captured.err


def test_a_missed_limit_is_exit_code_3_with_the_file_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--max-top1-drop", "5", "--guard-minutes", "0", "-o", str(tmp_path / "out")]) == 3
    captured = capsys.readouterr()
    assert "time up" in captured.err and "warning: model.int8_static.onnx loses more than the guard's limit" in captured.err
    assert (tmp_path / "out" / "model.int8_static.onnx").is_file() and "integer nodes" in captured.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--guard-minutes", "3"], ["--guard-minutes", "add --max-top1-drop"]),
        (["--max-top1-drop", "-1"], ["--max-top1-drop"]),
        (["--max-top1-drop", "1", "--data", "no/such"], ["no/such"]),
    ],
)
def test_wrong_options(
    options: list[str], words: list[str], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, *options, "-o", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words)
    assert not (tmp_path / "out").exists()


def test_a_guard_without_data_is_an_error_not_no_guard(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", command[1], "--scheme", "onnxruntime.int8_dynamic", "--max-top1-drop", "1", "-o", str(tmp_path / "out")]
    assert run(arguments) == 2
    assert "--data" in capsys.readouterr().err and not (tmp_path / "out").exists()


def guarded_recipe(folder: Path, data: Path, **changes: Any) -> Path:
    guard_section = {"max_top1_drop": 100, **changes}
    return write_recipe(
        folder, data, steps=[], quantize={"calibration": {"images": 16}, "schemes": ["onnxruntime.int8_static"], "guard": guard_section}
    )


def test_a_recipe_is_guarded_and_its_settings_are_part_of_the_key(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = guarded_recipe(tmp_path, colours)
    export = ["export", "--recipe", str(recipe), "-o", str(tmp_path / "out")]
    assert run([*export, "--json"]) == 0
    captured = capsys.readouterr()
    artifacts = {one["name"]: one for one in json.loads(captured.out)["artifacts"]}
    found = artifacts["model.int8_static.onnx"]["notes"]["guard"]
    assert found["met"] and found["images"] == 24 and artifacts["model.int8_static.onnx"]["recipe"] == "small"
    assert "guard of model.int8_static.onnx: limit met" in captured.err

    # People know layers by their modules, not by what the exporter calls nodes.
    manifest = Manifest.load(tmp_path / "out")
    settings = plugins.load("quantize", "onnxruntime").SCHEMES["int8_static"]()
    float_model = open_float(manifest.artifacts["model.fp32.onnx"])
    modules = [layer.module for layer in find_layers(float_model, manifest.artifacts["model.int8_static.onnx"], settings)]
    assert modules[0] == "blocks.0.attn.qkv" and modules[-1] == "head"

    def stages() -> dict[str, tuple[str, str]]:
        assert run([*export, "--dry-run", "--json"]) == 0
        return {stage["stage"]: (stage["action"], stage["reason"]) for stage in json.loads(capsys.readouterr().out)["stages"]}

    assert {action for action, _ in stages().values()} == {"reuse"}
    guarded_recipe(tmp_path, colours, images=20)
    assert stages()["quantize onnxruntime.int8_static"] == ("run", "guard changed")
    write_recipe(tmp_path, colours, steps=[], quantize={"calibration": {"images": 16}, "schemes": ["onnxruntime.int8_static"]})
    assert stages()["quantize onnxruntime.int8_static"] == ("run", "guard changed"), "without a guard no layer stays in float for it"
    assert [action for action, _ in stages().values()] == ["reuse", "reuse", "run"]


@pytest.mark.parametrize(
    ("quantize", "words"),
    [
        ({"guard": {}}, "a scheme that can leave layers in float"),
        ({"schemes": ["openvino.int8_static"], "guard": {"max_drop": 1}}, "unknown key 'max_drop'"),
        ({"schemes": ["openvino.int8_static"], "guard": {"minutes": -1}}, "quantize.guard.minutes"),
        ({"schemes": ["openvino.int8_static"], "guard": {"images": 0}}, "quantize.guard.images"),
        ({"schemes": ["openvino.int8_static"], "guard": 0.3}, "quantize.guard"),
    ],
)
def test_a_recipes_mistakes_are_one_line_each(quantize: dict[str, Any], words: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "quantize": quantize}, "r.yaml")
    assert len(caught.value.problems) == 1
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_shipped_recipe_guards_both_libraries() -> None:
    recipe = load_recipe("deit_tiny_guarded_int8")
    assert recipe.quantize.guard is not None and recipe.quantize.guard.max_top1_drop == 0.2
    assert [name for name, config in recipe.quantize.schemes if can_guard(config)] == ["onnxruntime.int8_static", "openvino.int8_static"]
