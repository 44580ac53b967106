"""The train images a model is looked at with, preprocessed as its file says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitedge import data as datasets
from vitedge.artifact import Artifact
from vitedge.data.sample import sample
from vitedge.errors import UsageError
from vitedge.recipe import DataSpec, Recipe, load_recipe


@dataclass(frozen=True)
class Images:
    """Train images.

    Attributes:
        x_BCHW: float32, preprocessed.
        label: What results call the data set.
        seed: Of the choice.
    """

    x_BCHW: np.ndarray
    label: str
    seed: int


def load_images(artifact: Artifact, folder: Path | None, option: str | None, recipe: Recipe | None, count: int, seed: int) -> Images:
    """Images of the train split, `count` of them at random; never made-up ones.

    Args:
        artifact: The model they are for, with its contract.
        folder: Its build folder, whose recipe names the data; None for a file outside of one.
        option: `--data`.
        recipe: `--recipe`.
        count: How many; all where there are fewer.
        seed: Of the choice.

    Raises:
        UsageError: There are none at hand, or the file does not say how they become its input.
        InputError: The data set has other classes than the model.
    """
    contract = artifact.contract()
    if contract is None:
        raise UsageError(
            str(artifact.path),
            expected="a preprocessing contract in the file",
            found="none",
            fix="take a recipe's with --recipe NAME|PATH",
        )
    beside = folder / "recipe.yaml" if folder else None
    if recipe is not None:
        spec = recipe.data
    elif beside is not None and beside.is_file():
        spec = load_recipe(str(beside)).data
    elif option is not None:
        spec = DataSpec(name=option)
    else:
        raise UsageError(
            str(artifact.path),
            expected="train images to look at the model with",
            found="no data set named",
            fix="name it with --data NAME|PATH",
        )
    source = datasets.find(spec.name, option, download=False)
    dataset = datasets.load_for(artifact.labels, artifact.path.name, source, spec.validation, spec.split_seed)
    return Images(sample(dataset, contract, count, seed), dataset.label, seed)
