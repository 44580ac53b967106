"""Preprocessed images for what looks at a few of them: a file's agreement with its model, and calibration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vitedge.data.records import Dataset
from vitedge.preprocess import Preprocessing


def sample(dataset: Dataset | None, contract: Preprocessing, count: int, seed: int) -> np.ndarray:
    """Preprocessed train images, float32 BCHW; synthetic ones where there is no data.

    Args:
        dataset: The images, or None.
        contract: How they become a model's input.
        count: How many; all where there are fewer.
        seed: Of the choice.
    """
    if dataset is None:
        # Smooth random colour fields: in the range of photographs, unlike white noise.
        small = np.random.default_rng(seed).integers(0, 256, size=(count, 4, 4, 3), dtype=np.uint8)
        return replace(contract, crop="squash", interpolation="bicubic")(list(small))
    return labelled_sample(dataset, contract, count, seed)[0]


def labelled_sample(dataset: Dataset, contract: Preprocessing, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Preprocessed train images, float32 BCHW, and their classes, int64 (B,); arguments as in `sample`."""
    split = dataset.train
    chosen = np.sort(np.random.default_rng(seed).choice(len(split.images), size=min(count, len(split.images)), replace=False))
    return contract([split.images[int(i)] for i in chosen]), np.asarray(split.labels, np.int64)[chosen]
