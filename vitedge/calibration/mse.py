"""The range of least squared error. Shapes: C channels, F bins that hold values."""

from __future__ import annotations

import torch

from vitedge.calibration._histogram import Binned
from vitedge.numerics import dequantize, parameters, quantize


class MeanSquaredError(Binned):
    """The clipped range with the least mean squared quantization error on the grid.

    Clipping factors from 1 down to 0.01, 5 % apart, of both ends where the range is symmetric, else of one end after the
    other, twice. Bins hold the count, sum and sum of squares of their values, from which follows the exact error of a
    bin that becomes one integer and a bound for one that becomes two. Clipping is chosen only where its error is
    certainly below that of min-max, so it is never the worse choice on the values that were seen; where steps are finer
    than bins, as at 16 bits, nothing is certain and min-max remains.

    Args:
        bins: As in the histogram.
    """

    _powers = (0, 1, 2)

    def _bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        low_C, high_C = self._low.clamp(max=0), self._high.clamp(min=0)
        moments, a_CF = self._filled()
        factors = [0.95**power for power in range(91)]
        best = (low_C, high_C, self._most(moments, low_C, high_C))
        if self.symmetric:
            peak_C = torch.maximum(-low_C, high_C)
            for factor in factors[1:]:
                best = self._better(best, moments, *self._within(peak_C * factor))
        else:
            for _ in range(2):
                for factor in factors:
                    best = self._better(best, moments, best[0], high_C * factor)
                for factor in factors:
                    best = self._better(best, moments, low_C * factor, best[1])
        certain_C = best[2] < self._least(moments, a_CF, low_C, high_C)
        return torch.where(certain_C, best[0], low_C), torch.where(certain_C, best[1], high_C)

    def _filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The moments of the bins that hold values, (3, C, F), and where those bins begin, (C, F).

        F is that of the fullest channel, the others take some empty bins along: a row of a weight has far fewer values than bins.
        """
        filled_CB = self._sums[0] > 0
        places_CF = filled_CB.int().argsort(dim=1, descending=True)[:, : int(filled_CB.sum(1).max())]
        return self._sums.gather(2, places_CF.expand(3, -1, -1)), (places_CF - self._bins) * self._width[:, None]

    def _better(
        self, best: tuple[torch.Tensor, torch.Tensor, torch.Tensor], moments: torch.Tensor, low_C: torch.Tensor, high_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per channel the range of less error, with that error."""
        error_C = self._most(moments, low_C, high_C)
        less_C = error_C < best[2]
        return torch.where(less_C, low_C, best[0]), torch.where(less_C, high_C, best[1]), torch.minimum(error_C, best[2])

    def _most(self, moments: torch.Tensor, low_C: torch.Tensor, high_C: torch.Tensor) -> torch.Tensor:
        """An upper bound of the sum of squared errors, (C,): as if all values of a bin became what its mean becomes."""
        counts_CF, sums_CF, _ = moments
        return _error(moments, self._rounded(sums_CF / counts_CF.clamp(min=1), low_C, high_C)).sum(1)

    def _least(self, moments: torch.Tensor, a_CF: torch.Tensor, low_C: torch.Tensor, high_C: torch.Tensor) -> torch.Tensor:
        """A lower bound of the sum of squared errors, (C,), of bins that begin at a.

        In a bin a..b that becomes the values u < v, with m their middle, the error is sum (x - u)^2 - 2 (v - u) max(0, x - m),
        and that maximum, being convex, lies below its chord (x - a) (b - m) / (b - a). In a bin that becomes more than two
        values nothing is certain.
        """
        counts_CF, sums_CF, _ = moments
        width_C1 = self._width[:, None]
        b_CF = a_CF + width_C1
        u_CF, v_CF = self._rounded(a_CF, low_C, high_C), self._rounded(b_CF, low_C, high_C)
        chord_CF = (sums_CF - counts_CF * a_CF) * (b_CF - (u_CF + v_CF) / 2) / torch.where(width_C1 > 0, width_C1, 1.0)
        error_CF = _error(moments, u_CF) - 2 * (v_CF - u_CF) * chord_CF
        step_C, _ = parameters(low_C.float(), high_C.float(), self.grid, self.symmetric)
        return torch.where(v_CF - u_CF < 1.5 * step_C[:, None], error_CF, 0.0).clamp(min=0).sum(1)

    def _rounded(self, x_CF: torch.Tensor, low_C: torch.Tensor, high_C: torch.Tensor) -> torch.Tensor:
        """What becomes of x when it is quantized to the range; in float32, as the values will be."""
        scale_C, zero_point_C = parameters(low_C.float(), high_C.float(), self.grid, self.symmetric)
        scale, zero_point = scale_C[:, None], zero_point_C[:, None]
        return dequantize(quantize(x_CF, scale, zero_point, self.grid), scale, zero_point).double()


def _error(moments: torch.Tensor, value_CF: torch.Tensor) -> torch.Tensor:
    """Sum of the squared distances of each bin's values to that one value, (C, F)."""
    counts_CF, sums_CF, squares_CF = moments
    return squares_CF - 2 * value_CF * sums_CF + counts_CF * value_CF**2
