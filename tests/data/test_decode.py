"""Encoded images to RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.made import pixels, png, tar_of
from vitedge.data.decode import DecodedOnAccess, decode, decode_all, estimate_bytes
from vitedge.data.members import open_members
from vitedge.errors import InputError
from vitedge.progress import silent

RGB = pixels(1, 5, 7)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_rgb_comes_back_exactly() -> None:
    decoded = decode(png(RGB), "x")
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, RGB)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB)),
    ],
)
def test_exif_orientation_is_applied(orientation: int, upright: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(saved(Image.fromarray(RGB), exif=exif), "x"), upright)


GREY = RGB[:, :, 0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(Image.fromarray(GREY)), np.stack([GREY] * 3, -1)),
        (saved(Image.fromarray(GREY > 127)), np.stack([np.where(GREY > 127, 255, 0)] * 3, -1)),
        (saved(Image.merge("LA", (Image.fromarray(GREY), Image.new("L", (7, 5), 9)))), np.stack([GREY] * 3, -1)),
        (saved(Image.merge("RGBA", (*Image.fromarray(RGB).split(), Image.new("L", (7, 5), 0)))), RGB),
        (saved(Image.fromarray(RGB).quantize(35)), None),
        (saved(Image.fromarray(RGB).quantize(35), transparency=bytes([0, 128])), None),
        (saved(Image.fromarray(RGB).quantize(35), "GIF"), None),
        (saved(Image.merge("CMYK", (*Image.fromarray(255 - RGB).split(), Image.new("L", (7, 5), 0))), "TIFF"), RGB),
        (saved(Image.fromarray(RGB), "BMP"), RGB),
        (saved(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
        (saved(Image.fromarray(RGB), "PPM"), RGB),
    ],
    ids=["grey", "bits", "grey_alpha", "transparent", "palette", "palette_transparent", "gif", "cmyk", "bmp", "webp", "ppm"],
)
def test_other_modes_and_formats_become_rgb(data: bytes, expected: np.ndarray | None) -> None:
    decoded = decode(data, "x")
    # 35 colours are enough for 35 pixels, so a palette loses only what its making rounds
    exact = expected is not None
    assert decoded.shape == RGB.shape
    assert np.array_equal(decoded, expected) if exact else np.abs(decoded.astype(int) - RGB).max() <= 8


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "UnidentifiedImageError"),
        (b"no image at all", "UnidentifiedImageError"),
        (png(RGB)[:60], "readable image"),
        (saved(Image.fromarray(pixels(1, 64, 64)), "JPEG")[:900], "truncated"),
        (saved(Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7))), "8 bits per channel, found mode I;16"),
        (saved(Image.fromarray(np.ones((5, 7), np.float32)), "TIFF"), "8 bits per channel, found mode F"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "UnidentifiedImageError"),
    ],
    ids=["empty", "text", "png_cut", "jpeg_cut", "sixteen_bits", "floats", "postscript"],
)
def test_what_cannot_be_decoded_is_named(data: bytes, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        decode(data, "set.tar: train/cat/7.png")
    assert str(caught.value).startswith("set.tar: train/cat/7.png: expected")


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(InputError, match="DecompressionBomb"):
        decode(png(RGB), "x")


def test_many_are_decoded_in_the_order_asked_for_with_progress(tmp_path: Path) -> None:
    images = [pixels(n, 4, 4) for n in range(200)]
    members = open_members(tar_of(tmp_path / "x.tar", {f"{n}.png": png(image) for n, image in enumerate(images)}))
    kept, seen = list(range(199, -1, -2)), []
    batches = decode_all(members, kept, "x", lambda done, total, text="": seen.append((done, total)))
    decoded = [image for batch in batches for image in batch]
    assert all(np.array_equal(image, images[n]) for image, n in zip(decoded, kept, strict=True))
    assert seen[0] == (0, 100) and seen[-1] == (100, 100) and seen == sorted(seen)


def test_one_damaged_image_among_many_is_named(tmp_path: Path) -> None:
    files = {f"{n}.png": png(pixels(n, 4, 4)) for n in range(150)}
    files["70.png"] = files["70.png"][:40]
    members = open_members(tar_of(tmp_path / "x.tar", files))
    with pytest.raises(InputError, match=r"x: 70.png: expected"):
        list(decode_all(members, list(range(150)), "x", silent))


def test_size_is_estimated_from_headers_and_images_are_decoded_on_access(tmp_path: Path) -> None:
    files = {f"{n}.png": png(pixels(n, 4 + n % 3, 5)) for n in range(30)}
    members = open_members(tar_of(tmp_path / "x.tar", files))
    assert estimate_bytes(members, list(range(30))) == 30 * 3 * 5 * 5
    store = DecodedOnAccess(members, [7, 2], "x")
    assert len(store) == 2 and np.array_equal(store[1], pixels(2, 6, 5))
