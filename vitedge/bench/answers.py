"""What a model answered to each image, packed small enough to be kept with a measurement.

With it any two measurements on the same images can be compared in pairs later, of other recipes and
other runs too: 10,000 images of ten classes take about 8 KB of JSON.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitedge.errors import InputError


@dataclass(frozen=True)
class Answers:
    """A model's answers.

    Attributes:
        images: Digest of which images, in which order; answers of equal digests can be paired.
        correct: bool (N,), whether each image's label had the largest logit.
        predictions: int64 (N,), class of the largest logit.
    """

    images: str
    correct: np.ndarray
    predictions: np.ndarray


def pack(answers: Answers) -> dict[str, Any]:
    """Plain data for JSON: `correct` a bit an image, `predictions` one byte or two, both deflated and in base64."""
    width = 1 if int(answers.predictions.max()) < 256 else 2
    return {
        "images": answers.images,
        "count": len(answers.correct),
        "class_bytes": width,
        "correct": _text(np.packbits(answers.correct.astype(bool)).tobytes()),
        "predictions": _text(answers.predictions.astype(f"<u{width}").tobytes()),
    }


def unpack(packed: dict[str, Any], where: str) -> Answers:
    """Read `pack`'s data back.

    Args:
        packed: The plain data.
        where: What it was read from, for the error.

    Raises:
        InputError: It is damaged.
    """
    try:
        count, width = int(packed["count"]), int(packed["class_bytes"])
        if count < 1 or width not in (1, 2):
            raise ValueError(f"{count} images, {width} bytes a class")
        bits = np.frombuffer(_bytes(packed["correct"], -(-count // 8)), np.uint8)
        predictions = np.frombuffer(_bytes(packed["predictions"], count * width), f"<u{width}")
        return Answers(str(packed["images"]), np.unpackbits(bits, count=count).astype(bool), predictions.astype(np.int64))
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise InputError(
            where, expected="packed answers of a model", found=f"damage ({error})", fix="measure again with `vitedge bench`"
        ) from error


def _text(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")


def _bytes(text: str, size: int) -> bytes:
    """Unpacks no more than is expected, whatever the text claims."""
    content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    if len(content) != size:
        raise ValueError(f"{len(content)} bytes for {size}")
    return content
