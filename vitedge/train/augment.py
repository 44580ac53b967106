"""Batches for training: shifts and flips on stored pixels, then the preprocessing contract, all batched.

Every random number is drawn from a generator seeded by (seed, step), so a resumed run sees what an
uninterrupted one does, whatever step it resumes from. Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from vitedge.preprocess import Preprocessing

_BATCHED_FILTERS = ("bilinear", "bicubic")


def resize_crop_batch(pixels_BCHW: torch.Tensor, contract: Preprocessing) -> torch.Tensor:
    """Batched `Preprocessing.resize_crop`: uint8 BCHW of one size to uint8 at the model's size.

    Within one step of 255 of the Pillow implementation, which rounds between its two passes.
    """
    height, width = pixels_BCHW.shape[-2:]
    if contract.crop == "squash":
        target = (contract.size, contract.size)
    else:
        side = round(contract.size / contract.crop_fraction)
        scale = side / min(height, width)
        target = (max(side, round(height * scale)), max(side, round(width * scale)))
    if (height, width) != target:
        pixels_BCHW = F.interpolate(pixels_BCHW, size=target, mode=contract.interpolation, antialias=True, align_corners=False)
    top, left = (target[0] - contract.size) // 2, (target[1] - contract.size) // 2
    return pixels_BCHW[..., top : top + contract.size, left : left + contract.size]


def normalize_batch(pixels_BCHW: torch.Tensor, contract: Preprocessing) -> torch.Tensor:
    """Batched `Preprocessing.normalize` for channels-first pixels: uint8 to float32."""
    mean = torch.tensor(contract.mean, device=pixels_BCHW.device).view(1, 3, 1, 1)
    std = torch.tensor(contract.std, device=pixels_BCHW.device).view(1, 3, 1, 1)
    return (pixels_BCHW.float() / 255.0 - mean) / std


def shift_batch(pixels_BCHW: torch.Tensor, limit: int, generator: np.random.Generator) -> torch.Tensor:
    """Shift each image by up to `limit` pixels each way; what moves in is black, as in a padded random crop."""
    batch, _, height, width = pixels_BCHW.shape
    padded = F.pad(pixels_BCHW, (limit, limit, limit, limit))
    offsets = torch.from_numpy(generator.integers(0, 2 * limit + 1, size=(2, batch))).to(pixels_BCHW.device)
    rows = (offsets[0][:, None] + torch.arange(height, device=offsets.device))[:, None, :, None]
    columns = (offsets[1][:, None] + torch.arange(width, device=offsets.device))[:, None, None, :]
    images = torch.arange(batch, device=offsets.device)[:, None, None, None]
    channels = torch.arange(3, device=offsets.device)[None, :, None, None]
    return padded[images, channels, rows, columns]


def flip_batch(pixels_BCHW: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Mirror each image left to right with probability one half."""
    chosen = torch.from_numpy(generator.random(len(pixels_BCHW)) < 0.5).to(pixels_BCHW.device)
    return torch.where(chosen[:, None, None, None], pixels_BCHW.flip(-1), pixels_BCHW)


class Batches:
    """Images and labels of a split as model inputs, drawn by index.

    Images of one size are resized and augmented as one tensor; images of many sizes go one by one
    through the Pillow contract first, then are augmented as a batch.

    Args:
        images: uint8 HWC each.
        labels: int64 (N,).
        contract: The preprocessing contract.
        torch_device: Where tensors go.
    """

    def __init__(self, images: Sequence[np.ndarray], labels: np.ndarray, contract: Preprocessing, torch_device: torch.device) -> None:
        self.images, self.labels, self.contract, self.torch_device = images, labels, contract, torch_device
        self.batched = bool(getattr(images, "uniform", False)) and contract.interpolation in _BATCHED_FILTERS

    def __len__(self) -> int:
        return len(self.labels)

    def _pixels(self, indices: np.ndarray) -> torch.Tensor:
        if self.batched:
            taken: Any = self.images
            pixels_BHWC = np.ascontiguousarray(taken[indices])
        else:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                pixels_BHWC = np.stack(list(pool.map(lambda i: self.contract.resize_crop(self.images[int(i)]), indices)))
        return torch.from_numpy(pixels_BHWC).to(self.torch_device).permute(0, 3, 1, 2)

    def take(self, indices: np.ndarray, generator: np.random.Generator | None = None, flip: bool = False, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Model inputs float32 BCHW and labels (B,); augmented where a generator is given."""
        pixels_BCHW = self._pixels(indices)
        if generator is not None and shift:
            pixels_BCHW = shift_batch(pixels_BCHW, shift, generator)
        if generator is not None and flip:
            pixels_BCHW = flip_batch(pixels_BCHW, generator)
        x_BCHW = normalize_batch(resize_crop_batch(pixels_BCHW, self.contract), self.contract)
        return x_BCHW, torch.from_numpy(self.labels[indices]).to(self.torch_device)
