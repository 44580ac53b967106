"""The preprocessing contract on batches of square images: Pillow's resize as matrix products, then crop and normalize.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from vitedge.preprocess import Preprocessing

# Pillow's filters: half width in source pixels, and weight at distance t (Pillow's Resample.c; Keys 1981 with a = -0.5 for bicubic).
SUPPORT = {"box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}


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
def resize_matrix(source: int, target: int, interpolation: str, device: torch.device) -> torch.Tensor:
    """One pass of Pillow's separable resize as a matrix, float64 (target, source).

    torch's own antialiased resize differs from Pillow's by several of 255 at hard edges (torch 2.15),
    so the weights are Pillow's: rows sum to one, the filter widens when shrinking, 22 fractional bits.
    """
    scale = source / target
    weights = np.zeros((target, source))
    widened = max(scale, 1.0)
    support = SUPPORT[interpolation] * widened
    for row in range(target):
        center = (row + 0.5) * scale
        first, last = max(0, int(center - support + 0.5)), min(source, int(center + support + 0.5))
        taps = _filter_weight(interpolation, (np.arange(first, last) - center + 0.5) / widened)
        weights[row, first:last] = np.round(taps / taps.sum() * 2**22) / 2**22
    return torch.from_numpy(weights).to(device)


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
        matrix = resize_matrix(x_BCHW.shape[-1], size, contract.interpolation, x_BCHW.device)
        x_BCHW = _to_whole(matrix @ _to_whole(x_BCHW.double() @ matrix.T))
    start = (size - contract.size) // 2
    return x_BCHW[..., start : start + contract.size, start : start + contract.size].float()


@functools.lru_cache(maxsize=64)
def _mean_and_std(contract: Preprocessing, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Per channel, (1, 3, 1, 1); kept, because making a tensor on a GPU waits for all that was asked of it before."""
    return torch.tensor(contract.mean, device=device).view(1, 3, 1, 1), torch.tensor(contract.std, device=device).view(1, 3, 1, 1)


def normalize_batch(pixels_BCHW: torch.Tensor, contract: Preprocessing) -> torch.Tensor:
    """Batched `Preprocessing.normalize` for channels-first pixels 0..255 to float32."""
    mean, std = _mean_and_std(contract, pixels_BCHW.device)
    return pixels_BCHW.float().div(255.0).sub_(mean).div_(std)
