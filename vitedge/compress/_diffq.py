"""DiffQ's widths: learned for each group of weights, counted as the bytes they take, and made integers that fit a size.

Defossez et al. 2021 (arXiv:2104.09987): the width of a group is a parameter, and a multiple of the model's size a term of the loss.
Shapes: O and I a layer's output and input features, G groups of inputs in a row, B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitedge.compress import Batch
from vitedge.compress._mixed_weight import RANGE_BYTES, WIDTH_BITS, group_sizes, stored_bytes
from vitedge.packing import packed_bytes

MIB = 1024 * 1024
# Bytes by which the values of a weight may exceed their bits: the values of each of 14 widths end on a whole byte.
ROUNDING_BYTES = 14
# How the penalty is steered towards the target: per unit that the size is too large, in units of log(penalty).
STEER_TOTAL, STEER_NOW, STEER_LIMIT = 60.0, 4.0, 8.0
RAMP = 0.6  # share of the steps with noise after which the target shall be reached


class GroupBits(nn.Module):  # type: ignore[misc]  # the library carries no types
    """The widths of one weight's groups, learned within limits through a sigmoid, until they are settled as integers.

    Args:
        weight: Of the layer; rows are its first axis.
        group: Inputs that share a width.
        limits: Least and greatest width.
        start: Width to begin with; an integer, where they are not learned.
        learned: Whether they are learned.
        lr_scale: Their learning rate in multiples of the schedule's.
    """

    settled: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, group: int, limits: tuple[int, int], start: float, learned: bool = True, lr_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.rows, self.columns = weight.shape[0], weight[0].numel()
        self.group, self.limits, self.learned = group, limits, learned
        self.shape = (self.rows, math.ceil(self.columns / group))
        self.sizes_OG = group_sizes(self.shape, self.columns, group)
        least, most = limits
        settled = torch.zeros(self.shape, dtype=torch.uint8)
        if learned:
            share = (start - least) / (most - least)
            # A vector, so that no optimizer decays it or takes it for a matrix.
            self.logits = nn.Parameter(torch.full((self.shape[0] * self.shape[1],), math.log(share / (1 - share))))
            self.logits.lr_scale = lr_scale
        else:
            settled.fill_(int(start))
        self.register_buffer("settled", settled)
        self.planned = settled.clone()  # what eval mode rounds to; kept by `BitPlan`

    def bits(self) -> torch.Tensor:
        """Width of each group, a real number, (O, G)."""
        if not self.learned:
            return self.settled.float()
        least, most = self.limits
        return (least + (most - least) * torch.sigmoid(self.logits)).reshape(self.shape)

    def stored_bits(self) -> torch.Tensor:
        """Bits of this weight in the checkpoint, with a gradient by the widths; for integer ones exact to `ROUNDING_BYTES`."""
        fixed = 8 * (RANGE_BYTES + packed_bytes(self.rows * self.shape[1], WIDTH_BITS))
        # Summed in float64: the whole is a million times its parts.
        return (self.bits().double() * self.sizes_OG.to(self.settled.device)).sum() + fixed


class BitPlan(nn.Module):  # type: ignore[misc]  # the library carries no types
    """All widths of a model: its size, the penalty on it, and the integers that are saved.

    Args:
        widths: Of every quantized weight, in order.
        other_bytes: What else the checkpoint holds: float tensors and its header.
        target_bytes: Largest size of the checkpoint; None where the penalty alone decides.
        penalty: Of a MiB; with a target, where its steering begins.
        round_share: Share of the last steps with settled widths.
    """

    pressure: torch.Tensor

    def __init__(self, widths: list[GroupBits], other_bytes: int, target_bytes: int | None, penalty: float, round_share: float) -> None:
        super().__init__()
        self.widths = tuple(widths)  # a tuple: they are modules of their layers
        self.other_bytes, self.target_bytes, self.round_share = other_bytes, target_bytes, round_share
        self.rounding, self.made = False, 0
        self.stale = True
        self.register_buffer("pressure", torch.tensor([math.log(penalty) if penalty else -math.inf, 0.0], dtype=torch.float64))
        with torch.no_grad():
            self.start_bytes = float(self.bytes())

    def bytes(self) -> torch.Tensor:
        """Size of the checkpoint at the widths as they are learned, float64 (), with a gradient."""
        total: torch.Tensor = sum((w.stored_bits() for w in self.widths), torch.zeros((), dtype=torch.float64)) / 8 + self.other_bytes
        return total

    def penalty(self) -> torch.Tensor:
        """What a MiB costs now: exp of what was summed up, and of what is too much now."""
        return self.pressure.sum().exp()

    @property
    def is_settled(self) -> bool:
        """Whether the widths are final."""
        return all(bool(w.settled.any()) for w in self.widths)

    def on_step(self, step: int, steps: int) -> None:
        """Before each optimizer step: settle the widths when it is time, else steer the penalty."""
        noise_steps = steps - round(self.round_share * steps)
        self.rounding = self.is_settled or step >= noise_steps
        if self.rounding:
            self.settle()
        elif self.target_bytes is not None:
            self.steer(step, noise_steps)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def steer(self, step: int, noise_steps: int) -> None:
        """Raise the penalty where the size is above its course, lower it where below: the course falls to the target, then stays.

        A dual ascent on log(penalty) (so it stays positive) with a term for the present, which damps it.
        """
        assert self.target_bytes is not None
        left = max(0.0, 1 - (step + 1) / max(1, RAMP * noise_steps))
        course = self.target_bytes * (max(self.start_bytes, self.target_bytes) / self.target_bytes) ** left
        excess = float(self.bytes()) / course - 1
        total = float(self.pressure[0]) + STEER_TOTAL / noise_steps * excess
        self.pressure[0] = max(-STEER_LIMIT, min(STEER_LIMIT, total))
        self.pressure[1] = STEER_NOW * excess

    def settle(self) -> None:
        """Make the widths final."""
        if not self.is_settled:
            self.allot()
            for widths in self.widths:
                widths.settled.copy_(widths.planned)

    def train(self, mode: bool = True) -> BitPlan:
        """As torch's; weights may have changed since the last time they were rounded."""
        self.stale = True
        super().train(mode)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.stale = True
        super()._load_from_state_dict(*args)

    def current(self) -> int:
        """A number that changes whenever weights are to be rounded anew; plans the widths if they are not."""
        if self.stale:
            self.allot()
            self.stale, self.made = False, self.made + 1
        return self.made

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def allot(self) -> None:
        """Plan integer widths: the learned ones rounded, shifted together so that the file takes up the target and no more."""
        for widths in self.widths:
            widths.planned = widths.settled.clone()
        open_ = [widths for widths in self.widths if not bool(widths.settled.any())]
        if not open_:
            return
        least, most = open_[0].limits
        bits = torch.cat([w.bits().double().flatten().cpu() for w in open_])
        if self.target_bytes is None:
            integer = bits.round().clamp(least, most).to(torch.uint8)
        else:
            sizes = torch.cat([w.sizes_OG.flatten() for w in open_])
            room = 8 * (self.target_bytes - self.other_bytes - self.fixed_bytes())
            room -= sum(int((w.settled.cpu() * w.sizes_OG).sum()) for w in self.widths if bool(w.settled.any()))
            integer = shifted(bits, sizes, room, (least, most))
        for widths, part in zip(open_, integer.split([w.sizes_OG.numel() for w in open_]), strict=True):
            widths.planned = part.reshape(widths.shape).to(widths.settled.device)

    def fixed_bytes(self) -> int:
        """Bytes of the quantized weights beside their values, at most."""
        return sum(RANGE_BYTES + packed_bytes(w.sizes_OG.numel(), WIDTH_BITS) + ROUNDING_BYTES for w in self.widths)

    def least_bytes(self) -> int:
        """Size of the checkpoint with every learned width at its least, at most so many bytes."""
        bits = sum(int((w.sizes_OG * (w.limits[0] if w.learned else w.settled)).sum()) for w in self.widths)
        return self.other_bytes + self.fixed_bytes() + math.ceil(bits / 8)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def report(self) -> dict[str, Any]:
        """The planned widths, and the bytes of the weights packed and as runtimes have them, for the manifest."""
        counts: dict[int, int] = {}
        packed = wide = values = bits = 0
        for widths in self.widths:
            planned = widths.planned.cpu()
            packed += stored_bytes(planned, widths.sizes_OG)
            widest = int(planned.max())
            integer_bits = 4 if widest <= 4 else 8 if widest <= 8 else 16
            values += int(widths.sizes_OG.sum())
            bits += int((planned * widths.sizes_OG).sum())
            # With each group a float32 scale and a zero point.
            wide += math.ceil((int(widths.sizes_OG.sum()) + planned.numel()) * integer_bits / 8) + 4 * planned.numel()
            for width, count in zip(*planned.unique(return_counts=True), strict=True):
                counts[int(width)] = counts.get(int(width), 0) + int(count)
        return {
            "packed_bytes": packed,
            "onnx_weight_bytes": wide,
            "other_bytes_at_most": self.other_bytes,
            "mean_bits": round(bits / values, 3),
            "groups_by_bits": {str(width): counts[width] for width in sorted(counts)},
        }


