"""The batched training side against the Pillow contract, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitedge.preprocess import Preprocessing
from vitedge.train.augment import Batches, flip_batch, normalize_batch, resize_crop_batch, shift_batch


def photographs(count: int, height: int, width: int) -> np.ndarray:
    """Smooth fields with hard edges, where interpolations differ most."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 3.0 + c) * np.cos(y / 4.0 - c) for c in range(3)], -1) * 100 + 128
    images = waves[None] + generator.normal(0, 20, size=(count, height, width, 3))
    images[:, height // 3 : height // 2, width // 4 : width // 2] = 255
    return images.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["box", "bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize("side", [32, 40, 150])
@pytest.mark.parametrize("contract", [{"crop": "squash"}, {"crop": "center", "crop_fraction": 0.875}, {"crop": "center"}])
def test_the_batched_resize_is_pillows(interpolation: str, side: int, contract: dict[str, object]) -> None:
    preprocessing = Preprocessing(size=56, interpolation=interpolation, **contract)  # type: ignore[arg-type]
    images_BHWC = photographs(3, side, side)
    expected = np.stack([preprocessing.resize_crop(image) for image in images_BHWC]).astype(int)
    found_BCHW = resize_crop_batch(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2), preprocessing)
    assert np.abs(found_BCHW.permute(0, 2, 3, 1).numpy().astype(int) - expected).max() == 0


def test_normalize_is_the_contracts() -> None:
    preprocessing = Preprocessing(size=8)
    pixels_BHWC = photographs(2, 8, 8)
    found = normalize_batch(torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2), preprocessing).numpy()
    assert np.abs(found - preprocessing.normalize(pixels_BHWC)).max() < 1e-5


def test_images_of_many_sizes_take_the_pillow_path_exactly() -> None:
    preprocessing = Preprocessing(size=16, crop="center")
    images = [photographs(1, 20, 30)[0], photographs(1, 40, 18)[0]]
    batches = Batches(images, np.array([0, 1]), preprocessing, torch.device("cpu"))
    x_BCHW, labels_B = batches.take(np.array([1, 0]))
    assert labels_B.tolist() == [1, 0]
    assert np.abs(x_BCHW.numpy() - preprocessing([images[1], images[0]])).max() < 1e-5


def test_shift_moves_whole_images_and_fills_with_black() -> None:
    images_BCHW = torch.from_numpy(photographs(16, 8, 8)).permute(0, 3, 1, 2) // 2 + 64
    shifted = shift_batch(images_BCHW, 2, np.random.default_rng(0))
    offsets = np.random.default_rng(0).integers(0, 5, size=(2, 16)) - 2
    for image, moved, dy, dx in zip(images_BCHW, shifted, *offsets, strict=True):
        for row in range(8):
            for column in range(8):
                y, x = row + dy, column + dx
                expected = image[:, y, x] if 0 <= y < 8 and 0 <= x < 8 else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(moved[:, row, column], expected)
    assert len(set(map(tuple, offsets.T.tolist()))) > 8


def test_flip_mirrors_about_half() -> None:
    images_BCHW = torch.from_numpy(photographs(200, 4, 4)).permute(0, 3, 1, 2)
    flipped = flip_batch(images_BCHW, np.random.default_rng(1))
    mirrored = [torch.equal(f, i.flip(-1)) for f, i in zip(flipped, images_BCHW, strict=True)]
    same = [torch.equal(f, i) for f, i in zip(flipped, images_BCHW, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert 70 < sum(mirrored) < 130


def test_uniform_images_are_taken_as_one_array() -> None:
    array = photographs(5, 8, 8)

    class View:
        uniform = True

        def __getitem__(self, index: np.ndarray | int) -> np.ndarray:
            return array[index]

    batches = Batches(View(), np.arange(5), Preprocessing(size=8), torch.device("cpu"))  # type: ignore[arg-type]
    assert batches.batched and len(batches) == 5
    x_BCHW, _ = batches.take(np.array([4, 2]))
    assert np.abs(x_BCHW.numpy() - Preprocessing(size=8)(array[[4, 2]])).max() < 1e-5
