"""A histogram of constant size whose bins never need to be interpolated.

Bins are multiples of a width that doubles when a value falls outside, so that two neighbours become exactly one bin, and
bounds do not drift with the order of batches. Shapes: C channels, N values of a batch in one, B bins on each side of 0.
"""

from __future__ import annotations

import torch

from vitedge.calibration._observer import MinMax
from vitedge.errors import UsageError
from vitedge.numerics import Grid


class Binned(MinMax):
    """Least and greatest value, and a histogram of 2 B bins; bin k of a channel holds [k w, (k + 1) w), k in -B..B-1.

    Args:
        bins: B, a power of two; the last doubling leaves at least half of them on the side that reaches further.
    """

    # Powers of the values that are summed up in each bin: 0 counts them.
    _powers: tuple[int, ...] = (0,)

    def __init__(self, grid: Grid, symmetric: bool, axis: int | None = None, *, bins: int = 2048) -> None:
        super().__init__(grid, symmetric, axis)
        if bins < 16 or bins & (bins - 1):
            raise UsageError(
                "calibration histogram: bins", expected="a power of two from 16", found=f"{bins}", fix="choose one, such as 2048"
            )
        self._bins = bins
        self._width = torch.empty(0, dtype=torch.float64)
        self._sums = torch.empty(0, dtype=torch.float64)

    def _add(self, rows_CN: torch.Tensor) -> None:
        super()._add(rows_CN)
        values_CN, channels, bins = rows_CN.double().cpu(), len(rows_CN), self._bins
        if not self._channels:
            self._width = torch.zeros(channels, dtype=torch.float64)
            self._sums = torch.zeros(len(self._powers), channels, 2 * bins, dtype=torch.float64)
        self._widen(values_CN.abs().amax(1))
        # A width of 0 means that all values so far are 0, and those lie in bin 0 of any width.
        width_C = torch.where(self._width > 0, self._width, 1.0)
        places = (values_CN / width_C[:, None]).floor().clamp(-bins, bins - 1).long() + bins
        flat = (places + 2 * bins * torch.arange(channels)[:, None]).flatten()
        for power, sums_CB in zip(self._powers, self._sums, strict=True):
            sums_CB += torch.bincount(flat, (values_CN**power).flatten(), 2 * bins * channels).view(channels, -1)

    def _widen(self, peak_C: torch.Tensor) -> None:
        """Makes the bins reach as far as the peaks."""
        bins = self._bins
        self._width = torch.where(self._width > 0, self._width, peak_C / bins)
        while bool((short := peak_C > self._width * bins).any()):
            pairs = self._sums[:, short].unflatten(-1, (bins, 2)).sum(-1)
            self._sums[:, short] = torch.nn.functional.pad(pairs, (bins // 2, bins // 2))
            self._width[short] *= 2

    def _magnitudes(self) -> torch.Tensor:
        """Counts of |x| in B bins from 0 on, (C, B)."""
        counts_CB = self._sums[0]
        return counts_CB[:, self._bins :] + counts_CB[:, : self._bins].flip(1)

    def _within(self, threshold_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-t..t, but no further than values were seen."""
        return torch.maximum(-threshold_C, self._low.clamp(max=0)), torch.minimum(threshold_C, self._high.clamp(min=0))
