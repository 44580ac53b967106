"""Range of each channel of a LayerNorm's input: what a scale common to all channels has to cover.

Luo et al., section 3.1.2 and Figure 1 (left), after Lin et al. 2021 (FQ-ViT): a few channels reach tens of times further than the
median one, so with one scale for the layer the others keep only a few of its levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vitedge.errors import InputError
from vitedge.inspect.sources import Tap


@dataclass
class ChannelRanges:
    """Lowest and highest value of each channel of one layer's input, over all images and tokens.

    Attributes:
        tap: The layer.
        low_D, high_D: float64; infinite before anything was added.
    """

    tap: Tap
    low_D: np.ndarray
    high_D: np.ndarray

    @classmethod
    def of(cls, tap: Tap) -> ChannelRanges:
        """Ranges that have seen nothing."""
        return cls(tap, np.array([np.inf]), np.array([-np.inf]))

    def add(self, x_BND: np.ndarray) -> None:
        """Widen by a batch of any rank whose last axis is the channel.

        Raises:
            InputError: A value is not finite.
        """
        x_TD = np.asarray(x_BND, np.float64).reshape(-1, x_BND.shape[-1])
        if not np.isfinite(x_TD).all():
            raise InputError(self.tap.layer, expected="finite values", found="NaN or infinity", fix="check the model in fp32")
        self.low_D, self.high_D = np.minimum(self.low_D, x_TD.min(0)), np.maximum(self.high_D, x_TD.max(0))

    @property
    def ranges(self) -> np.ndarray:
        """Highest less lowest value of each channel, (D,)."""
        return np.asarray(self.high_D - self.low_D)

    @property
    def widest_channel(self) -> int:
        """The channel that reaches furthest."""
        return int(np.argmax(self.ranges))

    @property
    def spread(self) -> float:
        """Largest range of a channel over the median one: 1 where all are alike, infinite where half of them are constant."""
        widest, median = float(self.ranges.max()), float(np.median(self.ranges))
        return widest / median if median > 0 else (float("inf") if widest > 0 else 1.0)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs; six digits a value."""
        return {
            "layer": self.tap.layer,
            "node": self.tap.node,
            "channels": len(self.low_D),
            "spread": self.spread,
            "widest_channel": self.widest_channel,
            "widest_range": float(self.ranges.max()),
            "median_range": float(np.median(self.ranges)),
            "low": [float(f"{value:.6g}") for value in self.low_D],
            "high": [float(f"{value:.6g}") for value in self.high_D],
        }
