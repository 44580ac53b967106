"""The preprocessing contract against float64 references that share no code with it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitedge.preprocess import Preprocessing


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise: uint8 HWC."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.RandomState(seed).uniform(-20, 20, (height, width, 3))
    smooth = np.stack([128 + 90 * np.sin(x / 5 + seed), 128 + 90 * np.cos(y / 7), 60 + 2 * (x + y) % 150], axis=-1)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def cubic(t: float) -> float:
    """Keys' cubic with a = -0.5, the one Pillow uses."""
    t = abs(t)
    if t < 1:
        return (1.5 * t - 2.5) * t * t + 1
    return ((-0.5 * t + 2.5) * t - 4) * t + 2 if t < 2 else 0.0


def triangle(t: float) -> float:
    return max(0.0, 1 - abs(t))


def box(t: float) -> float:
    return 1.0 if -0.5 <= t < 0.5 else 0.0


def lanczos(t: float) -> float:
    if t == 0:
        return 1.0
    return 0.0 if abs(t) >= 3 else 3 * math.sin(math.pi * t) * math.sin(math.pi * t / 3) / (math.pi * t) ** 2


FILTERS = {"bicubic": (cubic, 2.0), "bilinear": (triangle, 1.0), "box": (box, 0.5), "lanczos": (lanczos, 3.0)}


def resampling_matrix(source: int, target: int, name: str) -> np.ndarray:
    """Antialiased resampling along one side as a matrix (target, source): the filter is as wide as the step."""
    kernel, support = FILTERS[name]
    step = source / target
    scale = max(step, 1.0)
    matrix = np.zeros((target, source))
    for row in range(target):
        center = (row + 0.5) * step
        for column in range(source):
            if abs(column + 0.5 - center) < support * scale + 0.5:
                matrix[row, column] = kernel((column + 0.5 - center) / scale)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resized(image: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    """Width first, then height, clipped and rounded to bytes after each, in float64."""
    across = np.einsum("tw,hwc->htc", resampling_matrix(image.shape[1], width, name), image.astype(np.float64))
    across = np.clip(np.floor(across + 0.5), 0, 255)
    down = np.einsum("th,hwc->twc", resampling_matrix(image.shape[0], height, name), across)
    return np.clip(np.floor(down + 0.5), 0, 255)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "box", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 9), (40, 23), (23, 64)])
def test_squash_is_the_antialiased_filter(interpolation: str, height: int, width: int) -> None:
    image = picture(height, width)
    made = Preprocessing(size=24, interpolation=interpolation).resize_crop(image)
    assert made.dtype == np.uint8 and made.shape == (24, 24, 3)
    assert np.abs(made - resized(image, 24, 24, interpolation)).max() <= 1  # Pillow's weights are fixed point


def test_nearest_takes_the_pixel_below_the_centre() -> None:
    image = picture(12, 12)
    assert np.array_equal(Preprocessing(size=4, interpolation="nearest").resize_crop(image), image[1::3, 1::3])


def test_image_of_the_right_size_is_left_alone() -> None:
    image = picture(24, 24)
    for crop in ("squash", "center"):
        assert np.array_equal(Preprocessing(size=24, crop=crop).resize_crop(image), image)


def test_center_without_resizing_is_a_slice() -> None:
    image = picture(10, 14)
    made = Preprocessing(size=8, crop="center", crop_fraction=0.8).resize_crop(image)
    assert np.array_equal(made, image[1:9, 3:11])


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(40, 60, 20, 30), (60, 40, 30, 20), (80, 40, 40, 20)])
def test_center_resizes_the_shorter_side_and_cuts_the_middle(height: int, width: int, rows: int, columns: int) -> None:
    image = picture(height, width)
    made = Preprocessing(size=16, crop="center", crop_fraction=0.8).resize_crop(image)
    top, left = (rows - 16) // 2, (columns - 16) // 2
    expected = resized(image, rows, columns, "bicubic")[top : top + 16, left : left + 16]
    assert np.abs(made - expected).max() <= 1


def test_center_keeps_the_aspect_ratio_where_squash_does_not() -> None:
    image = np.zeros((20, 60, 3), np.uint8)
    image[5:15, 25:35] = 255  # a square in the middle
    centre = Preprocessing(size=20, crop="center", interpolation="nearest").resize_crop(image)
    squashed = Preprocessing(size=20, interpolation="nearest").resize_crop(image)
    assert [int((centre[..., 0] > 0).any(axis=axis).sum()) for axis in (0, 1)] == [10, 10]
    assert [int((squashed[..., 0] > 0).any(axis=axis).sum()) for axis in (0, 1)] == [4, 10]


MEANS = st.tuples(*[st.floats(0, 1)] * 3)
STDS = st.tuples(*[st.floats(0.01, 1)] * 3)