def shifted(bits: torch.Tensor, sizes: torch.Tensor, room: int, limits: tuple[int, int]) -> torch.Tensor:
    """Widths rounded after one shift for all, the largest with which they take at most `room` bits, uint8 (n,).

    What room is left goes to the groups that are nearest to their next integer, the first of those that are equally near.

    Args:
        bits: Widths, float64 (n,).
        sizes: Weights in each group, (n,).
        room: Bits; at least those of the least widths.
        limits: Least and greatest width.
    """
    least, most = limits
    below, above = float(least - most), float(most - least)
    for _ in range(50):
        middle = (below + above) / 2
        taken = int((torch.round(bits + middle).clamp(least, most) * sizes).sum())
        below, above = (middle, above) if taken <= room else (below, middle)
    integer = torch.round(bits + below).clamp(least, most)
    left = room - int((integer * sizes).sum())
    nearest = torch.argsort(integer - (bits + below), stable=True)
    nearest = nearest[integer[nearest] < most]
    fit = nearest[torch.cumsum(sizes[nearest], 0) <= left]
    integer[fit] += 1
    return integer.to(torch.uint8)


@dataclass
class SizePenalty:
    """The size of the checkpoint as a term of the loss, equation 6; the same for every image."""

    plan: BitPlan
    label_share: float = 1.0

    def __call__(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """`penalty * MiB` float32 (B,), with a gradient by the widths; nothing once they are settled."""
        size_mib = self.plan.bytes() / MIB
        # Not left out, so that a run of many processes finds every parameter in every step.
        cost = size_mib * (0.0 if self.plan.rounding else self.plan.penalty())
        return cost.float().expand(len(batch.target))
