"""Batches for training: shifts and flips on stored pixels, then the preprocessing contract, all batched.

Every random number is drawn from a generator seeded by (seed, step), so a resumed run sees what an
uninterrupted one does, whatever step it resumes from. Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from vitedge.preprocess import Preprocessing

# Pillow's filters: half width in source pixels, and weight at distance t (Pillow's Resample.c; Keys 1981 with a = -0.5 for bicubic).
_SUPPORT = {"box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}


def _filter_weight(interpolation: str, t: np.ndarray) -> np.ndarray:
    distance = np.abs(t)
    if interpolation == "box":
        return np.where((t > -0.5) & (t <= 0.5), 1.0, 0.0)
    if interpolation == "bilinear":
        return np.where(distance < 1.0, 1.0 - distance, 0.0)
    if interpolation == "hamming":
        return np.where(distance < 1.0, np.sinc(t) * (0.54 + 0.46 * np.cos(np.pi * t)), 0.0)
    if interpolation == "lanczos":
        return np.where(distance < 3.0, np.sinc(t) * np.sinc(t / 3.0), 0.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((distance - 5.0) * distance + 8.0) * distance * -0.5 + 2.0
    return np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))


@functools.lru_cache(maxsize=64)
def resize_matrix(source: int, target: int, interpolation: str) -> torch.Tensor:
    """One pass of Pillow's separable resize as a matrix, float64 (target, source).

    torch's own antialiased resize differs from Pillow's by several of 255 at hard edges (torch 2.15),
    so the weights are Pillow's: rows sum to one, the filter widens when shrinking, 22 fractional bits.
    """
    scale = source / target
    weights = np.zeros((target, source))
    widened = max(scale, 1.0)
    support = _SUPPORT[interpolation] * widened
    for row in range(target):
        center = (row + 0.5) * scale
        first, last = max(0, int(center - support + 0.5)), min(source, int(center + support + 0.5))
        taps = _filter_weight(interpolation, (np.arange(first, last) - center + 0.5) / widened)
        weights[row, first:last] = np.round(taps / taps.sum() * 2**22) / 2**22
    return torch.from_numpy(weights)


def _to_whole(x: torch.Tensor) -> torch.Tensor:
    """Round halves up and clamp to 0..255, as Pillow does after each pass."""
    return x.add_(0.5).floor_().clamp_(0, 255)


def resize_crop_batch(pixels_BCHW: torch.Tensor, contract: Preprocessing) -> torch.Tensor:
    """Batched `Preprocessing.resize_crop`: uint8 BCHW, square, to whole numbers 0..255, float32, at the model's size.

    Equal to the Pillow implementation: columns first, then rows, rounded in between, in exact arithmetic.
    """
    size = contract.size if contract.crop == "squash" else round(contract.size / contract.crop_fraction)
    x_BCHW = pixels_BCHW
    if x_BCHW.shape[-1] != size:
        matrix = resize_matrix(x_BCHW.shape[-1], size, contract.interpolation).to(x_BCHW.device)
        x_BCHW = _to_whole(matrix @ _to_whole(x_BCHW.double() @ matrix.T))
    start = (size - contract.size) // 2
    return x_BCHW[..., start : start + contract.size, start : start + contract.size].float()


def normalize_batch(pixels_BCHW: torch.Tensor, contract: Preprocessing) -> torch.Tensor:
    """Batched `Preprocessing.normalize` for channels-first pixels 0..255 to float32."""
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

    Square images of one size are augmented and resized as one tensor. All others go one by one through
    the Pillow contract first and are augmented after it: Pillow chooses the order of its two passes by
    shape and version, so only squares have a batched twin that is exact.

    Args:
        images: uint8 HWC each.
        labels: int64 (N,).
        contract: The preprocessing contract.
        torch_device: Where tensors go.
    """

    def __init__(self, images: Sequence[np.ndarray], labels: np.ndarray, contract: Preprocessing, torch_device: torch.device) -> None:
        self.images, self.labels, self.contract, self.torch_device = images, labels, contract, torch_device
        square = len(labels) > 0 and images[0].shape[0] == images[0].shape[1]
        self.batched = square and bool(getattr(images, "uniform", False)) and contract.interpolation in _SUPPORT

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

    def take(
        self, indices: np.ndarray, generator: np.random.Generator | None = None, flip: bool = False, shift: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Model inputs float32 BCHW and labels (B,); augmented where a generator is given."""
        pixels_BCHW = self._pixels(indices)
        if generator is not None and shift:
            pixels_BCHW = shift_batch(pixels_BCHW, shift, generator)
        if generator is not None and flip:
            pixels_BCHW = flip_batch(pixels_BCHW, generator)
        pixels_BCHW = resize_crop_batch(pixels_BCHW, self.contract) if self.batched else pixels_BCHW
        x_BCHW = normalize_batch(pixels_BCHW, self.contract)
        return x_BCHW, torch.from_numpy(self.labels[indices]).to(self.torch_device)
