"""The preprocessing contract: how an image becomes a model's input, said once and carried with the model.

This is the only implementation that evaluates, calibrates and benches, and this very file travels in
every bundle, so it imports numpy and Pillow alone. A model trained with one interpolation and served
with another silently loses points (0.5 on our CIFAR-10 base for bilinear instead of bicubic), so
the contract is stored in the ONNX metadata and in the manifest, and `check_same` refuses a mismatch.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

METADATA_KEY = "vitedge.preprocessing"
LABELS_KEY = "vitedge.labels"
# Pillow's own numbers; the enumeration that names them is younger than the Pillow of many boards.
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done to an image, in order: colour, resize, crop, scale to [0, 1], normalize, layout.

    Attributes:
        size: Side of the square model input, in pixels.
        crop: `squash` resizes to (size, size) whatever the aspect ratio; `center` resizes the shorter
            side to `size / crop_fraction` and cuts the centre.
        crop_fraction: Share of the resized shorter side that `center` keeps, in (0, 1].
        interpolation: Pillow's filter: nearest, box, bilinear, hamming, bicubic or lanczos (antialiased).
        mean: Per colour channel, of values in [0, 1].
        std: Per colour channel, of values in [0, 1].
        color_order: `RGB` or `BGR`.
        layout: `NCHW` or `NHWC`.
    """

    size: int
    crop: str = "squash"
    crop_fraction: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    color_order: str = "RGB"
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        problems = []
        if type(self.size) is not int or self.size < 1:
            problems.append(f"size must be a positive whole number, not {self.size!r}")
        if self.crop not in ("squash", "center"):
            problems.append(f"crop must be squash or center, not {self.crop!r}")
        if not 0 < self.crop_fraction <= 1:
            problems.append(f"crop_fraction must be in (0, 1], not {self.crop_fraction!r}")
        if self.interpolation not in _FILTERS:
            problems.append(f"interpolation must be one of {', '.join(_FILTERS)}, not {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            problems.append("mean and std must have three values, std above zero")
        if self.color_order not in ("RGB", "BGR") or self.layout not in ("NCHW", "NHWC"):
            problems.append("color_order must be RGB or BGR and layout NCHW or NHWC")
        if problems:
            raise ValueError("; ".join(problems))

    def to_json(self) -> str:
        """Canonical JSON, equal for equal contracts."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Read `to_json`'s output.

        Raises:
            ValueError: Not JSON, a missing or unknown field, or a value out of range.
        """
        try:
            fields: Any = json.loads(text)
            known = {field.name for field in dataclasses.fields(cls)}
            if not isinstance(fields, dict) or set(fields) - known:
                raise ValueError(f"unknown fields {sorted(set(fields) - known)}")
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a preprocessing contract: {error}") from error

    def differences(self, other: Preprocessing) -> list[str]:
        """`name: mine, theirs` for every field that differs, so that a refusal can name it."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{name}: {mine[name]}, {theirs[name]}" for name in mine if mine[name] != theirs[name]]

    def resize_crop(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """One image to uint8 HWC RGB at the model's size.

        Args:
            image: A Pillow image of 8 bits a channel, or a uint8 array HWC (RGB) or HW (grey).

        Raises:
            ValueError: More than 8 bits a channel, which nothing says how to bring down; training refuses those as well.
        """
        # A phone stores a turned photograph as it came off the sensor, with a note to turn it.
        pil = ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else Image.fromarray(image)
        if pil.mode.startswith(("I", "F")):
            raise ValueError(f"more than 8 bits per channel (mode {pil.mode}); convert it to 8 bits, choosing the range yourself")
        if pil.mode != "RGB":
            pil = pil.convert("RGB")
        resample: Any = _FILTERS[self.interpolation]
        if self.crop == "squash":
            if pil.size != (self.size, self.size):
                pil = pil.resize((self.size, self.size), resample)
            return np.asarray(pil)
        target = round(self.size / self.crop_fraction)
        scale = target / min(pil.size)
        width, height = (max(target, round(side * scale)) for side in pil.size)
        if pil.size != (width, height):
            pil = pil.resize((width, height), resample)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return np.asarray(pil.crop((left, top, left + self.size, top + self.size)))

    def __call__(self, images: Iterable[Image.Image | np.ndarray]) -> np.ndarray:
        """Images to the model's input, float32 BCHW (or BHWC)."""
        pixels_BHWC = np.stack([self.resize_crop(image) for image in images])
        return self.normalize(pixels_BHWC)

    def normalize(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """uint8 BHWC RGB at the model's size to float32, normalized, in the contract's layout."""
        # One multiply-add per value: (p / 255 - mean) / std = p * scale + shift.
        scale = (1.0 / (255.0 * np.asarray(self.std))).astype(np.float32)
        shift = (-np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)
        x_BHWC = pixels_BHWC.astype(np.float32) * scale + shift
        if self.color_order == "BGR":
            x_BHWC = x_BHWC[..., ::-1]
        return np.ascontiguousarray(x_BHWC.transpose(0, 3, 1, 2) if self.layout == "NCHW" else x_BHWC)
