"""Overrides by dotted path: what they reach, and what is said where they do not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitedge.errors import UsageError
from vitedge.recipe import Recipe, load_recipe
from vitedge.study.overrides import apply_overrides

RECIPE = load_recipe("deit_tiny_prune_svd")  # distill, prune, train, decompose, train
QUANTIZED = load_recipe("deit_tiny_112_int8")


def leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    """Every setting below a mapping, by its dotted path; lists count as one value."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}" if path else str(key))]
    return [(path, value)]


def every_path(recipe: Recipe) -> list[tuple[str, Any]]:
    plain = recipe.to_plain()
    found = [leaf for key, value in plain.items() if key not in ("steps", "quantize") for leaf in leaves(value, key)]
    found += [leaf for key, value in plain["quantize"].items() if key != "schemes" for leaf in leaves(value, f"quantize.{key}")]
    for number, entry in enumerate(plain["steps"]):
        found += leaves(entry, f"steps.{number}")
    for number, entry in enumerate(plain["quantize"]["schemes"]):
        ((name, settings),) = entry.items()
        found += [leaf for leaf in leaves(settings, f"quantize.schemes.{number}.{name}") if settings]
    return found


@settings(deadline=None)
@given(st.sampled_from([(recipe, *leaf) for recipe in (RECIPE, QUANTIZED) for leaf in every_path(recipe)]))
def test_every_setting_can_be_addressed_and_its_own_value_changes_nothing(setting: tuple[Recipe, str, Any]) -> None:
    recipe, path, value = setting
    assert apply_overrides(recipe, {path: value}).to_plain() == recipe.to_plain()


@settings(deadline=None)
@given(
    size=st.integers(2, 20).map(lambda patches: 16 * patches),
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-6, 1.0),
    images=st.integers(1, 10**5),
)
def test_what_is_set_is_read_back_and_nothing_else_changes(size: int, steps: int, rate: float, images: int) -> None:
    values = {"model.img_size": size, "steps.train.steps": steps, "steps.0.lr": rate, "quantize.calibration.images": images}
    changed = apply_overrides(QUANTIZED, values).to_plain()
    train = changed["steps"][0]["train"]
    assert (changed["model"]["img_size"], train["steps"], train["lr"]) == (size, steps, rate)
    assert changed["quantize"]["calibration"]["images"] == images
    before = QUANTIZED.to_plain()
    changed["model"]["img_size"] = before["model"]["img_size"]
    changed["quantize"]["calibration"]["images"] = before["quantize"]["calibration"]["images"]
    train.update(steps=before["steps"][0]["train"]["steps"], lr=before["steps"][0]["train"]["lr"])
    assert changed == before


def test_a_step_is_addressed_by_place_by_both_or_by_a_name_that_is_there_once() -> None:
    for path in ("steps.1.target.params", "steps.1.prune.target.params", "steps.prune.target.params"):
        plain = apply_overrides(RECIPE, {path: 0.5}).to_plain()
        assert plain["steps"][1]["prune"]["target"]["params"] == 0.5
    with pytest.raises(UsageError) as caught:
        apply_overrides(RECIPE, {"steps.train.steps": 10})
    assert "found 2; write steps.2.train or steps.4.train" in str(caught.value)


def test_null_takes_steps_and_schemes_out_and_places_count_as_they_were() -> None:
    changed = apply_overrides(RECIPE, {"steps.decompose": None, "steps.0": None, "steps.4.steps": 7})
    assert [name for name, _ in changed.steps] == ["prune", "train", "train"]
    assert changed.steps[2][1].steps == 7  # type: ignore[attr-defined]
    changed = apply_overrides(QUANTIZED, {"quantize.schemes.onnxruntime.int8_static": None})
    assert [name for name, _ in changed.quantize.schemes] == ["onnxruntime.int8_dynamic", "openvino.int8_static"]
    assert [name for name, _ in RECIPE.steps] == ["distill", "prune", "train", "decompose", "train"]


def test_whole_lists_whole_entries_and_sections_that_were_off() -> None:
    schemes = ["onnxruntime.int8_weights"]
    values = {"quantize.schemes": schemes, "quantize.schemes.0.block_size": 64}
    assert apply_overrides(QUANTIZED, values).to_plain()["quantize"]["schemes"][0]["onnxruntime.int8_weights"]["block_size"] == 64
    assert schemes == ["onnxruntime.int8_weights"]  # what was given stays as it was
    changed = apply_overrides(QUANTIZED, {"steps.train": {"steps": 5}, "quantize.guard.max_top1_drop": 0.1})
    assert changed.to_plain()["steps"][0]["train"]["warmup"] == 0.05  # the schema's default, not the recipe's
    assert changed.quantize.guard is not None and changed.quantize.guard.max_top1_drop == 0.1
    changed = apply_overrides(QUANTIZED, {"steps.0": {"smooth": {}}})
    assert [name for name, _ in changed.steps] == ["smooth"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("modl.img_size", 112, "did you mean 'model'?"),
        ("model.image_size", 112, "did you mean 'img_size'?"),
        ("steps.1.prune.scor", "kl", "did you mean 'score'?"),
        ("steps.prun.score", "kl", "did you mean 'prune'?"),
        ("steps.9.steps", 3, "found no entry 9"),
        ("model.img_size.width", 3, "found the value 112 on the way"),
        ("model.img_size", "large", "model.img_size"),
        ("steps.1.prune.units.7", "mlp", "expected a place below 2 in that list"),
        ("quantize.schemes.onnxruntime.int8_static.method", "minmax", "expected one of (none)"),
    ],
)
def test_a_path_or_value_that_is_wrong_is_named(path: str, value: object, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        apply_overrides(RECIPE, {path: value})
    assert said in str(caught.value) and "deit_tiny_prune_svd" in str(caught.value)


def test_no_overrides_is_the_recipe_itself() -> None:
    assert apply_overrides(RECIPE, {}) is RECIPE
