"""The core of SOFT attention.

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
from vitedge.models.pseudo_inverse import newton_raphson_inverse

if TYPE_CHECKING:
    from vitedge.compress.soft import Config


class SoftAttention(nn.Module):  # type: ignore[misc]  # the library carries no types
    """`F pinv(A) G V` with Gaussian kernels F between tokens and landmarks, A among landmarks, G between landmarks and tokens.

    With a landmark for each token and an exact pseudo-inverse it is `S V`, S the kernel of all tokens.

    Args:
        landmarks: M.
        own: How many of them are the first tokens as they are.
        iterations: Of the pseudo-inverse.
        scale: Of the attention: queries come in multiplied by it. The kernel's is `exp(-scale |q - k|^2 / 2)`.
        shared: Whether queries serve as keys; G is then F transposed.

    Attributes:
        inverse: Gives the pseudo-inverse of matrices BHMM.
    """

    def __init__(self, landmarks: int, own: int, iterations: int, scale: float, shared: bool) -> None:
        super().__init__()
        self.landmarks, self.own, self.iterations, self.scale, self.shared = landmarks, own, iterations, scale, shared
        self.inverse: Callable[[torch.Tensor], torch.Tensor] = partial(newton_raphson_inverse, iterations=iterations)

    def forward(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """Attended values, BHNV, of scaled queries, keys and values."""
        return in_float32(self.attend, q_BHNK, k_BHNK, v_BHNV)

    def attend(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """As `forward`, in the type of what comes in."""
        root = self.scale**0.5
        q_BHNK = q_BHNK / root
        q_BHMK = segment_means(q_BHNK, self.landmarks, self.own)
        if self.shared:
            k_BHMK = q_BHMK
            to_BHNM = gaussian_kernel(q_BHNK, k_BHMK)
            from_BHMN = to_BHNM.transpose(-2, -1)
        else:
            k_BHNK = k_BHNK * root
            k_BHMK = segment_means(k_BHNK, self.landmarks, self.own)
            to_BHNM = gaussian_kernel(q_BHNK, k_BHMK)
            from_BHMN = gaussian_kernel(q_BHMK, k_BHNK)
        return to_BHNM @ (self.inverse(gaussian_kernel(q_BHMK, k_BHMK)) @ (from_BHMN @ v_BHNV))

    def macs(self, slot: Slot) -> int:
        """Multiply-accumulates for one image."""
        m, n, k, v = self.landmarks, slot.tokens, slot.key_dim, slot.value_dim
        kernels = n * m * k * (1 if self.shared else 2) + m**2 * k
        return slot.num_heads * (kernels + 2 * n * m * v + m**2 * v + 2 * self.iterations * m**3)

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "landmarks": self.landmarks,
            "own": self.own,
            "iterations": self.iterations,
            "scale": self.scale,
            "shared": self.shared,
        }


def gaussian_kernel(x_NK: torch.Tensor, y_MK: torch.Tensor) -> torch.Tensor:
    """`exp(-|x - y|^2 / 2)` of every x with every y, (N, M) after any axes before."""
    x_N1, y_M1 = (0.5 * z.square().sum(-1, keepdim=True) for z in (x_NK, y_MK))
    return (x_NK @ y_MK.transpose(-2, -1) - x_N1 - y_M1.transpose(-2, -1)).exp()


def soft_attention(slot: Slot, config: Config) -> SoftAttention:
    """The core of a slot.

    Raises:
        UsageError: It has too few tokens, or all landmarks are taken by tokens of no patch.
    """
    own = own_landmarks("soft.landmarks", config.landmarks, config.prefix, slot)
    return SoftAttention(config.landmarks, own, config.iterations, slot.scale, shared=config.keys == "queries")
