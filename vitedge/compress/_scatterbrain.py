"""The cores of Scatterbrain attention.

Shapes: B batch, N tokens, P of them patches and L the others, G blocks of W patches, E = L + W keys of a block, R features, H heads,
K width of a head's queries and keys, V width of its values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.errors import UsageError
from vitedge.models.cores import Slot, in_float32
from vitedge.models.random_features import draw_directions, log_features

if TYPE_CHECKING:
    from vitedge.compress.scatterbrain import Config

NOTHING = -1e30  # a score whose exponential is 0 in every precision


class WindowScatterbrain(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Exact scores within blocks of consecutive patches and with the first tokens, the features' estimate between blocks.

    What a patch gets from other blocks is what all blocks give less what its own gives: no pair of features is taken back. With one
    block that is nothing, and what is left is softmax attention. Blocks are equal but for the last, which may be shorter.

    Args:
        features: R.
        key_dim: K.
        scale: Of the attention: queries come in multiplied by it.
        prefix: L, the first tokens, exact with all.
        window: The most patches in a block; blocks are made even.

    Attributes:
        directions_KR: What features are projections on, in the checkpoint and not trained; zero until they are drawn or loaded.
    """

    directions_KR: torch.Tensor

    def __init__(self, features: int, key_dim: int, scale: float, prefix: int, window: int) -> None:
        super().__init__()
        self.features, self.key_dim, self.scale, self.prefix, self.window = features, key_dim, scale, prefix, window
        self.register_buffer("directions_KR", torch.zeros(key_dim, features))

    def forward(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """Attended values, BHNV, of scaled queries, keys and values."""
        return in_float32(self.attend, q_BHNK, k_BHNK, v_BHNV)

    def attend(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """As `forward`, in the type of what comes in."""
        root, prefix = self.scale**0.5, self.prefix
        q_BHNK, k_BHNK = q_BHNK / root, k_BHNK * root
        patches_BHPV = self._attend_of_patches(q_BHNK[:, :, prefix:], k_BHNK, v_BHNV)
        if not prefix:
            return patches_BHPV
        others_BHLV = (q_BHNK[:, :, :prefix] @ k_BHNK.transpose(-2, -1)).softmax(-1) @ v_BHNV
        return torch.cat([others_BHLV, patches_BHPV], 2)

    def _attend_of_patches(self, q_BHPK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """What patches get, BHPV."""
        batch, heads, patches, _ = q_BHPK.shape
        count, size = blocks_of(patches, self.window)
        k_BHPK, v_BHPV = k_BHNK[:, :, self.prefix :], v_BHNV[:, :, self.prefix :]
        near_BHGWE = self._near_scores(q_BHPK, k_BHNK, count, size)

        log_k_BHPR = log_features(k_BHPK, self.directions_KR)
        largest_BH1R = log_k_BHPR.detach().amax(-2, keepdim=True)
        # A patch that fills up a block has features of 0: it adds to no sum.
        k_BHGWR = _in_blocks((log_k_BHPR - largest_BH1R).exp(), count, size)
        v_BHGWV = _in_blocks(v_BHPV, count, size)
        far_BHGRV = _of_other_blocks(k_BHGWR.transpose(-2, -1) @ v_BHGWV)
        # Where a block has nearly all of a sum, rounding may leave the others less than nothing, and it divides.
        far_sums_BHGR1 = _of_other_blocks(k_BHGWR.sum(-2).unsqueeze(-1)).relu()

        log_q_BHPR = log_features(q_BHPK, self.directions_KR) + largest_BH1R - math.log(self.features)
        log_q_BHGWR = _in_blocks(log_q_BHPR, count, size)
        # Exponents of one query are shifted by one number, exact and estimated ones: it cancels.
        largest_BHGW1 = torch.maximum(near_BHGWE.amax(-1, keepdim=True), log_q_BHGWR.amax(-1, keepdim=True)).detach()
        near_BHGWE, q_BHGWR = (near_BHGWE - largest_BHGW1).exp(), (log_q_BHGWR - largest_BHGW1).exp()

        sums_BHGW1 = near_BHGWE.sum(-1, keepdim=True) + q_BHGWR @ far_sums_BHGR1
        out_BHGWV = (near_BHGWE @ self._near(v_BHNV, count, size) + q_BHGWR @ far_BHGRV) / sums_BHGW1
        return out_BHGWV.reshape(batch, heads, count * size, -1)[:, :, :patches]

    def _near_scores(self, q_BHPK: torch.Tensor, k_BHNK: torch.Tensor, count: int, size: int) -> torch.Tensor:
        """Scores of each patch with the first tokens and with its block, BHGWE; `NOTHING` with a patch that fills up the last block."""
        patches = q_BHPK.shape[2]
        near_BHGWE = _in_blocks(q_BHPK, count, size) @ self._near(k_BHNK, count, size).transpose(-2, -1)
        if count * size == patches:
            return near_BHGWE
        positions_G1W = torch.arange(count * size, device=q_BHPK.device).reshape(count, 1, size)
        fill_G1W = torch.where(positions_G1W < patches, 0.0, NOTHING)
        return near_BHGWE + F.pad(fill_G1W, (self.prefix, 0))

    def _near(self, x_BHNC: torch.Tensor, count: int, size: int) -> torch.Tensor:
        """Keys or values that each block has exact scores with, BHGEC: those of the first tokens, then its own."""
        own_BHGWC = _in_blocks(x_BHNC[:, :, self.prefix :], count, size)
        if not self.prefix:
            return own_BHGWC
        first_BHGLC = x_BHNC[:, :, None, : self.prefix].expand(-1, -1, count, -1, -1)
        return torch.cat([first_BHGLC, own_BHGWC], 3)

    def macs(self, slot: Slot) -> int:
        """Multiply-accumulates for one image."""
        patches, both = slot.tokens - self.prefix, slot.key_dim + slot.value_dim
        count, size = blocks_of(patches, self.window)
        filled = count * size
        far = 2 * patches * slot.key_dim + filled * (2 * slot.value_dim + 1)
        near = filled * (self.prefix + size) * both + self.prefix * slot.tokens * both
        return slot.num_heads * (self.features * far + near)

    def describe(self) -> dict[str, Any]:
        """Arguments of `make_core`."""
        return {
            "pattern": "window",
            "features": self.features,
            "key_dim": self.key_dim,
            "scale": self.scale,
            "prefix": self.prefix,
            "window": self.window,
        }


class TopScatterbrain(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Exact scores where they are each query's largest, the features' estimate elsewhere; all of both are computed.

    Args:
        features: R.
        key_dim: K.
        scale: Of the attention: queries come in multiplied by it.
        top: Exact scores of each query, more where scores are equal.

    Attributes:
        directions_KR: What features are projections on, in the checkpoint and not trained; zero until they are drawn or loaded.
    """

    directions_KR: torch.Tensor

    def __init__(self, features: int, key_dim: int, scale: float, top: int) -> None:
        super().__init__()
        self.features, self.key_dim, self.scale, self.top = features, key_dim, scale, top
        self.register_buffer("directions_KR", torch.zeros(key_dim, features))

    def forward(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """Attended values, BHNV, of scaled queries, keys and values."""
        return in_float32(self.attend, q_BHNK, k_BHNK, v_BHNV)

    def attend(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        """As `forward`, in the type of what comes in.

        Raises:
            UsageError: Fewer tokens than exact scores.
        """
        _check_top(self.top, q_BHNK.shape[2])
        root = self.scale**0.5
        q_BHNK, k_BHNK = q_BHNK / root, k_BHNK * root
        scores_BHNN = q_BHNK @ k_BHNK.transpose(-2, -1)
        log_k_BHNR = log_features(k_BHNK, self.directions_KR)
        largest_BH1R = log_k_BHNR.detach().amax(-2, keepdim=True)
        log_q_BHNR = log_features(q_BHNK, self.directions_KR) + largest_BH1R - math.log(self.features)
        # Exponents of one query are shifted by one number, exact and estimated ones: it cancels.
        largest_BHN1 = torch.maximum(scores_BHNN.amax(-1, keepdim=True), log_q_BHNR.amax(-1, keepdim=True)).detach()
        estimate_BHNN = (log_q_BHNR - largest_BHN1).exp() @ (log_k_BHNR - largest_BH1R).exp().transpose(-2, -1)
        least_BHN1 = scores_BHNN.detach().topk(self.top, dim=-1).values[..., -1:]
        weights_BHNN = torch.where(scores_BHNN >= least_BHN1, (scores_BHNN - largest_BHN1).exp(), estimate_BHNN)
        return (weights_BHNN @ v_BHNV) / weights_BHNN.sum(-1, keepdim=True)

    def macs(self, slot: Slot) -> int:
        """Multiply-accumulates for one image."""
        features = 2 * slot.tokens * self.features * slot.key_dim + slot.tokens**2 * self.features
        return slot.num_heads * features + slot.softmax_macs

    def describe(self) -> dict[str, Any]:
        """Arguments of `make_core`."""
        return {"pattern": "top", "features": self.features, "key_dim": self.key_dim, "scale": self.scale, "top": self.top}


def make_core(pattern: str, **made: Any) -> nn.Module:
    """The core that `describe` told of."""
    return WindowScatterbrain(**made) if pattern == "window" else TopScatterbrain(**made)


def scatterbrain_attention(slot: Slot, config: Config, generator: torch.Generator) -> nn.Module:
    """The core of a slot, with its directions.

    Raises:
        UsageError: It has fewer tokens than a query has exact scores.
    """
    core: Any
    if config.pattern == "window":
        core = WindowScatterbrain(config.features, slot.key_dim, slot.scale, slot.prefix, config.window)
    else:
        _check_top(config.top, slot.tokens)
        core = TopScatterbrain(config.features, slot.key_dim, slot.scale, config.top)
    core.directions_KR.copy_(draw_directions(slot.key_dim, config.features, generator))
    made: nn.Module = core
    return made


def blocks_of(patches: int, window: int) -> tuple[int, int]:
    """How many blocks patches are cut into, of `window` patches at most, and how many patches the longest has."""
    count = math.ceil(patches / window)
    return count, math.ceil(patches / count)


def _check_top(top: int, tokens: int) -> None:
    if top > tokens:
        raise UsageError("scatterbrain.top", expected=f"at most {tokens}, as there are tokens", found=str(top), fix="lower it")


def _in_blocks(x_BHPC: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """BHPC to BHGWC, the last block filled up with zeros."""
    batch, heads, patches, width = x_BHPC.shape
    if count * size > patches:
        x_BHPC = F.pad(x_BHPC, (0, 0, 0, count * size - patches))
    return x_BHPC.reshape(batch, heads, count, size, width)


def _of_other_blocks(sums_BHGRC: torch.Tensor) -> torch.Tensor:
    """For each block the sum over all others."""
    return sums_BHGRC.sum(2, keepdim=True) - sums_BHGRC
