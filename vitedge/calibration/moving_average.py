"""The moving average of the batches' extremes. Shapes: C channels, N values of a batch in one."""

from __future__ import annotations

import torch

from vitedge.calibration._observer import MinMax
from vitedge.errors import UsageError
from vitedge.numerics import Grid


class MovingAverage(MinMax):
    """The exponential moving average of the batches' least and greatest values (Jacob et al. 2018, arXiv:1712.05877, 3.1).

    Args:
        momentum: What is kept of the average at each batch after the first, at least 0 and below 1.
    """

    def __init__(self, grid: Grid, symmetric: bool, axis: int | None = None, *, momentum: float = 0.9) -> None:
        super().__init__(grid, symmetric, axis)
        if not 0 <= momentum < 1:
            raise UsageError("moving_average: momentum", expected="0 <= momentum < 1", found=f"{momentum}", fix="choose one, such as 0.9")
        self._momentum = momentum

    def _add(self, rows_CN: torch.Tensor) -> None:
        low, high = (bound.double().cpu() for bound in torch.aminmax(rows_CN, dim=1))
        self._low = torch.lerp(low, self._low, self._momentum) if self._channels else low
        self._high = torch.lerp(high, self._high, self._momentum) if self._channels else high
