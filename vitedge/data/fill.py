"""What a recipe leaves to its data: the input's size, and the mean and deviation of its pixels.

A model that starts from nothing is normalized by its own data's figures; one that was trained before
keeps the figures it was trained with, which is why a recipe asks for the data's by `null`.
"""

from __future__ import annotations

import json
from typing import Any

from vitedge.artifact import digest_of, write_json
from vitedge.data.describe import Description, describe
from vitedge.data.records import Dataset
from vitedge.errors import UsageError
from vitedge.locations import cache_dir
from vitedge.recipe import Recipe

DIGITS = 4


def wants_data(recipe: Recipe) -> bool:
    """Whether `fill` has anything to do."""
    return None in (recipe.model.img_size, recipe.preprocess.mean, recipe.preprocess.std)


def fill(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with size, mean and deviation where it says null: those of the train split, to four digits.

    Raises:
        UsageError: The size is left to the data, and images are of many sizes, not square, or not a multiple of the patch.
    """
    figures = _figures(recipe, dataset)
    model, preprocess = recipe.model, recipe.preprocess
    if model.img_size is None:
        height, width = figures.largest
        if figures.smallest != figures.largest or height != width or height % (model.patch_size or 1):
            raise UsageError(
                "model.img_size",
                expected=f"square images of one size, a multiple of patch_size {model.patch_size}, for null",
                found=f"{figures.smallest[0]} x {figures.smallest[1]} to {height} x {width} pixels",
                fix="set model.img_size to a number; images are resized to it",
            )
        model = model.model_copy(update={"img_size": height})
    measured = {"mean": figures.mean, "std": figures.std}
    asked = {name: values for name, values in measured.items() if getattr(preprocess, name) is None}
    rounded = {name: tuple(round(value, DIGITS) for value in values) for name, values in asked.items()}
    return recipe.model_copy(update={"model": model, "preprocess": preprocess.model_copy(update=rounded)})


def _figures(recipe: Recipe, dataset: Dataset) -> Description:
    """Figures of the train split, kept in the cache: a folder of photographs takes seconds to read."""
    path = cache_dir() / "figures" / f"{digest_of(dataset.digest, recipe.data.validation, recipe.data.split_seed)}.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        return Description(**fields)
    except (OSError, ValueError, TypeError):  # none yet, or another version's
        figures = describe(dataset)
        write_json(path, figures.__dict__)
        return figures
