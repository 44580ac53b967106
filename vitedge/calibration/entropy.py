"""The range that keeps most of the distribution. Shapes: B bins, K candidates, L levels."""

from __future__ import annotations

import math

import torch

from vitedge.calibration._histogram import Binned
from vitedge.errors import UsageError
from vitedge.numerics import Grid


class Entropy(Binned):
    """The threshold at which quantized values keep most of the distribution: least KL divergence.

    S. Migacz, 8-bit inference with TensorRT (GTC 2017), with levels of equal width also where they do not divide the
    bins. It is a threshold of |x|: symmetric, or one-sided where the values have one sign and the range need not be
    symmetric, with all the grid's integers as levels. Attention after softmax, nearly all of it close to 0, is clipped much
    too far by this measure: made values kept 9 dB of the 28 that min-max kept at 8 bits.

    Args:
        bins: As in the histogram; at least 4 for each level.
    """

    def __init__(self, grid: Grid, symmetric: bool, axis: int | None = None, *, bins: int = 2048) -> None:
        super().__init__(grid, symmetric, axis, bins=bins)
        most = grid.highest + 1 if symmetric else grid.highest - grid.lowest + 1
        if bins < 4 * most:
            raise UsageError(
                "entropy: bins",
                expected=f"at least {4 * most}, 4 for each of {most} levels",
                found=f"{bins}",
                fix="pass more bins, or use the method minmax or mse, which suit many bits",
            )

    def _bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        levels = self.grid.highest - self.grid.lowest + 1
        kept = []
        for counts_B, low, high in zip(self._magnitudes(), self._low.tolist(), self._high.tolist(), strict=True):
            if self.symmetric:
                kept.append(_least_divergence(counts_B, self.grid.highest + 1))
            else:
                kept.append(_least_divergence(counts_B, levels if low >= 0 or high <= 0 else levels // 2))
        return self._within(torch.tensor(kept, dtype=torch.float64) * self._width)


def _least_divergence(counts_B: torch.Tensor, levels: int) -> int:
    """The number of bins i that are kept with least divergence; where two are equal, the wider one."""
    top = int(counts_B.nonzero().max()) + 1
    if top <= levels:
        return top
    kept_K = torch.arange(levels, top + 1)
    divergence_K = torch.cat([_divergence(counts_B, part, levels) for part in kept_K.split(256)])
    return int(kept_K[divergence_K <= divergence_K.min()].max())


def _divergence(counts_B: torch.Tensor, kept_K: torch.Tensor, levels: int) -> torch.Tensor:
    """KL(P || Q) in nats, (K,), for each number i of bins that are kept.

    P is their distribution, with what lies beyond added to the last; Q spreads the sum of each level, without what lies
    beyond, evenly over those of the level's bins that P has values in. Q being constant within a level, sum P log Q needs only
    sums over levels, which are differences of cumulative sums.
    """

    def until(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values.cumsum(0), (1, 0))

    below, filled = until(counts_B), until((counts_B > 0).double())
    total, inside_K, last_K = below[-1], below[kept_K], counts_B[kept_K - 1]
    beyond_K = total - inside_K
    edges_KL = torch.arange(levels + 1) * kept_K[:, None] // levels
    q_KL, bins_KL = below[edges_KL].diff(), filled[edges_KL].diff()
    p_KL = q_KL.clone()
    p_KL[:, -1] += beyond_K
    bins_KL[:, -1] += (last_K == 0) & (beyond_K > 0)
    # Nothing in Q where P has something is an infinite divergence; nothing in P adds nothing.
    cross_K = torch.where(p_KL > 0, p_KL * torch.log(q_KL / bins_KL.clamp(min=1)), 0.0).sum(1)
    own_K = until(torch.xlogy(counts_B, counts_B))[kept_K - 1] + torch.xlogy(last_K + beyond_K, last_K + beyond_K)
    divergence_K = (own_K - cross_K) / total - torch.log(total) + torch.log(inside_K)
    return torch.where(inside_K > 0, divergence_K, math.inf)
