"""Keeping the patch tokens that the class token attends to most.

The order of patch tokens means nothing to a ViT, so that TopK's order is left as it is; a low-rank core in a later block, which makes
landmarks or projections of neighbours, gets tokens of like scores as such. Where two scores are equal, TopK takes the first in ONNX,
and in PyTorch either.
Shapes: B batch, N tokens, T patch tokens, D embed_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vitedge.errors import UsageError
from vitedge.models.attention import Attended
from vitedge.models.reducing_block import gather_tokens, widened, wrap_blocks


class AttentionPruning(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Keeps a share of the patch tokens of every image, between attention and MLP.

    Args:
        keep: The share.
        prefix: Tokens before the patches.
        answering: How many of those, the first ones, the model answers from: class token and distillation token, but no registers.
        fuse: Whether the others become one more token, their sum weighted by their scores (as EViT has it: not normalized).
    """

    def __init__(self, keep: float, prefix: int, answering: int, fuse: bool) -> None:
        super().__init__()
        self.keep, self.prefix, self.answering, self.fuse = keep, prefix, answering, fuse

    def forward(self, x_BND: torch.Tensor, size_BN1: torch.Tensor | None, attended: Attended) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prefix, the kept tokens and the fused one.

        Raises:
            ValueError: A core attends, which has no weights.
        """
        if attended.weights_BHNN is None:
            raise ValueError("tokens are pruned by the weights of softmax attention")
        scores_BT = widened(attended.weights_BHNN[:, :, : self.answering, self.prefix :]).mean((1, 2))
        patches = scores_BT.shape[1]
        kept = kept_tokens(self.keep, patches)
        fuse = self.fuse and kept < patches
        found = scores_BT.topk(patches if fuse else kept)
        tokens_BTD = gather_tokens(x_BND[:, self.prefix :], found.indices)
        parts = [x_BND[:, : self.prefix], tokens_BTD[:, :kept]]
        if fuse:
            parts.append((found.values[:, kept:, None] * tokens_BTD[:, kept:]).sum(1, keepdim=True))
        return torch.cat(parts, 1), size_BN1


def kept_tokens(keep: float, patches: int) -> int:
    """How many of so many patch tokens are kept: the share, rounded up, as EViT's code rounds."""
    return math.ceil(keep * patches)


def check_keep(keep: float, fuse: bool, stages: int, patches: int) -> None:
    """Refuse a share by which one of the stages drops nothing.

    Raises:
        UsageError: Too few tokens come to a stage.
    """
    now = patches
    for _ in range(stages):
        kept = kept_tokens(keep, now)
        if kept == now:
            raise UsageError(
                "token_pruning.keep",
                expected=f"a share of {now} patch tokens that leaves one out",
                found=str(keep),
                fix="lower keep, or name fewer blocks",
            )
        now = kept + fuse


def prune_tokens_(model: nn.Module, blocks: Sequence[int], keep: float, fuse: bool) -> nn.Module:
    """Make a ViT drop patch tokens in these blocks, in place; returns it."""
    vit: Any = model
    prefix = vit.num_prefix_tokens
    between = {index: AttentionPruning(keep, prefix, prefix - vit.num_reg_tokens, fuse) for index in blocks}
    wrap_blocks(model, between=between)
    return model
