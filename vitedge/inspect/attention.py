"""Attention values after softmax, and what 4 bits keep of them: a uniform grid against powers of two.

Luo et al., section 3.1.2 and Figure 1 (right), after Lin et al. 2021 (FQ-ViT). The uniform grid has 16 levels from 0 to the highest
value seen, which is the best that min-max calibration can do: `s = max A / 15`, and A is lost (becomes 0) where A / s rounds to 0.
The log2 grid is `clamp(round(-log2 A), 0, 15)`: A is lost where that exponent goes beyond 15, below 2^-15.5, which the published
implementation sets to 0 (the clamp alone would hold it at 2^-15).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitedge.errors import InputError
from vitedge.inspect.sources import Tap

BITS = 4
LEVELS = 2**BITS - 1
LOWEST_EXPONENT, PER_OCTAVE = -24, 4
EDGES_LOG2 = np.arange(LOWEST_EXPONENT * PER_OCTAVE, 1) / PER_OCTAVE
"""Edges of the histogram's bins, log2 of the value; the last bin includes 1."""


@dataclass
class AttentionValues:
    """Histogram of one layer's attention map, over images, heads and pairs of tokens.

    Attributes:
        tap: The layer.
        counts: int64, values per bin of `EDGES_LOG2`.
        below: Values under the first bin, zeros among them.
        highest: Of all values.
        total: Sum of all values.
    """

    tap: Tap
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGES_LOG2) - 1, np.int64))
    below: int = 0
    highest: float = 0.0
    total: float = 0.0

    def add(self, attention: np.ndarray) -> None:
        """Count a batch of any shape.

        Raises:
            InputError: A value that no softmax gives.
        """
        values = np.asarray(attention, np.float64).ravel()
        # A softmax in float32 may sum to a little more than one.
        if not (values.min() >= 0.0 and values.max() <= 1.0 + 1e-3):
            raise InputError(
                self.tap.layer,
                expected="values between 0 and 1 after softmax",
                found=f"{values.min():.4g} to {values.max():.4g}",
                fix="check the model in fp32",
            )
        # In bins of a quarter octave, so that the histogram needs no sorting: k = floor(4 log2 A).
        with np.errstate(divide="ignore"):
            positions = np.floor(np.log2(values) * PER_OCTAVE) - LOWEST_EXPONENT * PER_OCTAVE
        inside = positions >= 0
        last = len(self.counts) - 1
        self.counts += np.bincount(np.minimum(positions[inside], last).astype(np.int64), minlength=last + 1)
        self.below += int(np.count_nonzero(~inside))
        self.highest = max(self.highest, float(values.max()))
        self.total += float(values.sum())

    @property
    def values(self) -> int:
        """How many were counted."""
        return int(self.counts.sum()) + self.below


@dataclass
class LostValues:
    """What each grid loses, counted exactly once the highest value is known.

    Attributes:
        seen: The histogram of the same values.
        uniform, log2: Values that become zero.
        uniform_sum, log2_sum: Sum of those values.
    """

    seen: AttentionValues
    uniform: int = 0
    log2: int = 0
    uniform_sum: float = 0.0
    log2_sum: float = 0.0

    def add(self, attention: np.ndarray) -> None:
        """Count a batch that the histogram has counted before."""
        values = np.asarray(attention, np.float64).ravel()
        lost = np.rint(values * (LEVELS / self.seen.highest)) == 0
        self.uniform, self.uniform_sum = self.uniform + int(np.count_nonzero(lost)), self.uniform_sum + float(values[lost].sum())
        lost = values < 2.0 ** -(LEVELS + 0.5)
        self.log2, self.log2_sum = self.log2 + int(np.count_nonzero(lost)), self.log2_sum + float(values[lost].sum())

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs; shares in percent."""
        seen = self.seen
        return {
            "layer": seen.tap.layer,
            "node": seen.tap.node,
            "values": seen.values,
            "highest": seen.highest,
            "uniform_zero_percent": 100 * self.uniform / seen.values,
            "log2_zero_percent": 100 * self.log2 / seen.values,
            # What the lost values weigh in the sum over tokens that attention is.
            "uniform_lost_attention_percent": 100 * self.uniform_sum / seen.total,
            "log2_lost_attention_percent": 100 * self.log2_sum / seen.total,
            "histogram": {
                "lowest_exponent": LOWEST_EXPONENT,
                "bins_per_octave": PER_OCTAVE,
                "counts": seen.counts.tolist(),
                "below": seen.below,
            },
        }
