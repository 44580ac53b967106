"""What a recipe leaves to its data is found in it, once, and only in its train split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vitedge.data import fill, find, load, wants_data
from vitedge.errors import UsageError
from vitedge.recipe import Recipe, load_recipe, recipe_from_plain

NULLS = {"name": "r", "model": {"img_size": None, "patch_size": 4}, "preprocess": {"mean": None, "std": None}}


def recipe(**changes: object) -> Recipe:
    return recipe_from_plain({**NULLS, **changes}, "r.yaml")


def test_size_mean_and_deviation_are_the_train_splits(colours: Path) -> None:
    dataset = load(find(str(colours), None), 0.2, 0)
    filled = fill(recipe(), dataset)
    pixels = np.stack([dataset.train.images[i] for i in range(len(dataset.train.labels))]).astype(np.float64) / 255
    assert filled.model.img_size == 16
    assert filled.preprocess.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=5e-5)
    assert filled.preprocess.std == pytest.approx(pixels.std((0, 1, 2)), abs=5e-5)
    assert fill(recipe(), dataset) == filled  # from the cache
    assert filled.contract().size == 16 and not wants_data(filled)


def test_numbers_stay_as_they_are(colours: Path) -> None:
    dataset = load(find(str(colours), None), 0.2, 0)
    asked = recipe(model={"img_size": 32, "patch_size": 4}, preprocess={"mean": [0.1, 0.2, 0.3], "std": None})
    filled = fill(asked, dataset)
    assert filled.model == asked.model and filled.preprocess.mean == (0.1, 0.2, 0.3) and filled.preprocess.std is not None
    assert not wants_data(load_recipe("deit_tiny_112_int8"))


def test_a_size_that_does_not_fit_is_refused(colours: Path) -> None:
    dataset = load(find(str(colours), None), 0.2, 0)
    with pytest.raises(UsageError, match=r"a multiple of patch_size 5.*set model.img_size to a number"):
        fill(recipe(model={"img_size": None, "patch_size": 5}), dataset)


@pytest.mark.parametrize("key", ["model", "preprocess"])
def test_what_is_not_filled_in_is_not_guessed(key: str) -> None:
    with pytest.raises(UsageError, match="null, which training fills in from its data"):
        recipe(**({"preprocess": {}} if key == "model" else {"model": {}})).contract()
