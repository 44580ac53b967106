"""Bipartite soft matching, and merging by it, as few operations of static shapes that both runtimes have.

Which tokens merge is decided by TopK and ArgMax, what comes of them by gathering and by a product with a matrix of ones and zeros:
nothing is scattered. Tokens that do not merge stay in their order, so that two runtimes whose sums differ in the last bit deal the
next block's tokens alike. Where two similarities are equal, ArgMax takes the first in PyTorch as in ONNX; TopK takes the first in ONNX,
and in PyTorch either.
Shapes: B batch, N tokens, E features that are added up, A and C patch tokens of the first and the second set, r merged tokens, k those
of the first set that are not, H heads, K width of a head's keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.compress.tome import R
from vitedge.errors import UsageError
from vitedge.models.attention import Attended
from vitedge.models.reducing_block import gather_tokens, in_full_precision, widened, wrap_blocks

if TYPE_CHECKING:
    from vitedge.compress.tome import Config

_TINY = 1e-6  # least length of a key


@dataclass(frozen=True)
class Matching:
    """Which tokens merge.

    Attributes:
        merged_Br: Positions, in the first set, of those that merge; None where all of it does.
        kept_Bk: Positions, in the first set, of those that do not, in their order; None where there are none.
        into_Br: Positions, in the second set, of what they merge into.
    """

    merged_Br: torch.Tensor | None
    kept_Bk: torch.Tensor | None
    into_Br: torch.Tensor


def match(keys_BHNK: torch.Tensor, prefix: int, r: int) -> Matching:
    """Bipartite soft matching of patch tokens, Bolya et al. 2023, section 3.

    Args:
        keys_BHNK: What tokens are compared by: the cosine of their means over heads.
        prefix: Tokens before the patches, which take no part.
        r: Tokens to merge, at least 1 and at most half of the patch tokens.
    """
    metric_BNK = widened(keys_BHNK).mean(1)
    metric_BNK = metric_BNK / metric_BNK.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    first_BAK, second_BCK = metric_BNK[:, prefix::2], metric_BNK[:, prefix + 1 :: 2]
    best_BA, into_BA = (first_BAK @ second_BCK.transpose(-2, -1)).max(-1)
    count = best_BA.shape[-1]
    if r == count:
        return Matching(None, None, into_BA)
    order_BA = best_BA.topk(count).indices
    merged_Br = order_BA[:, :r]
    kept_Bk = order_BA[:, r:].topk(count - r, largest=False).values  # sorts them
    return Matching(merged_Br, kept_Bk, into_BA.gather(1, merged_Br))


def merge(x_BNE: torch.Tensor, prefix: int, matching: Matching) -> torch.Tensor:
    """Sums of merged tokens; the prefix, what did not merge of the first set, and the second set, with r tokens less."""
    first_BAE, second_BCE = x_BNE[:, prefix::2], x_BNE[:, prefix + 1 :: 2]
    merged_BrE = first_BAE if matching.merged_Br is None else gather_tokens(first_BAE, matching.merged_Br)
    kept = () if matching.kept_Bk is None else (gather_tokens(first_BAE, matching.kept_Bk),)
    positions_C = torch.arange(second_BCE.shape[1], device=x_BNE.device)
    onto_BCr = (matching.into_Br[:, None, :] == positions_C[:, None]).to(x_BNE.dtype)
    return torch.cat([x_BNE[:, :prefix], *kept, second_BCE + onto_BCr @ merged_BrE], 1)


class TokenMerging(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Merges r patch tokens of every image into others, between attention and MLP.

    Args:
        r: Tokens to merge; half of the patch tokens where there are fewer, as with patch drop in training.
        prefix: Tokens before the patches.
    """

    def __init__(self, r: int, prefix: int) -> None:
        super().__init__()
        self.r, self.prefix = r, prefix

    def forward(self, x_BND: torch.Tensor, size_BN1: torch.Tensor | None, attended: Attended) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Means of merged tokens, weighted by their sizes, and the sums of those; None stands for ones."""
        r = min(self.r, (x_BND.shape[1] - self.prefix) // 2)
        if r == 0:
            return x_BND, size_BN1
        with in_full_precision(x_BND):
            matching = match(attended.keys_BHNK, self.prefix, r)
            # The size is one feature more, so that both are gathered and added up in one go.
            weighted_BNE = F.pad(x_BND, (0, 1), value=1.0) if size_BN1 is None else torch.cat([x_BND * size_BN1, size_BN1], -1)
            summed_BNE = merge(weighted_BNE, self.prefix, matching)
        size_BN1 = summed_BNE[..., -1:]
        return summed_BNE[..., :-1] / size_BN1, size_BN1


def merge_tokens_(model: nn.Module, merged: Sequence[int], proportional: bool) -> nn.Module:
    """Make a ViT merge so many tokens in each of its blocks, in place; returns it."""
    vit: Any = model
    between = {index: TokenMerging(r, vit.num_prefix_tokens) for index, r in enumerate(merged) if r}
    wrap_blocks(model, between=between, proportional=proportional)
    return model


def planned(config: Config, blocks: Sequence[int], depth: int, patches: int) -> tuple[list[int], list[int]]:
    """Tokens that each of `depth` blocks is asked to merge, and that it merges where none can merge more than half of its own.

    Raises:
        UsageError: `keep` cannot be reached, or is all of the tokens.
    """
    left = patches if config.keep is None else max(1, round(config.keep * patches))
    total = (R if config.r is None else config.r) * len(blocks) if config.keep is None else patches - left
    shares = schedule(total, len(blocks), config.schedule)
    asked, merged, now = [0] * depth, [0] * depth, patches
    for block, share in zip(blocks, shares, strict=True):
        asked[block], merged[block] = share, min(share, now // 2)
        now -= merged[block]
    if config.keep is not None and (now != left or total == 0):
        raise UsageError(
            "tome.keep",
            expected=f"a share of {patches} patch tokens that {len(blocks)} blocks reach, each of which merges at most half of its own",
            found=f"{config.keep}, where {now} are left",
            fix="change keep, let more blocks merge, or choose another schedule",
        )
    return asked, merged


def schedule(total: int, blocks: int, kind: str) -> list[int]:
    """A total dealt out over blocks: `constant`, or `decreasing` on a straight line to nothing in the last one."""
    if kind == "constant" or blocks == 1:
        ends = [total * (index + 1) / blocks for index in range(blocks)]
    else:
        # 2 (1 - i / (blocks - 1)) / blocks of the total in block i, summed up to it.
        ends = [total * (index + 1) * (2 * (blocks - 1) - index) / (blocks * (blocks - 1)) for index in range(blocks)]
    rounded = [0, *(int(end + 0.5) for end in ends)]
    return [end - start for start, end in itertools.pairwise(rounded)]
