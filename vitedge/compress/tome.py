"""Token merging: in every block the patch tokens that are most alike become one.

Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv:2210.09461): between attention and MLP the patch tokens are dealt into
two sets by turns, each of the first finds the one of the second that is most like it (by the cosine of their keys, averaged over
heads), and the r most alike pairs become their mean, weighted by how many patches each stands for. A merged token counts in attention
as the patches it stands for (equation 1). The number of tokens of a block does not depend on the image, so that the exported graph
has static shapes. It works without training, and better with it.

Class, distillation and register tokens never merge; here they take no part in the dealing either. A block merges at most half of its
patch tokens, as in the paper; asking for more is not an error where `r` is given, and the notes say what was merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "tome"
R = 8


class Config(Section):
    """How many tokens merge, where, and what a merged one weighs."""

    r: int | None = Field(
        None, ge=1, description=f"patch tokens that a block merges, or with schedule: decreasing the mean; null: {R}, unless keep is given"
    )
    keep: float | None = Field(None, gt=0, lt=1, description="share of the patch tokens that is left at the end; in the place of r")
    schedule: Literal["constant", "decreasing"] = Field(
        "constant",
        description="constant: each block merges as many; decreasing: as many in all, the first twice the mean and the last none",
    )
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        None, description="blocks that merge, counted from 0; null: all. Merging costs time itself: few blocks with a large r are faster"
    )
    proportional: bool = Field(True, description="a merged token counts in attention as the patches it stands for")

    @model_validator(mode="after")
    def _one_number_and_each_block_once(self) -> Config:
        if self.r is not None and self.keep is not None:
            raise ValueError("r or keep, not both")
        if self.blocks is not None and len(set(self.blocks)) != len(self.blocks):
            raise ValueError("each block once")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: tokens are compared as they come."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Make the model merge its tokens, in place, in training as in use; its weights stay what they are.

    Raises:
        UsageError: The model is quantized, no ViT with a class token, or reduces its tokens already; it has no such block; or `keep`
            cannot be reached.
    """
    from vitedge.compress._tome import merge_tokens_, planned
    from vitedge.models.cost import count
    from vitedge.models.reducing_block import check_reducible, chosen_blocks, reduction_notes

    check_reducible(model, TECHNIQUE)
    vit: Any = model
    depth, shape_CHW = len(vit.blocks), (3, context.contract.size, context.contract.size)
    blocks = chosen_blocks(TECHNIQUE, config.blocks, range(depth), depth)
    asked, merged = planned(config, blocks, depth, vit.patch_embed.num_patches)
    macs = count(model, shape_CHW).macs
    merge_tokens_(model, merged, config.proportional)
    notes = {**config.model_dump(), "asked": asked, "merged": merged, **reduction_notes(model, macs, shape_CHW)}
    return Compressed(model, notes, structure=lambda saved: {"merged": merged, "proportional": config.proportional})


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Make a newly built model merge its tokens as the saved one does.

    Raises:
        UsageError: The architecture has no softmax attention.
    """
    from vitedge.compress._tome import merge_tokens_

    return merge_tokens_(model, structure["merged"], structure["proportional"])
