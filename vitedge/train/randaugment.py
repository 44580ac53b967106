"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) on batches, with torchvision's operations, table and kernels.

torchvision's transform draws one operation for all it is given. Here each image has its own: images that
drew the same operation with the same sign are given to torchvision as one tensor. Shapes: B batch,
L layers (operations one after the other), C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment

# In an order of our own: a drawn number means the same operation whatever order torchvision's table has.
OPERATIONS: tuple[str, ...] = tuple(sorted(RandAugment._AUGMENTATION_SPACE))
BINS = 31


class _OneOperation(RandAugment):  # type: ignore[misc]  # the library carries no types
    """torchvision's RandAugment of one known operation: nothing is drawn, all else is its own.

    Args:
        name: Of `OPERATIONS`.
        sign: 1 or -1; the direction of operations that have two.
        magnitude: Strength, of `BINS`.
    """

    def __init__(self, name: str, sign: int, magnitude: int) -> None:
        # Bilinear as in torchvision's own training recipes (references/classification/presets.py); what moves in is black.
        super().__init__(num_ops=1, magnitude=magnitude, num_magnitude_bins=BINS, interpolation=InterpolationMode.BILINEAR)
        magnitudes, _ = RandAugment._AUGMENTATION_SPACE[name]

        def signed(bins: int, height: int, width: int) -> torch.Tensor | None:
            values = magnitudes(bins, height, width)
            return None if values is None else values * sign

        self._item = name, (signed, False)

    def _get_random_item(self, dct: Mapping[str, Any]) -> tuple[str, tuple[Any, bool]]:
        return self._item


class BatchedRandAugment:
    """Applies drawn operations, each image its own.

    Args:
        magnitude: Strength of all operations, 0..30.
    """

    def __init__(self, magnitude: int) -> None:
        self._transforms = [tuple(_OneOperation(name, sign, magnitude) for sign in (1, -1)) for name in OPERATIONS]
        self._has_sign = np.array([RandAugment._AUGMENTATION_SPACE[name][1] for name in OPERATIONS])

    def __call__(self, pixels_BCHW: torch.Tensor, operations_BL: np.ndarray, negative_BL: np.ndarray) -> torch.Tensor:
        """Augmented images, uint8 BCHW as those given.

        Args:
            pixels_BCHW: uint8, RGB.
            operations_BL: Positions in `OPERATIONS`.
            negative_BL: Whether an operation that has two directions takes the negative one.
        """
        for layer in range(operations_BL.shape[1]):
            pixels_BCHW = self._apply(pixels_BCHW, operations_BL[:, layer], negative_BL[:, layer])
        return pixels_BCHW

    def _apply(self, pixels_BCHW: torch.Tensor, operations_B: np.ndarray, negative_B: np.ndarray) -> torch.Tensor:
        kinds_B = 2 * operations_B.astype(np.int64) + (negative_B & self._has_sign[operations_B])
        order_B = np.argsort(kinds_B, kind="stable")
        kinds, counts = np.unique(kinds_B, return_counts=True)
        device = pixels_BCHW.device
        parts = pixels_BCHW[torch.from_numpy(order_B).to(device, non_blocking=True)].split(counts.tolist())
        done = [self._transforms[kind // 2][kind % 2](part) for kind, part in zip(kinds.tolist(), parts, strict=True)]
        return torch.cat(done)[torch.from_numpy(np.argsort(order_B)).to(device, non_blocking=True)]
