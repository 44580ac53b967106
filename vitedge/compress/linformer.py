"""Linformer attention: keys and values of all tokens are projected to those of a few, and the projection is learned.

Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity" (arXiv:2006.04768), equation 7:
`softmax(Q (E K)^T / sqrt(K)) F V` with E and F of m x N. The paper draws them at random, for it trains from scratch. Here they start
as means of segments of tokens (`vitedge.models.landmarks`), with which pretrained weights still see the whole image; training moves them.

Products of one head: `2 N m (K + V)` multiply-accumulates, where softmax has `N^2 (K + V)`: fewer up to m = N / 2.
The number of tokens is part of the weights, so it is that of the recipe's image size, and patch drop does not go with it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "linformer"


class Config(Section):
    """How many tokens are projected to, and how the projections start."""

    length: int = Field(64, ge=1, description="m, the paper's k: keys and values that are left; at most as many as there are tokens")
    share: Literal["none", "heads", "key_value"] = Field(
        "heads",
        description="none: each head has projections of its own; heads: all heads of a block have one for keys and one for values; "
        "key_value: one for both",
    )
    start: Literal["means", "random"] = Field(
        "means", description="means: of segments of tokens; random: normal with variance 1 / m, the paper's, for training from scratch"
    )
    prefix: Literal["own", "pooled"] = Field(
        "own",
        description="means: own: class and distillation token start as they are, segments are of patches; pooled: of all tokens",
    )
    blocks: tuple[str, ...] = Field(("*",), min_length=1, description="which: fnmatch patterns of block names, such as blocks.1?")

    @model_validator(mode="after")
    def _prefix_is_of_means(self) -> Config:
        if self.start == "random" and self.prefix != "own":
            raise ValueError("no prefix beside start: random")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: projections start from a rule."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Exchange attention, in place; `train` steps that follow learn the projections with the weights.

    Raises:
        UsageError: The model has no softmax attention to exchange, is quantized, or has too few tokens.
    """
    import torch

    from vitedge.compress._linformer import linformer_attention
    from vitedge.models.cores import exchange_cores

    x_BCHW = torch.from_numpy(context.sample(1)[0])
    generator = torch.Generator().manual_seed(context.seed)
    make = partial(linformer_attention, config=config, generator=generator)
    made = exchange_cores(model, TECHNIQUE, config.blocks, x_BCHW, make)
    return Compressed(model, {**config.model_dump(exclude={"blocks"}), **made.notes}, structure=made.structure)


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put the attention of a saved model into a newly built one.

    Raises:
        UsageError: The architecture has no such attention.
    """
    from vitedge.compress._linformer import LinformerAttention
    from vitedge.models.cores import rebuild_cores

    return rebuild_cores(model, structure["cores"], LinformerAttention)
