"""Recipes: every shipped one is valid, every mistake is found in one go, with its path and the nearest key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vitedge.cli.main import run
from vitedge.errors import FileProblems, UsageError
from vitedge.recipe import TrainConfig, load_recipe, recipe_from_plain, recipe_schema
from vitedge.schema import list_files

RECIPES = list_files("recipes")


def problems(content: dict[str, object]) -> list[str]:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", **content}, "r.yaml")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_valid_and_tell_how_to_run_them(name: str) -> None:
    recipe = load_recipe(name)
    header = [line for line in RECIPES[name].read_text().splitlines() if line.startswith("#")]
    assert recipe.name == name and recipe.description
    assert any(f"--recipe {name}" in line for line in header)
    assert any(line.startswith("# Expect: ") for line in header)


def test_every_model_and_data_set_has_an_fp32_and_an_int8_recipe() -> None:
    for model in ("deit_tiny", "deit_small", "deit_base", "vit_base"):
        for data in ("cifar10", "cifar100"):
            fp32, int8 = (load_recipe(f"{model}_224_{data}_{kind}") for kind in ("fp32", "int8"))
            assert not fp32.quantize.schemes and len(int8.quantize.schemes) == 3
            assert fp32.data.name == int8.data.name == data


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe.to_plain(), sort_keys=False))
    assert load_recipe(str(tmp_path / f"{name}.yaml")) == recipe


def test_all_problems_come_in_one_go_with_path_and_nearest_key() -> None:
    found = problems(
        {
            "modle": {},
            "model": {"wieghts": "none", "img_size": "large"},
            "steps": [{"train": {"lr": -1, "epoch": 2}}, {"trian": {}}],
            "quantize": {"schemes": ["onnxruntime.int8_dinamic"], "calibration": {"image": 5}},
        }
    )
    text = "\n".join(found)
    for expected in (
        "r.yaml: modle: expected one of the keys name, description",
        "found unknown key 'modle' (did you mean 'model'?)",
        "model.wieghts",
        "(did you mean 'weights'?)",
        "model.img_size",
        "steps.0.train.lr",
        "steps.0.train.epoch",
        "(did you mean 'epochs'?)",
        "(did you mean 'train'?)",
        "(did you mean 'onnxruntime.int8_dynamic'?)",
        "quantize.calibration.image",
    ):
        assert expected in text, expected
    assert len(found) == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"steps": {"train": {}}}, "a list of `- name: {settings}`"),
        ({"steps": [{"train": {}, "export": {}}]}, "one `- name: {settings}`"),
        ({"model": {"img_size": 30, "patch_size": 4}}, "multiple of patch_size"),
        ({"model": []}, "model"),
        ({"data": {"validation": 1.5}}, "less than 0.9"),
        ({"export": {"opset": 12}}, "greater than or equal to 17"),
        ({"preprocess": {"interpolation": "cubic"}}, "'bicubic'"),
        ({"name": "../evil"}, "pattern"),
    ],
)
def test_wrong_values(content: dict[str, object], message: str) -> None:
    found = problems(content)
    assert len(found) == 1 and message in found[0] and "\n" not in found[0]


def test_steps_keep_their_order_and_defaults() -> None:
    recipe = recipe_from_plain({"name": "r", "steps": ["train", {"train": {"lr": "2e-4"}}]}, "r.yaml")
    assert [config.lr for _, config in recipe.steps if isinstance(config, TrainConfig)] == [2e-4, 2e-4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {a: 1\n", "valid YAML"),
        ("- a\n- b\n", "a mapping"),
        ("", "a mapping"),
        ("seed: 1\nseed: 2\n", "key 'seed' appears twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "valid YAML"),
    ],
)
def test_files_that_are_not_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'deit_tiny_int8'"):
        load_recipe("deit_tiny_int")
    with pytest.raises(UsageError, match="no such file"):
        load_recipe("nowhere/deit.yaml")


def test_the_schema_knows_every_plugins_settings() -> None:
    schema = recipe_schema()
    text = json.dumps(schema)
    assert "onnxruntime.int8_static" in text and "warmup" in text
    assert schema["additionalProperties"] is False


def test_cli_validates_many_and_says_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("modle: {}\nseed: x\n")
    assert run(["recipes", "validate", "deit_tiny_int8", str(bad), "--json"]) == 2
    captured = capsys.readouterr()
    results = json.loads(captured.out)["results"]
    assert [r["valid"] for r in results] == [True, False]
    assert len(results[1]["problems"]) == 2 == captured.err.count("error:")


def test_cli_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "list"]) == 0
    assert "deit_tiny_int8" in capsys.readouterr().out
    assert run(["recipes", "show", "deit_tiny_int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["model"]["weights"] == "builtin"
    assert run(["recipes", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_options_may_be_typed_in_snake_case(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["export", "--recipe", "deit_tiny_int8", "-o", str(tmp_path / "out"), "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "deit_tiny_int8"


@pytest.mark.parametrize("written", ["off", "no", "false", "0", "[]"])
def test_what_is_switched_off_is_not_switched_on(written: str, tmp_path: Path) -> None:
    """YAML reads `off` as false; a technique with its defaults is the opposite of what was meant."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"steps:\n  - tome: {written}\n  - train: {{steps: 1}}\n")
    with pytest.raises(FileProblems, match=r"steps\.0\.tome"):
        load_recipe(str(path))
    path.write_text("steps:\n  - tome:\n  - train: {steps: 1}\n")
    assert load_recipe(str(path)).steps[0][0] == "tome"


@pytest.mark.parametrize(
    ("text", "words"), [("name: {{ name }}\n", "no word or number"), ("description: 2024-02-30\n", "day"), ("a: 1\na: 2\n", "twice")]
)
def test_odd_yaml_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_mapping_can_be_merged_into_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: &m {img_size: 32, patch_size: 4}\n")
    text = "data: {name: cifar10}\nsteps:\n  - train: &t {steps: 2}\n  - train: {<<: *t, lr: 1.0e-3}\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "mine.yaml")).steps[1][1].steps == 2  # type: ignore[attr-defined]
