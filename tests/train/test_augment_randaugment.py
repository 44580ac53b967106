"""RandAugment on batches against Pillow, closed forms and torchvision's kernels called one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from tests.train.made_images import photographs
from vitedge.train.randaugment import OPERATIONS, BatchedRandAugment

MAGNITUDE = 9
SIDE = 32
SHARE = MAGNITUDE / 30
PIXELS = torch.from_numpy(photographs(6, SIDE, SIDE)).permute(0, 3, 1, 2).contiguous()
BILINEAR = InterpolationMode.BILINEAR


def apply(pixels_BCHW: torch.Tensor, name: str, negative: bool, magnitude: int = MAGNITUDE) -> torch.Tensor:
    batch = len(pixels_BCHW)
    operations = np.full((batch, 1), OPERATIONS.index(name), np.uint8)
    return BatchedRandAugment(magnitude)(pixels_BCHW, operations, np.full((batch, 1), negative))


def pillow(image_CHW: torch.Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def shifted(image_CHW: torch.Tensor, down: int, right: int) -> torch.Tensor:
    moved = torch.zeros_like(image_CHW)
    height, width = image_CHW.shape[-2:]
    moved[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image_CHW[
        :, max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return moved


def sheared(image_CHW: torch.Tensor, degrees_x: float, degrees_y: float) -> torch.Tensor:
    return functional.affine(image_CHW, 0.0, [0, 0], 1.0, [degrees_x, degrees_y], interpolation=BILINEAR, center=[0, 0])


def test_the_operations_are_the_papers() -> None:
    colours = {"AutoContrast", "Equalize", "Solarize", "Color", "Posterize", "Contrast", "Brightness", "Sharpness"}
    assert set(OPERATIONS) == colours | {"Identity", "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def test_identity_and_closed_forms() -> None:
    assert torch.equal(apply(PIXELS, "Identity", True), PIXELS)
    assert torch.equal(apply(PIXELS, "Posterize", True), PIXELS & 0b11111110)  # 8 - round(9 / 7.5) bits
    bright = PIXELS >= 255 * (1 - SHARE)
    assert torch.equal(apply(PIXELS, "Solarize", True), torch.where(bright, 255 - PIXELS, PIXELS))
    for negative, factor in ((False, 1 + 0.9 * SHARE), (True, 1 - 0.9 * SHARE)):
        exact = (PIXELS.double() * factor).clamp(0, 255)
        found = apply(PIXELS, "Brightness", negative)
        assert (found.double() - exact).abs().max() < 1.0 and (found != PIXELS).any()


@pytest.mark.parametrize("negative", [False, True])
def test_translations_move_whole_pixels_and_fill_with_black(negative: bool) -> None:
    pixels = int(150 / 331 * SIDE * SHARE) * (-1 if negative else 1)
    assert abs(pixels) == 4
    for image, right, down in zip(PIXELS, apply(PIXELS, "TranslateX", negative), apply(PIXELS, "TranslateY", negative), strict=True):
        assert torch.equal(right, shifted(image, 0, pixels))
        assert torch.equal(down, shifted(image, pixels, 0))


@pytest.mark.parametrize("negative", [False, True])
def test_rotation_and_shear_are_torchvisions_one_image_at_a_time(negative: bool) -> None:
    sign = -1 if negative else 1
    shear = math.degrees(math.atan(0.3 * SHARE)) * sign
    for index, image in enumerate(PIXELS):
        assert torch.equal(apply(PIXELS, "Rotate", negative)[index], functional.rotate(image, 30 * SHARE * sign, BILINEAR))
        assert torch.equal(apply(PIXELS, "ShearX", negative)[index], sheared(image, shear, 0.0))
        assert torch.equal(apply(PIXELS, "ShearY", negative)[index], sheared(image, 0.0, shear))


@pytest.mark.parametrize("negative", [False, True])
def test_colours_are_pillows_within_rounding(negative: bool) -> None:
    factor = 1 + (-0.9 if negative else 0.9) * SHARE
    enhancers = {"Color": ImageEnhance.Color, "Contrast": ImageEnhance.Contrast, "Sharpness": ImageEnhance.Sharpness}
    for name, enhancer in enhancers.items():
        found = apply(PIXELS, name, negative).permute(0, 2, 3, 1).numpy().astype(int)
        expected = np.stack([np.asarray(enhancer(pillow(image)).enhance(factor)) for image in PIXELS]).astype(int)
        assert np.abs(found - expected).max() <= 1, name
        assert np.abs(found - PIXELS.permute(0, 2, 3, 1).numpy()).max() > 5, name


def test_histograms_are_pillows() -> None:
    dim = PIXELS // 2 + 20
    for name, operation in {"AutoContrast": ImageOps.autocontrast, "Equalize": ImageOps.equalize}.items():
        found = apply(dim, name, False).permute(0, 2, 3, 1).numpy().astype(int)
        expected = np.stack([np.asarray(operation(pillow(image))) for image in dim]).astype(int)
        assert np.abs(found - expected).max() <= (name == "AutoContrast"), name


def test_strength_is_the_magnitude() -> None:
    assert (apply(PIXELS, "Brightness", False, 30).double() - (PIXELS.double() * 1.9).clamp(0, 255)).abs().max() < 1.0
    for name in ("Brightness", "Color", "Contrast", "Sharpness", "ShearX", "TranslateY", "Posterize"):
        assert torch.equal(apply(PIXELS, name, True, 0), PIXELS), name


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 3), st.sampled_from([9, 16, 33]))
def test_an_image_does_not_depend_on_its_neighbours(seed: int, batch: int, layers: int, side: int) -> None:
    generator = np.random.default_rng(seed)
    pixels = torch.from_numpy(generator.integers(0, 256, (batch, 3, side, side), dtype=np.uint8))
    operations = generator.integers(0, len(OPERATIONS), (batch, layers), dtype=np.uint8)
    negative = generator.random((batch, layers)) < 0.5
    augment, before, state = BatchedRandAugment(MAGNITUDE), pixels.clone(), torch.get_rng_state()
    whole = augment(pixels, operations, negative)
    alone = [augment(pixels[i : i + 1], operations[i : i + 1], negative[i : i + 1]) for i in range(batch)]
    assert whole.dtype == torch.uint8 and torch.equal(whole, torch.cat(alone))
    assert torch.equal(pixels, before) and torch.equal(torch.get_rng_state(), state)


def test_layers_follow_one_another() -> None:
    operations = np.array([[OPERATIONS.index("Rotate"), OPERATIONS.index("Equalize")]] * len(PIXELS), np.uint8)
    both = BatchedRandAugment(MAGNITUDE)(PIXELS, operations, np.zeros((len(PIXELS), 2), bool))
    assert torch.equal(both, apply(apply(PIXELS, "Rotate", False), "Equalize", False))
    assert not torch.equal(both, apply(apply(PIXELS, "Equalize", False), "Rotate", False))
