"""Which positions of each block matter, and leaving the others out.

The paper sums over all paths through the heads of later blocks, `heads^blocks` of them. The squares that are summed have a closed
recursion: with `M` the sum over paths of `A^T A`, where A leads from a block's tokens to the answer,
`M <- sum_h P_h^T diag(m) M diag(m) P_h` goes one block down, and `||A[:, i]||^2` summed over paths is its diagonal.
Shapes: B images, N tokens, T patch tokens, D embed_dim, H heads; M above is impact_BNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitedge.errors import InputError, UsageError
from vitedge.models.attention import Attended
from vitedge.models.evaluating import evaluating
from vitedge.models.reducing_block import wrap_blocks

_BATCH = 16  # images: three heads' attention of 785 tokens takes 120 MB then


@dataclass(frozen=True)
class Chosen:
    """Positions by block.

    Attributes:
        kept: Tokens that leave each block, the prefix among them, as positions among all tokens of the model, ascending.
        errors: Of each block but the first, what the positions that it is not given change of what it adds, relative (Frobenius).
    """

    kept: list[list[int]]
    errors: list[float]


class PositionSelection(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Keeps the tokens at fixed positions, between attention and MLP.

    Args:
        given: Tokens that come in.
        kept: Tokens that are kept.

    Attributes:
        positions: int64 (kept,), among the tokens that come in; the first ones until they are set or loaded.
        chooses: False: positions are the same for all images (`vitedge.models.reducing_block.chooses_tokens`).
    """

    positions: torch.Tensor
    chooses = False

    def __init__(self, given: int, kept: int) -> None:
        super().__init__()
        self.given = given
        self.register_buffer("positions", torch.arange(kept))

    def forward(self, x_BND: torch.Tensor, size_BN1: torch.Tensor | None, attended: Attended) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens at those positions.

        Raises:
            UsageError: Other tokens come in than when the positions were chosen.
        """
        if x_BND.shape[1] != self.given:
            raise UsageError(
                "patch_slimming",
                expected=f"{self.given} tokens, at the positions that it chose from",
                found=str(x_BND.shape[1]),
                fix="set patch_drop: 0 in the `train` steps after it",
            )
        return x_BND.index_select(1, self.positions), size_BN1


@torch.no_grad()  # type: ignore[untyped-decorator]
def choose(model: nn.Module, x_BCHW: torch.Tensor, keep: float | None, tolerance: float, granularity: int) -> Chosen:
    """Positions to keep in each block, from the last one down.

    Args:
        model: A ViT whose attention is open; its modes come back.
        x_BCHW: Model inputs.
        keep: Share of the positions that is left before the last block; None to go by the error.
        tolerance: Relative error up to which positions are added.
        granularity: How many at a time.

    Raises:
        InputError: Features are infinite or NaN.
    """
    vit: Any = model
    with evaluating(model):
        tokens = _tokens_of_blocks(vit, x_BCHW.to(next(model.parameters()).device))
        prefix, count, depth = vit.num_prefix_tokens, tokens[0].shape[1], len(vit.blocks)
        kept = [list(range(prefix))]
        errors: list[float] = []
        # Registers, the last of the prefix, go through all blocks, but no answer is read off them.
        answering = range(prefix - vit.num_reg_tokens)
        impact_BNN = torch.diag(_mask(answering, tokens[0])).expand(len(x_BCHW), -1, -1)
        for index in reversed(range(depth - 1)):
            following = vit.blocks[index + 1]
            impact_BNN, score_N = significance(vit.blocks[index], following, tokens[index], tokens[index + 1], impact_BNN, kept[0])
            after, taken = kept[0], {*kept[0]}
            candidates = [p for p in score_N.argsort(descending=True, stable=True).tolist() if p not in taken]
            wanted = None if keep is None else max(1, round((count - prefix) * (1 - (1 - keep) * (index + 1) / (depth - 1)))) + prefix
            added = 0 if wanted is None else max(0, wanted - len(after))
            while True:
                now = sorted([*after, *candidates[:added]])
                error = change_of_block(following, tokens[index + 1], tokens[index + 2], now, after)
                if wanted is not None or error <= tolerance or added >= len(candidates):
                    break
                added += granularity
            kept.insert(0, now)
            errors.insert(0, error)
    return Chosen(kept, errors)


def significance(
    block: Any, following: Any, tokens_BND: torch.Tensor, next_BND: torch.Tensor, impact_BNN: torch.Tensor, kept: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The significance score of Tang et al. 2022: what the answer owes to each token that leaves a block.

    Args:
        block: Whose tokens are judged.
        following: The next one.
        tokens_BND: What goes into the block.
        next_BND: What goes into the next one.
        impact_BNN: Sums of `A^T A` over paths from the tokens that leave the next one to the answer.
        kept: Those that it keeps.

    Returns:
        The same sums from the tokens that leave the block, over the number of heads; and the mean significance over images (N,).
    """
    mask_N = _mask(kept, tokens_BND)
    impacts, scores = [], []
    for start in range(0, len(tokens_BND), _BATCH):
        part = slice(start, start + _BATCH)
        p_BHNN = _attention(following, next_BND[part])
        masked_BNN = impact_BNN[part] * mask_N[:, None] * mask_N
        impact = (p_BHNN.transpose(-2, -1) @ masked_BNN[:, None] @ p_BHNN).mean(1)
        gathered_BHND = _attention(block, tokens_BND[part]) @ block.norm1(tokens_BND[part]).abs()[:, None]
        impacts.append(impact)
        scores.append(impact.diagonal(dim1=-2, dim2=-1) * gathered_BHND.square().sum((1, 3)))
    return torch.cat(impacts), torch.cat(scores).mean(0)


