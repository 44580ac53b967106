"""DynamicViT: small networks learn, from what a patch token holds and what all hold together, which tokens go on.

Rao et al. 2021, "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (arXiv:2106.02034). Before a few blocks
a predictor gives every patch token that is left two scores, for keeping and for dropping it. In training the choice is drawn from them
by Gumbel-softmax, with a straight-through gradient, and a dropped token is masked as a key, so that the shapes of a batch stay; a term
of the loss draws the share of kept tokens towards `keep`, `keep^2` and `keep^3` of all. Out of training, as in the exported graph, the
tokens with the highest scores are kept, always as many: shapes are static. Distillation, which the paper adds, is `distill`.

It needs a `train` step after it: scores begin random. What differs from the paper: a masked key's score gets the logarithm of its mask,
which is the paper's product with the mask but for the token's own key, which the paper leaves in (a dropped token's output is read by
no one, so nothing that is kept changes); and a predictor begins with a bias by which it keeps the share that is asked for.
The masks are drawn from torch's own random numbers, which training seeds step by step: a resumed run draws the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "dynamic_vit"


class Config(Section):
    """How many tokens are kept, where it is decided, and how it is learned."""

    keep: float = Field(0.7, gt=0, lt=1, description="share of the patch tokens, of those that come to a block, that it keeps")
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        None, description="blocks before which it is decided, counted from 0; null: at a quarter, half and three quarters of the model"
    )
    weight: float = Field(2.0, gt=0, description="of the loss that draws the share of kept tokens to what `keep` asks for")
    lr_scale: float = Field(10.0, gt=0, description="learning rate of the predictors, which begin random, in times of the schedule's")

    @model_validator(mode="after")
    def _each_block_once(self) -> Config:
        if self.blocks is not None and len(set(self.blocks)) != len(self.blocks):
            raise ValueError("each block once")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: predictors begin random."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Put predictors into the model, in place; the `train` steps that follow learn them with the weights.

    Raises:
        UsageError: The model is quantized, no ViT with a class token, or reduces its tokens already; or it has no such block.
    """
    import torch

    from vitedge.compress._dynamic_vit import KeepLoss, kept_by_stage, select_tokens_, start
    from vitedge.models.cost import count
    from vitedge.models.reducing_block import check_reducible, chosen_blocks, quarters, reduction_notes

    check_reducible(model, TECHNIQUE)
    vit: Any = model
    depth, shape_CHW = len(vit.blocks), (3, context.contract.size, context.contract.size)
    blocks, patches = chosen_blocks(TECHNIQUE, config.blocks, quarters(depth), depth), vit.patch_embed.num_patches
    kept = kept_by_stage(config.keep, len(blocks), patches)
    macs = count(model, shape_CHW).macs
    with torch.random.fork_rng(devices=[]):  # a resumed run begins with the same predictors, and nothing else moves
        torch.manual_seed(context.seed)
        selections = select_tokens_(model, blocks, kept)
    for selection in selections:
        start(selection.predictor, config.keep, config.lr_scale)
    loss = KeepLoss(selections, [tokens / patches for tokens in kept], config.weight)
    notes = {**config.model_dump(), "blocks": blocks, "kept": kept, **reduction_notes(model, macs, shape_CHW)}
    return Compressed(model, notes, (loss,), structure=lambda saved: {"blocks": blocks, "kept": kept})


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put predictors, values still to be loaded, into a newly built model.

    Raises:
        UsageError: The architecture has no softmax attention.
    """
    from vitedge.compress._dynamic_vit import select_tokens_

    select_tokens_(model, structure["blocks"], structure["kept"])
    return model
