"""The core of Linformer attention.

Shapes: B batch, N tokens, M of them left after projection, H heads, K width of a head's queries and keys, V width of its values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitedge.errors import UsageError
from vitedge.models.cores import Slot
from vitedge.models.landmarks import own_landmarks, segment_means

if TYPE_CHECKING:
    from vitedge.compress.linformer import Config


class LinformerAttention(nn.Module):  # type: ignore[misc]  # the library carries no types
    """`softmax(Q (E K)^T) F V`; E and F are zero until they are given values.

    With M = N and identities for E and F it is softmax attention.

    Args:
        tokens: N.
        length: M.
        heads: How many projections of each kind: 1 for all heads, or H.
        one: Whether F is E.

    Attributes:
        key_projection, value_projection: E and F, (heads, M, N) or (M, N) where heads is 1; F is None where it is E.
    """

    def __init__(self, tokens: int, length: int, heads: int, one: bool) -> None:
        super().__init__()
        self.tokens, self.length, self.heads, self.one = tokens, length, heads, one
        shape = (length, tokens) if heads == 1 else (heads, length, tokens)
        self.key_projection = nn.Parameter(torch.zeros(shape))
        self.value_projection = None if one else nn.Parameter(torch.zeros(shape))

    def forward(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """Attended values, BHNV, of scaled queries, keys and values.

        Raises:
            UsageError: Another number of tokens than the projections are for.
        """
        if k_BHNK.shape[2] != self.tokens:
            raise UsageError(
                "linformer",
                expected=f"{self.tokens} tokens, as when it was applied",
                found=str(k_BHNK.shape[2]),
                fix="set train.patch_drop: 0, and put techniques that take tokens away before `linformer`",
            )
        k_BHMK = self.key_projection @ k_BHNK
        v_BHMV = (self.key_projection if self.value_projection is None else self.value_projection) @ v_BHNV
        return (q_BHNK @ k_BHMK.transpose(-2, -1)).softmax(-1) @ v_BHMV

    def macs(self, slot: Slot) -> int:
        """Multiply-accumulates for one image."""
        return slot.num_heads * 2 * slot.tokens * self.length * (slot.key_dim + slot.value_dim)

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"tokens": self.tokens, "length": self.length, "heads": self.heads, "one": self.one}


def linformer_attention(slot: Slot, config: Config, generator: torch.Generator) -> LinformerAttention:
    """The core of a slot, with its first projections.

    Raises:
        UsageError: The slot has too few tokens, or means of segments leave none for patches.
    """
    own = own_landmarks("linformer.length", config.length, config.prefix if config.start == "means" else "pooled", slot)
    core = LinformerAttention(slot.tokens, config.length, slot.num_heads if config.share == "none" else 1, one=config.share == "key_value")
    # The means of unit vectors are the weights that segments are averaged with.
    means_MN = segment_means(torch.eye(slot.tokens)[None, None], config.length, own)[0, 0]
    with torch.no_grad():
        for projection in core.parameters():
            if config.start == "means":
                projection.copy_(means_MN.expand_as(projection))
            else:
                projection.normal_(std=config.length**-0.5, generator=generator)
    return core