def change_of_block(block: Any, tokens_BND: torch.Tensor, out_BND: torch.Tensor, given: list[int], kept: list[int]) -> float:
    """How far off a block's output is at the tokens it keeps when it is given some of its tokens only, relative to what it adds there.

    Raises:
        InputError: It is not a number.
    """
    changed = added = 0.0
    where = [given.index(position) for position in kept]
    for start in range(0, len(tokens_BND), _BATCH):
        part = slice(start, start + _BATCH)
        found_BND = block(tokens_BND[part][:, given])[:, where]
        wanted_BND, before_BND = out_BND[part][:, kept], tokens_BND[part][:, kept]
        changed += float((found_BND - wanted_BND).square().sum(dtype=torch.float64))
        added += float((wanted_BND - before_BND).square().sum(dtype=torch.float64))
    if not (changed < float("inf") and added < float("inf")):  # false for NaN as well
        raise InputError("patch_slimming", expected="finite features", found="infinite ones or NaN", fix="check the weights")
    return (changed / added) ** 0.5 if added else 0.0


def local_positions(kept: Sequence[Sequence[int]]) -> list[list[int]]:
    """What each block keeps, as positions among what the block before it keeps; the first block's as they are."""
    return [
        [*now] if before is None else [before.index(position) for position in now]
        for before, now in zip([None, *kept[:-1]], kept, strict=True)
    ]


def keep_positions_(model: nn.Module, counts: Sequence[int], positions: Sequence[Sequence[int]] | None = None) -> nn.Module:
    """Make a ViT keep so many tokens, the prefix among them, in each of its blocks, in place; returns it.

    Args:
        model: A timm ViT.
        counts: Tokens that leave each block.
        positions: Which ones, among those that come in; None where they are still to be loaded.
    """
    vit: Any = model
    given = [vit.num_prefix_tokens + vit.patch_embed.num_patches, *counts[:-1]]
    between = {
        index: PositionSelection(before, after) for index, (before, after) in enumerate(zip(given, counts, strict=True)) if after < before
    }
    if positions is not None:
        for index, selection in between.items():
            selection.positions.copy_(torch.tensor(positions[index]))
    wrap_blocks(model, between=between)
    return model


def _tokens_of_blocks(vit: Any, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
    """What goes into every block, BND, and what leaves the last one."""
    seen: list[list[torch.Tensor]] = [[] for _ in range(len(vit.blocks) + 1)]
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs, into=into: into.append(inputs[0]))
        for block, into in zip(vit.blocks, seen[:-1], strict=True)
    ]
    hooks.append(vit.blocks[-1].register_forward_hook(lambda _, inputs, output: seen[-1].append(output)))
    try:
        for part in x_BCHW.split(_BATCH):
            vit(part)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in seen]


def _attention(block: Any, tokens_BND: torch.Tensor) -> torch.Tensor:
    """A block's attention weights, BHNN."""
    weights_BHNN: torch.Tensor = block.attn.attend(block.norm1(tokens_BND)).weights_BHNN
    return weights_BHNN


def _mask(kept: Sequence[int], tokens_BND: torch.Tensor) -> torch.Tensor:
    """Ones at those positions (N,), in the tokens' type."""
    mask_N = tokens_BND.new_zeros(tokens_BND.shape[1])
    mask_N[list(kept)] = 1
    return mask_N
