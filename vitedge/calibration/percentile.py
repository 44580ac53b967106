"""A range that leaves a small share of the values outside. Shapes: C channels, B bins."""

from __future__ import annotations

import torch

from vitedge.calibration._histogram import Binned
from vitedge.errors import UsageError
from vitedge.numerics import Grid


class Percentile(Binned):
    """The least range of whole bins that leaves at most a given share of the values outside.

    Half of that share on each side; all of it on one where the values have one sign, and of |x| where the range is symmetric.

    Args:
        percentile: Share of the values inside, in per cent, 50 to 100.
        bins: As in the histogram.
    """

    def __init__(self, grid: Grid, symmetric: bool, axis: int | None = None, *, percentile: float = 99.99, bins: int = 2048) -> None:
        super().__init__(grid, symmetric, axis, bins=bins)
        if not 50 <= percentile <= 100:
            raise UsageError("percentile", expected="50 to 100", found=f"{percentile}", fix="choose one, such as 99.99")
        self._outside = 1 - percentile / 100

    def _bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.symmetric:
            return self._within(_reach(self._magnitudes(), self._outside) * self._width)
        sides_C = 2 - ((self._low >= 0) | (self._high <= 0)).double()
        outside_C = self._outside / sides_C
        counts_CB, edge_C = self._sums[0], self._width * self._bins
        high_C = _reach(counts_CB, outside_C) * self._width - edge_C
        low_C = edge_C - _reach(counts_CB.flip(1), outside_C) * self._width
        low_C = torch.where(self._low >= 0, self._low, torch.maximum(low_C, self._low))
        return low_C, torch.where(self._high <= 0, self._high, torch.minimum(high_C, self._high))


def _reach(counts_CB: torch.Tensor, outside: torch.Tensor | float) -> torch.Tensor:
    """How many bins from the left it takes until at most that share of the values lies beyond them, (C,)."""
    from_bin_CB = counts_CB.flip(1).cumsum(1).flip(1)
    # A billionth forgives the rounding of the share.
    allowed_C = (outside + 1e-9) * from_bin_CB[:, 0]
    return (from_bin_CB > allowed_C[:, None]).sum(1)
