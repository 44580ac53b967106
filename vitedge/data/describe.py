"""What is in a data set, in figures: counts, image sizes, mean and standard deviation of the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitedge.data.records import Dataset

SAMPLE = 2000  # train images the figures are from, evenly spaced


@dataclass(frozen=True)
class Description:
    """Figures of a data set.

    Attributes:
        counts: Images per split.
        class_counts: Train images per class, in the order of `classes`.
        sampled: How many train images the figures below are from.
        smallest: Least height and least width, pixels.
        largest: Greatest height and greatest width, pixels.
        mean: Per channel (RGB), of values in [0, 1], over all sampled pixels.
        std: As `mean`: the standard deviation (divided by N).
    """

    counts: dict[str, int]
    class_counts: tuple[int, ...]
    sampled: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def describe(dataset: Dataset, sample: int = SAMPLE) -> Description:
    """Count a data set and measure a sample of its train images.

    Raises:
        InputError: A sampled image that is decoded on access is damaged.
    """
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    images = dataset.train.images
    chosen = np.unique(np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int))
    sums, squares, pixels, shapes = np.zeros(3), np.zeros(3), 0, []
    for position in chosen:
        image_HWC = images[int(position)].astype(np.float64) / 255
        sums += image_HWC.sum(axis=(0, 1))
        squares += (image_HWC**2).sum(axis=(0, 1))
        pixels += image_HWC.shape[0] * image_HWC.shape[1]
        shapes.append(image_HWC.shape[:2])
    mean = sums / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    heights, widths = zip(*shapes, strict=True)
    return Description(
        {name: len(split.labels) for name, split in splits.items() if split is not None},
        tuple(int(count) for count in np.bincount(dataset.train.labels, minlength=len(dataset.classes))),
        len(chosen),
        (min(heights), min(widths)),
        (max(heights), max(widths)),
        _channels(mean),
        _channels(std),
    )


def _channels(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
