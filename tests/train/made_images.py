"""Images with known pixels for the tests of augmentation."""

from __future__ import annotations

import numpy as np


class UniformImages(np.ndarray):
    """One array of images of one size, as `vitedge.data.Images` of CIFAR is."""

    uniform = True


def photographs(count: int, height: int, width: int) -> np.ndarray:
    """Smooth fields with hard edges, where interpolations differ most; uint8 NHWC."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 3.0 + c) * np.cos(y / 4.0 - c) for c in range(3)], -1) * 100 + 128
    images = waves[None] + generator.normal(0, 20, size=(count, height, width, 3))
    images[:, height // 3 : height // 2, width // 4 : width // 2] = 255
    return images.clip(0, 255).astype(np.uint8)