@given(MEANS, STDS, st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_normalize_is_the_formula(mean: tuple[float, float, float], std: tuple[float, float, float], seed: int) -> None:
    pixels = np.random.RandomState(seed).randint(0, 256, (2, 3, 5, 3)).astype(np.uint8)
    made = Preprocessing(size=5, mean=mean, std=std).normalize(pixels)
    expected = (pixels.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    assert made.dtype == np.float32 and made.flags.c_contiguous and made.shape == (2, 3, 3, 5)
    # float32 rounds the product and the shift, each as large as 1/std
    assert np.abs(made.transpose(0, 2, 3, 1) - expected).max() <= 4 * 2.0**-24 / min(std)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_layout_and_colour_order(layout: str, order: str) -> None:
    pixels = picture(6, 6)[None]
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.3, 0.4)
    made = Preprocessing(size=6, mean=mean, std=std, layout=layout, color_order=order)([pixels[0]])
    for channel in range(3):
        place = channel if order == "RGB" else 2 - channel
        plane = made[0, place] if layout == "NCHW" else made[0, :, :, place]
        # mean and std belong to the colour, wherever the colour goes
        assert np.allclose(plane, (pixels[0, :, :, channel] / 255 - mean[channel]) / std[channel], atol=1e-5)
    assert made.flags.c_contiguous


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "HSV", "YCbCr"])
def test_pillow_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(picture(8, 8)).convert(mode)
    made = Preprocessing(size=8).resize_crop(image)
    assert made.shape == (8, 8, 3) and np.array_equal(made, np.asarray(image.convert("RGB")))


def test_grey_array_is_three_equal_channels() -> None:
    grey = picture(8, 8)[:, :, 0]
    assert np.array_equal(Preprocessing(size=8).resize_crop(grey), np.stack([grey] * 3, axis=-1))


def test_images_of_many_sizes_make_one_batch() -> None:
    assert Preprocessing(size=7)([picture(8, 9), picture(20, 5), picture(7, 7)]).shape == (3, 3, 7, 7)


CONTRACTS = st.builds(
    Preprocessing,
    size=st.integers(1, 1024),
    crop=st.sampled_from(["squash", "center"]),
    crop_fraction=st.floats(0.01, 1),
    interpolation=st.sampled_from(["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]),
    mean=MEANS,
    std=STDS,
    color_order=st.sampled_from(["RGB", "BGR"]),
    layout=st.sampled_from(["NCHW", "NHWC"]),
)


@given(CONTRACTS)
def test_json_round_trip(contract: Preprocessing) -> None:
    assert Preprocessing.from_json(contract.to_json()) == contract
    assert Preprocessing.from_json(json.dumps(json.loads(contract.to_json()), indent=3)).to_json() == contract.to_json()


@given(CONTRACTS, CONTRACTS)
def test_differences_name_every_field_that_differs_and_no_other(mine: Preprocessing, theirs: Preprocessing) -> None:
    differing = [name for name in vars(mine) if getattr(mine, name) != getattr(theirs, name)]
    found = mine.differences(theirs)
    assert [text.partition(":")[0] for text in found] == differing
    assert mine.differences(mine) == []


def test_differences_show_both_values() -> None:
    assert Preprocessing(size=32).differences(Preprocessing(size=64, interpolation="bilinear")) == [
        "size: 32, 64",
        "interpolation: bicubic, bilinear",
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 0}, "size must be a positive whole number, not 0"),
        ({"size": 32.5}, "size must be"),
        ({"size": "32"}, "size must be"),
        ({"crop": "middle"}, "crop must be squash or center, not 'middle'"),
        ({"crop_fraction": 0.0}, "crop_fraction must be in"),
        ({"crop_fraction": 1.5}, "crop_fraction must be in"),
        ({"crop_fraction": float("nan")}, "crop_fraction must be in"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest"),
        ({"mean": (0.5, 0.5)}, "three values"),
        ({"std": (0.5, 0.0, 0.5)}, "std above zero"),
        ({"color_order": "GBR"}, "RGB or BGR"),
        ({"layout": "CHWN"}, "NCHW or NHWC"),
    ],
)
def test_bad_fields_are_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Preprocessing(**{"size": 32, **change})  # type: ignore[arg-type]


def test_every_bad_field_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"size must be .*; crop must be .*; interpolation must be"):
        Preprocessing(size=-1, crop="x", interpolation="y")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"size": 32, "resize": "shortest"}', '{"size": -1}', '{"size": 8, "std": 1}'])
def test_what_is_no_contract_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a preprocessing contract"):
        Preprocessing.from_json(text)


def test_a_photograph_is_turned_upright_as_its_note_says() -> None:
    upright = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6
    assert np.array_equal(Preprocessing(size=8).resize_crop(stored), np.asarray(upright))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_and_not_clipped(mode: str) -> None:
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    deep = Image.fromarray(np.arange(64).reshape(8, 8).astype(kind) * 1000)
    assert deep.mode == mode
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        Preprocessing(size=8)([deep])
