"""The batched preprocessing contract against Pillow, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.train.made_images import photographs
from vitedge.preprocess import Preprocessing
from vitedge.train.resize import normalize_batch, resize_crop_batch


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
    pixels_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float()
    kept = pixels_BCHW.clone()
    found = normalize_batch(pixels_BCHW, preprocessing).numpy()
    assert np.abs(found - preprocessing.normalize(pixels_BHWC)).max() < 1e-5
    assert torch.equal(pixels_BCHW, kept)
