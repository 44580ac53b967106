"""LayerNorm of which only some channels are read on: what is left before a qkv whose input was pruned."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn


class SelectingNorm(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Normalizes over all channels, as before the cut, and gives on those that are left: LayerNormalization and Gather in a file.

    It has no scale and shift: those of the norm that it takes the place of went into the layer that reads it.

    Args:
        features: Channels of the tokens.
        eps: Of the LayerNorm.
        index: Positions of the channels that are left, int64 (C,).
    """

    index: torch.Tensor
    ones: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, features: int, eps: float, index: torch.Tensor) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.register_buffer("index", index)
        # Runtimes know LayerNorm with a scale and a shift; those here are not part of a checkpoint.
        self.register_buffer("ones", torch.ones(features), persistent=False)
        self.register_buffer("zeros", torch.zeros(features), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., C)."""
        return F.layer_norm(x, (self.features,), self.ones, self.zeros, self.eps).index_select(-1, self.index)
