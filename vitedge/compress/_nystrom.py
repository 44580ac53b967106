"""The core of Nystroem attention.

Shapes: B batch, N tokens, M landmarks, H heads, K width of a head's queries and keys, V width of its values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitedge.models.cores import Slot, in_float32
from vitedge.models.landmarks import own_landmarks, segment_means
from vitedge.models.pseudo_inverse import third_order_inverse

if TYPE_CHECKING:
    from vitedge.compress.nystrom import Config


class NystromAttention(nn.Module):  # type: ignore[misc]  # the library carries no types
    """`softmax(Q Kl^T) pinv(softmax(Ql Kl^T)) softmax(Ql K^T) V`, and a convolution of V where asked for.

    With a landmark for each token and an exact pseudo-inverse P of `S = softmax(Q K^T)` it is `S P S V = S V`, softmax attention. With
    iterations instead, the difference is `R S V`, R the residual that the smallest singular value s of S decides: its norm goes from
    `1 - s^2 / (||S||_1 ||S||_inf)` by `r <- (3 r^3 + r^4) / 4` in each of them.

    Args:
        landmarks: M.
        own: How many of them are the first tokens as they are.
        iterations: Of the pseudo-inverse.
        num_heads: H, whose convolutions differ.
        conv_kernel: Tokens that a convolution takes in; None for none.

    Attributes:
        inverse: Gives the pseudo-inverse of matrices BHMM.
    """

    def __init__(self, landmarks: int, own: int, iterations: int, num_heads: int, conv_kernel: int | None = None) -> None:
        super().__init__()
        self.landmarks, self.own, self.iterations = landmarks, own, iterations
        self.num_heads, self.conv_kernel = num_heads, conv_kernel
        self.inverse: Callable[[torch.Tensor], torch.Tensor] = partial(third_order_inverse, iterations=iterations)
        self.conv: nn.Module | None = None
        if conv_kernel is not None:
            self.conv = nn.Conv2d(num_heads, num_heads, (conv_kernel, 1), padding=(conv_kernel // 2, 0), groups=num_heads, bias=False)
            nn.init.zeros_(self.conv.weight)  # pretrained weights answer at first as they do without it

    def forward(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """Attended values, BHNV, of scaled queries, keys and values."""
        out_BHNV = in_float32(self.attend, q_BHNK, k_BHNK, v_BHNV)
        return out_BHNV if self.conv is None else out_BHNV + self.conv(v_BHNV)

    def attend(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """As `forward`, without the convolution."""
        q_BHMK = segment_means(q_BHNK, self.landmarks, self.own)
        k_BHMK = segment_means(k_BHNK, self.landmarks, self.own)
        to_BHNM = (q_BHNK @ k_BHMK.transpose(-2, -1)).softmax(-1)
        between_BHMM = (q_BHMK @ k_BHMK.transpose(-2, -1)).softmax(-1)
        from_BHMN = (q_BHMK @ k_BHNK.transpose(-2, -1)).softmax(-1)
        return to_BHNM @ (self.inverse(between_BHMM) @ (from_BHMN @ v_BHNV))

    def macs(self, slot: Slot) -> int:
        """Multiply-accumulates for one image."""
        m, n, k, v = self.landmarks, slot.tokens, slot.key_dim, slot.value_dim
        products = 2 * n * m * (k + v) + m**2 * (k + v) + 4 * self.iterations * m**3
        return slot.num_heads * (products + n * v * (self.conv_kernel or 0))

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "landmarks": self.landmarks,
            "own": self.own,
            "iterations": self.iterations,
            "num_heads": self.num_heads,
            "conv_kernel": self.conv_kernel,
        }


def nystrom_attention(slot: Slot, config: Config) -> NystromAttention:
    """The core of a slot.

    Raises:
        UsageError: It has too few tokens, or all landmarks are taken by tokens of no patch.
    """
    own = own_landmarks("nystrom.landmarks", config.landmarks, config.prefix, slot)
    return NystromAttention(config.landmarks, own, config.iterations, slot.num_heads, config.conv_kernel)
