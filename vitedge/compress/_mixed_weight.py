"""A weight whose groups have widths of their own: how it is rounded, packed into bytes, and taken out of them.

Defossez et al. 2021 (arXiv:2104.09987), section 3: one range for the tensor, one width b for each group, the step
(max - min) / (2^b - 1). Zero is one of the values: each width has its own integer zero point (METHODS, section 1).
Shapes: O and I a layer's output and input features, G groups of S inputs in a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from vitedge import packing
from vitedge.errors import InputError
from vitedge.models.quantized import IntegerWeight
from vitedge.numerics import Grid, grouped, parameters, quantize, ungrouped

WIDTH_BITS = 4  # that a group's width is stored in: up to 15 bits
RANGE_BYTES = 8  # two float32


def group_sizes(width_shape: tuple[int, int], in_features: int, group: int) -> torch.Tensor:
    """Weights in each group, int64 (O, G): the last of a row may have fewer."""
    sizes_OG = torch.full(width_shape, group)
    sizes_OG[:, -1] = in_features - (width_shape[1] - 1) * group
    return sizes_OG


def stored_bytes(widths_OG: torch.Tensor, sizes_OG: torch.Tensor) -> int:
    """Bytes of a weight in the checkpoint: its range, each group's width, and the values; each width's ends on a whole byte."""
    size = RANGE_BYTES + packing.packed_bytes(widths_OG.numel(), WIDTH_BITS)
    for width in widths_OG.unique().tolist():
        size += packing.packed_bytes(int(sizes_OG[widths_OG == width].sum()), int(width))
    return size


def grids(low: torch.Tensor, high: torch.Tensor, widths_OG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32) and zero point (int32) of each group, (O, G), for one range and integer widths."""
    scale_OG, zero_OG = torch.ones(widths_OG.shape, device=low.device), torch.zeros(widths_OG.shape, dtype=torch.int32, device=low.device)
    for width in widths_OG.unique().tolist():
        chosen = widths_OG == width
        scale_OG[chosen], zero_OG[chosen] = parameters(low, high, Grid(int(width), signed=False), symmetric=False)
    return scale_OG, zero_OG


def integers(w_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor, widths_OG: torch.Tensor, group: int) -> torch.Tensor:
    """The weight rounded to its groups' grids, int32 (O, I).

    Raises:
        InputError: The weight has a NaN.
    """
    groups_OGS = grouped(w_OI, group)
    values_OGS = torch.zeros(groups_OGS.shape, dtype=torch.int32, device=w_OI.device)
    for width in widths_OG.unique().tolist():
        chosen, grid = widths_OG == width, Grid(int(width), signed=False)
        values_OGS[chosen] = quantize(groups_OGS[chosen], scale_OG[chosen][:, None], zero_OG[chosen][:, None], grid)
    return ungrouped(values_OGS, w_OI.shape)


