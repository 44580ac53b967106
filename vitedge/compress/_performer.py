"""The core of Performer attention.

Shapes: B batch, N tokens, R features, H heads, K width of a head's queries and keys, V width of its values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitedge.models.cores import Slot, in_float32
from vitedge.models.random_features import draw_directions, log_features

if TYPE_CHECKING:
    from vitedge.compress.performer import Config


class PerformerAttention(nn.Module):  # type: ignore[misc]  # the library carries no types
    """`phi(Q) (phi(K)^T V) / phi(Q) (phi(K)^T 1)`.

    Queries come in multiplied by `scale` and keys as they are; both are brought to `sqrt(scale)`, which leaves their products
    alone and makes the features of neither the more uncertain.

    Exponents are kept below 0 by shifts that cancel: in every feature its largest key, in every query its largest feature then. What
    divides is so at least 1, whatever the weights, and nothing has to be added to it. `-|q|^2 / 2` and `1 / sqrt(R)` cancel too.

    Args:
        features: R.
        key_dim: K.
        scale: Of the attention.

    Attributes:
        directions_KR: What features are projections on, in the checkpoint and not trained; zero until they are drawn or loaded.
    """

    directions_KR: torch.Tensor

    def __init__(self, features: int, key_dim: int, scale: float) -> None:
        super().__init__()
        self.features, self.key_dim, self.scale = features, key_dim, scale
        self.register_buffer("directions_KR", torch.zeros(key_dim, features))

    def forward(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """Attended values, BHNV, of scaled queries, keys and values."""
        return in_float32(self.attend, q_BHNK, k_BHNK, v_BHNV)

    def attend(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """As `forward`, in the type of what comes in."""
        root = self.scale**0.5
        log_q_BHNR = (q_BHNK / root) @ self.directions_KR
        log_k_BHNR = log_features(k_BHNK * root, self.directions_KR)
        largest_BH1R = log_k_BHNR.detach().amax(-2, keepdim=True)
        k_BHNR = (log_k_BHNR - largest_BH1R).exp()
        log_q_BHNR = log_q_BHNR + largest_BH1R
        q_BHNR = (log_q_BHNR - log_q_BHNR.detach().amax(-1, keepdim=True)).exp()
        sums_BHR1 = k_BHNR.sum(-2).unsqueeze(-1)
        return (q_BHNR @ (k_BHNR.transpose(-2, -1) @ v_BHNV)) / (q_BHNR @ sums_BHR1)

    def macs(self, slot: Slot) -> int:
        """Multiply-accumulates for one image."""
        return slot.num_heads * slot.tokens * self.features * (2 * slot.key_dim + 2 * slot.value_dim + 1)

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"features": self.features, "key_dim": self.key_dim, "scale": self.scale}


def performer_attention(slot: Slot, config: Config, generator: torch.Generator) -> PerformerAttention:
    """The core of a slot, with its directions."""
    core = PerformerAttention(config.features, slot.key_dim, slot.scale)
    core.directions_KR.copy_(draw_directions(slot.key_dim, config.features, generator))
    return core
