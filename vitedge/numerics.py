"""Uniform quantization, written once for every method: grids, scales, rounding, fake-quantization.

    q = clamp(round(x / s) + z, lowest, highest)        x~ = s (q - z)

This is ONNX's QuantizeLinear and DequantizeLinear to the bit: float32, a division by the scale and not a
product with its inverse, halves rounded to even, the zero point added after rounding. What a model learnt or
was judged with in PyTorch is therefore what a runtime computes from the file. How a range is chosen from many
batches is in `vitedge.calibration`, how integers become bytes in `vitedge.packing`.
Shapes: C channels, O rows (outputs) of a weight, I inputs, G groups, S values of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from vitedge import packing
from vitedge.errors import InputError, UsageError


@dataclass(frozen=True)
class Grid:
    """The integers a value may become.

    Args:
        bits: 2 to 16.
        signed: -2^(bits-1)..2^(bits-1)-1, else 0..2^bits-1.
        narrow: Leaves out the lowest integer of a signed grid, so that it is symmetric about zero.

    Raises:
        UsageError: On other widths, and for a narrow unsigned grid.
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise UsageError("quantization grid", expected="2 to 16 bits", found=f"{self.bits}", fix="choose a width in that range")
        if self.narrow and not self.signed:
            raise UsageError(
                "quantization grid",
                expected="a signed grid where it is narrow",
                found="an unsigned one",
                fix="an unsigned grid has no integer to leave out: drop `narrow`",
            )

    @property
    def lowest(self) -> int:
        """The smallest integer of the grid."""
        return -(1 << (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1

    def reduced(self) -> Grid:
        """The grid of one bit less, stored in the same type: for processors whose sums of 8-bit products saturate.

        Raises:
            UsageError: Below 3 bits.
        """
        return Grid(self.bits - 1, self.signed, self.narrow)


@dataclass(frozen=True)
class PerTensor:
    """One range for all values; ranges have shape ()."""


@dataclass(frozen=True)
class PerChannel:
    """One range for each index of an axis: (768, 192) has 768 of them on axis 0."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """One range for each group of values in a row: (768, 192) has (768, 6) of them with a size of 32."""

    size: int


Granularity = PerTensor | PerChannel | PerGroup


def parameters(low: torch.Tensor, high: torch.Tensor, grid: Grid, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32, finite, > 0) and zero point (int32) of ranges, each in the ranges' shape.

    Ranges are widened to contain 0, which is then one of the values. A value inside its range moves by half a step at most.
    A range whose step would be below the smallest normal float32, as of a channel of zeros, gets the step 1: runtimes
    divide by it and multiply it with other scales.

    Args:
        low: Least values, finite, any shape.
        high: Greatest values, finite, the same shape.
        grid: The integers.
        symmetric: Zero point 0 and `s = max(|low|, |high|) / highest`. Otherwise `s = (high - low) / (highest - lowest)`
            and `z = round(lowest - low / s)`.

    Raises:
        InputError: When shapes differ, a bound is infinite or NaN, a low is above its high, or a range with negative
            values shall lie symmetric on an unsigned grid.
    """
    if low.shape != high.shape:
        raise InputError(
            "quantization range", expected="bounds of one shape", found=f"{tuple(low.shape)}, {tuple(high.shape)}", fix="pair them"
        )
    # A float32 difference of two float32 may be infinite; a float64 one is not, and its step fits again.
    bottom, top = low.detach().double(), high.detach().double()
    if not bool((torch.isfinite(bottom) & torch.isfinite(top)).all()):
        raise InputError("quantization range", expected="finite bounds", found="infinite ones or NaN", fix="find the layer that diverged")
    if bool((bottom > top).any()):
        raise InputError("quantization range", expected="low <= high", found="a low above its high", fix="swap them")
    bottom, top = bottom.clamp(max=0), top.clamp(min=0)
    if symmetric:
        if not grid.signed and bool((bottom < 0).any()):
            raise InputError(
                "symmetric quantization range",
                expected="no negative values on an unsigned grid",
                found=f"{float(bottom.min()):g}",
                fix="use a signed grid, or an asymmetric one",
            )
        step = torch.maximum(-bottom, top) / grid.highest
    else:
        step = (top - bottom) / (grid.highest - grid.lowest)
    scale = torch.where(step < torch.finfo(torch.float32).tiny, 1.0, step).float()
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = torch.round(grid.lowest - bottom / scale.double()).clamp(grid.lowest, grid.highest)
    return scale, zero_point.to(torch.int32)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`clamp(round_half_even(x / s) + z, lowest, highest)`, int32 in the shape of x; ONNX's QuantizeLinear.

    Args:
        x: Any shape; computed in the scale's type. Infinite values saturate.
        scale: Broadcasts against x (see `spread`).
        zero_point: In the scale's shape.
        grid: The integers.

    Raises:
        InputError: When x has a NaN, which is no integer.
    """
    if bool(torch.isnan(x).any()):
        raise InputError("values to quantize", expected="numbers", found="NaN", fix="find the layer that diverged")
    return _unbounded(x.detach().to(scale.dtype), scale, zero_point).clamp(grid.lowest, grid.highest).to(torch.int32)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """`s (q - z)` in the scale's type and the shape of q; ONNX's DequantizeLinear."""
    return (q - zero_point).to(scale.dtype) * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What `dequantize(quantize(x))` gives, to the bit and in the scale's type, with a straight-through gradient.

    The gradient by x is 1 where x rounds to an integer of the grid and 0 where it was clamped (Bengio et al. 2013,
    arXiv:1308.3432, with PyTorch's choice of the border); there is none by scale or zero point. NaN stays NaN, so that a
    training that diverges shows it. Nothing here looks at values, so the function can be traced.

    Args:
        x: Any shape.
        scale: Broadcasts against x (see `spread`).
        zero_point: In the scale's shape.
        grid: The integers.
    """
    result: torch.Tensor = _StraightThrough.apply(x.to(scale.dtype), scale.detach(), zero_point, grid.lowest, grid.highest)
    return result


def _unbounded(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The integers before they are clamped, still floating; the sum also turns a rounded -0 into the 0 that integers have."""
    # By a scalar left on the CPU, CUDA would multiply with the inverse, which is one bit off.
    return torch.round(x / scale.to(x.device)) + zero_point


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]  # the library carries no types
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
        unbounded = _unbounded(x, scale, zero_point)
        ctx.save_for_backward((unbounded >= lowest) & (unbounded <= highest))
        return dequantize(unbounded.clamp(lowest, highest), scale, zero_point)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None


def ranges(x: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest values, in the type of x: shape () per tensor, (C,) per channel, (O, G) per group.

    The zeros that fill a row's last group count; `parameters` widens every range to 0 anyway.

    Raises:
        InputError: When x is empty or has an infinite value or a NaN.
    """
    if not x.numel():
        raise InputError("range of values", expected="values", found=f"none in {tuple(x.shape)}", fix="pass a tensor that has some")
    if isinstance(granularity, PerGroup):
        low, high = torch.aminmax(grouped(x, granularity.size), dim=-1)
    elif isinstance(granularity, PerChannel):
        low, high = torch.aminmax(x.movedim(granularity.axis, 0).reshape(x.shape[granularity.axis], -1), dim=1)
    else:
        low, high = torch.aminmax(x)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise InputError("range of values", expected="finite values", found="infinite ones or NaN", fix="find the layer that diverged")
    return low, high


def spread(t: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    """(C,) as a tensor of `ndim` axes that broadcasts along `axis`: for 3 axes and axis 1 it is (1, C, 1)."""
    shape = [1] * ndim
    shape[axis] = -1
    return t.reshape(shape)


def grouped(w_OI: torch.Tensor, size: int) -> torch.Tensor:
    """Rows cut into groups of `size` inputs, (O, ceil(I / size), size), the last one filled up with zeros.

    A weight with more axes has rows of all the values that follow its first axis.

    Raises:
        UsageError: On a size below 1.
        InputError: When there are no rows.
    """
    if size < 1:
        raise UsageError("quantization groups", expected="a size from 1", found=f"{size}", fix="say how many weights share a scale")
    if w_OI.ndim < 2:
        raise InputError("quantization groups", expected="a weight of 2 axes or more", found=f"{w_OI.ndim}", fix="reshape it into rows")
    rows_OI = w_OI.flatten(1)
    filled = torch.nn.functional.pad(rows_OI, (0, -rows_OI.shape[1] % size))
    return filled.unflatten(1, (-1, size))


def ungrouped(g: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """The weight of that shape whose groups are g_OGS, without what filled its rows."""
    return g.flatten(1)[:, : prod(shape[1:])].reshape(shape)


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB, as `vitedge.packing.sqnr_db`."""
    return packing.sqnr_db(reference.detach().double().cpu().numpy(), approximation.detach().double().cpu().numpy())
