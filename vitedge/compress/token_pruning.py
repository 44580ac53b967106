"""Attention-score token pruning: the patches that the class token looks at least are dropped on the way.

Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (EViT,
arXiv:2202.07800): in a few blocks, between attention and MLP, the patch tokens with the highest attention of the class token, averaged
over heads, are kept. The others become one more token, their sum weighted by that attention, or are gone. How many are kept does not
depend on the image, so that the exported graph has static shapes. Nothing is learned for it: it works without training, and better
with it. A distillation token answers too, so its attention counts as much as the class token's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "token_pruning"


class Config(Section):
    """How many tokens are kept, where, and what becomes of the others."""

    keep: float = Field(0.7, gt=0, lt=1, description="share of the patch tokens, of those that come to a block, that it keeps")
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        None, description="blocks that drop tokens, counted from 0; null: at a quarter, half and three quarters of the model"
    )
    fuse: bool = Field(True, description="the others become one token, weighted by attention; false: they are gone")

    @model_validator(mode="after")
    def _each_block_once(self) -> Config:
        if self.blocks is not None and len(set(self.blocks)) != len(self.blocks):
            raise ValueError("each block once")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: attention decides, image by image."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Make the model drop tokens, in place, in training as in use; its weights stay what they are.

    Raises:
        UsageError: The model is quantized, no ViT with a class token, or reduces its tokens already; it has no such block; or one of
            the blocks would keep all.
    """
    from vitedge.compress._token_pruning import check_keep, prune_tokens_
    from vitedge.models.cost import count
    from vitedge.models.reducing_block import check_reducible, chosen_blocks, quarters, reduction_notes

    check_reducible(model, TECHNIQUE)
    vit: Any = model
    depth, shape_CHW = len(vit.blocks), (3, context.contract.size, context.contract.size)
    blocks = chosen_blocks(TECHNIQUE, config.blocks, quarters(depth), depth)
    check_keep(config.keep, config.fuse, len(blocks), vit.patch_embed.num_patches)
    macs = count(model, shape_CHW).macs
    plain: dict[str, Any] = {"blocks": blocks, "keep": config.keep, "fuse": config.fuse}
    prune_tokens_(model, **plain)
    return Compressed(model, {**plain, **reduction_notes(model, macs, shape_CHW)}, structure=lambda saved: plain)


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Make a newly built model drop tokens as the saved one does.

    Raises:
        UsageError: The architecture has no softmax attention.
    """
    from vitedge.compress._token_pruning import prune_tokens_

    return prune_tokens_(model, **structure)
