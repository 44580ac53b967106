"""Patch slimming: the positions whose patches matter least to the answer are left out, block by block, the same for all images.

Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers" (arXiv:2106.02852). It goes top-down: of the last block only the
tokens that answer are needed; every block before it keeps what the block after it keeps, and of the other positions those with the
highest significance, until the block after it makes nearly what it made of all (`tolerance`), or as many as are asked for (`keep`).
The significance of patch i of block t is the paper's: the sum over all paths through heads of later blocks of the squared
attention that the answer pays to it, times that of the squared features which block t's heads gather for it,
`s_i = sum_h ||A_h[:, i]||^2 sum_h ||(P_h |Z|)[i, :]||^2`; `_patch_slimming` has it without a sum over paths.

What differs from the paper: a block is not fine-tuned while its positions are chosen, but all are by the `train` step that should
follow; |Z| is what goes into attention, after its LayerNorm, which the paper leaves out; and the error is relative to what the next
block adds to its tokens. Positions are constants of the exported graph, which gathers by them: nothing is decided while it runs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "patch_slimming"
KEEP = 0.5


class Config(Section):
    """How many positions are kept, or how good they must be, and on what that is measured."""

    keep: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the positions that is left before the last block, fewer with every block on a straight line from all; "
        f"null: {KEEP}, unless tolerance is given",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="in the place of keep: how far off a block may be for the positions that the block before it leaves out, "
        "relative to what it adds to its tokens",
    )
    granularity: int = Field(4, ge=1, description="tolerance: positions that are added at a time")
    images: int = Field(64, ge=1, description="train images on which positions are chosen")

    @model_validator(mode="after")
    def _one_goal(self) -> Config:
        if self.keep is not None and self.tolerance is not None:
            raise ValueError("keep or tolerance, not both")
        if self.tolerance is None and self.granularity != 4:
            raise ValueError("no granularity without a tolerance")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: positions are those of the model at hand."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Choose positions and make the model leave the others out, in place, in training as in use; its weights stay what they are.

    Train steps that follow must be without patch drop, which would move the positions.

    Raises:
        UsageError: The model is quantized, no ViT with a class token, or reduces its tokens already.
        InputError: Features are infinite or NaN.
    """
    import torch

    from vitedge.compress._patch_slimming import choose, keep_positions_, local_positions
    from vitedge.models.attention import open_attention
    from vitedge.models.cost import count
    from vitedge.models.reducing_block import check_reducible, reduction_notes

    check_reducible(model, TECHNIQUE)
    shape_CHW = (3, context.contract.size, context.contract.size)
    macs = count(model, shape_CHW).macs
    x_BCHW = torch.from_numpy(context.sample(config.images)[0])
    began = time.monotonic()
    open_attention(model)
    keep = KEEP if config.keep is None and config.tolerance is None else config.keep
    chosen = choose(model, x_BCHW, keep, config.tolerance or 0.0, config.granularity)
    seconds = time.monotonic() - began
    counts = [len(kept) for kept in chosen.kept]
    keep_positions_(model, counts, local_positions(chosen.kept))
    notes: dict[str, Any] = {"images": len(x_BCHW), "seconds": round(seconds, 2), "keep": keep, "tolerance": config.tolerance}
    notes |= {"kept": counts, "errors": [round(error, 4) for error in chosen.errors], **reduction_notes(model, macs, shape_CHW)}
    return Compressed(model, notes, structure=lambda saved: {"kept": counts})


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Make a newly built model leave positions out as the saved one does; which ones is loaded with its weights.

    Raises:
        UsageError: The architecture has no softmax attention.
    """
    from vitedge.compress._patch_slimming import keep_positions_

    return keep_positions_(model, structure["kept"])