class MixedWeight(IntegerWeight):
    """A weight matrix kept as integers whose width differs from group to group of its input features.

    In a state dict it is one tensor of bytes, `packed`: the range, the widths, and the values at their own widths.
    A runtime is given what is nearest: every group as integers of `widest` bits, with its scale and zero point.

    Args:
        in_features, out_features: I and O.
        group: Inputs that share a width.
        widest: Largest width, 2..15.
        packed_bytes: Bytes of `packed`.
    """

    widths: torch.Tensor

    def __init__(self, in_features: int, out_features: int, group: int, widest: int, packed_bytes: int) -> None:
        super().__init__(in_features, out_features, widest, signed=False, group=group)
        self.packed_bytes = packed_bytes
        for name in ("scale", "zero_point"):  # they follow from the range and the widths
            self.register_buffer(name, getattr(self, name), persistent=False)
        self.register_buffer("range", torch.zeros(2), persistent=False)
        self.register_buffer("widths", torch.zeros(self.scale.T.shape, dtype=torch.uint8), persistent=False)

    @classmethod
    def of(cls, w_OI: torch.Tensor, low: torch.Tensor, high: torch.Tensor, widths_OG: torch.Tensor, group: int) -> MixedWeight:
        """Round a weight.

        Args:
            w_OI: The weight, clamped to the range where it exceeds it.
            low, high: The range, float32.
            widths_OG: Bits of each group.
            group: Inputs that share a width.

        Raises:
            InputError: The weight is not finite.
        """
        sizes_OG = group_sizes((widths_OG.shape[0], widths_OG.shape[1]), w_OI.shape[1], group)
        size = stored_bytes(widths_OG.cpu(), sizes_OG)
        made: MixedWeight = cls(w_OI.shape[1], w_OI.shape[0], group, int(widths_OG.max()), size).to(w_OI.device)
        made._follow(low, high, widths_OG)
        values_OI = integers(w_OI, made.scale.T.contiguous(), made.zero_point.T.to(torch.int32), widths_OG, group)
        made.values.copy_(values_OI.T)
        return made

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor but the sizes, which are the layer's."""
        return {"group": self.group, "widest": self.bits, "packed_bytes": self.packed_bytes}

    def _follow(self, low: torch.Tensor, high: torch.Tensor, widths_OG: torch.Tensor) -> None:
        """Take over range and widths, and what follows from them."""
        self.range.copy_(torch.stack([low.detach(), high.detach()]))
        self.widths.copy_(widths_OG)
        scale_OG, zero_OG = grids(self.range[0], self.range[1], self.widths)
        self.scale.copy_(scale_OG.T)
        self.zero_point.copy_(zero_OG.T)

    def _chosen(self, width: int) -> Any:
        """Which values (O, I) are of a width."""
        group = self.group or self.in_features
        return (self.widths.cpu().numpy() == width).repeat(group, axis=1)[:, : self.in_features]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        packed = np.zeros(self.packed_bytes, np.uint8)  # of a module that has no values yet, only the size is known
        if bool(self.widths.any()):
            widths, values_OI = self.widths.cpu().numpy(), self.values.cpu().to(torch.int32).numpy().T
            parts = [self.range.cpu().numpy().astype("<f4").view(np.uint8), packing.pack(widths, WIDTH_BITS, signed=False)]
            parts += [packing.pack(values_OI[self._chosen(width)], width, signed=False) for width in np.unique(widths).tolist()]
            packed = np.concatenate(parts)
        destination[f"{prefix}packed"] = torch.from_numpy(packed)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        packed = state_dict.pop(f"{prefix}packed", None)
        if packed is None:
            args[2].append(f"{prefix}packed")  # torch's list of missing keys
        else:
            self._unpack(packed.cpu().numpy(), prefix)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def _unpack(self, packed: Any, prefix: str) -> None:
        """Read the bytes back.

        Raises:
            InputError: They are not as many as their widths say, or a width is none.
        """
        ends = RANGE_BYTES + packing.packed_bytes(self.widths.numel(), WIDTH_BITS)
        low, high = torch.from_numpy(packed[:RANGE_BYTES].view("<f4").astype(np.float32))
        widths = packing.unpack(packed[RANGE_BYTES:ends], WIDTH_BITS, self.widths.numel(), signed=False)
        if not 2 <= widths.min() <= widths.max() <= self.bits:
            raise InputError(
                f"{prefix}packed",
                expected=f"widths of 2 to {self.bits} bits",
                found=f"{widths.min()} to {widths.max()}",
                fix="train it again",
            )
        self._follow(low, high, torch.from_numpy(widths).reshape(self.widths.shape))
        values_OI = np.zeros((self.out_features, self.in_features), np.int32)
        for width in np.unique(widths).tolist():
            chosen = self._chosen(width)
            begins, ends = ends, ends + packing.packed_bytes(int(chosen.sum()), width)
            values_OI[chosen] = packing.unpack(packed[begins:ends], width, int(chosen.sum()), signed=False)
        if ends != len(packed):
            raise InputError(f"{prefix}packed", expected=f"{ends} bytes", found=f"{len(packed)}", fix="train it again")
        self.values.copy_(torch.from_numpy(values_OI.T.copy()))
