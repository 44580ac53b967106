"""Scatterbrain attention: random features for all pairs of tokens, and exact scores for a few.

Chen et al. 2021, "Scatterbrain: Unifying Sparse and Low-rank Attention Approximation" (arXiv:2110.15343): attention before its rows are
divided by their sums is `phi(Q) phi(K)^T + S`, with features as in Performer (`vitedge.models.random_features`) and S sparse,
`S_ij = exp(q_i . k_j) - phi(q_i) . phi(k_j)` where it is not 0: there the sum is exact, elsewhere the features' estimate.

Where S stands decides what it costs. The paper looks for the largest scores by hashing, of which no exported graph of static shapes has
anything. `pattern: top` takes each query's largest scores, the best that hashing could find, but has to compute all of them for it: it
costs more than softmax attention, and is here to say what the approximation is worth. `pattern: window`, the default, is known
beforehand: blocks of consecutive patches, which in an image are near each other, and the class and distillation token, which attend
to all and are attended to by all. Then no score is computed that is not used.

Products of one head, window w, r features, N patches and p other tokens:
`N r (2 K + 2 V + 1) + (N w + 2 N p + p^2) (K + V)` multiply-accumulates, where softmax has `(N + p)^2 (K + V)`.
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

TECHNIQUE = "scatterbrain"
WINDOW, TOP = 14, 16


class Config(Section):
    """How many features, and where scores are exact."""

    features: int = Field(64, ge=1, description="r, of each query and key, for the scores that are estimated")
    pattern: Literal["window", "top"] = Field(
        "window",
        description="where scores are exact. window: within blocks of consecutive patches, and all of tokens that stand for no patch; "
        "top: each query's largest, which costs more than softmax attention",
    )
    window: int = Field(WINDOW, ge=1, description="window: patches in a block, at most; 14 are a row of patches of 16 px at 224 px")
    top: int = Field(TOP, ge=1, description="top: exact scores of each query; at most as many as there are tokens")
    blocks: tuple[str, ...] = Field(("*",), min_length=1, description="which: fnmatch patterns of block names, such as blocks.1?")

    @model_validator(mode="after")
    def _settings_are_of_the_pattern(self) -> Config:
        if self.pattern == "window" and self.top != TOP:
            raise ValueError("no top beside pattern: window")
        if self.pattern == "top" and self.window != WINDOW:
            raise ValueError("no window beside pattern: top")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: directions are drawn."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Exchange attention, in place; `train` steps that follow fit the weights to it.

    Raises:
        UsageError: The model has no softmax attention to exchange, is quantized, or has too few tokens.
    """
    import torch

    from vitedge.compress._scatterbrain import scatterbrain_attention
    from vitedge.models.cores import exchange_cores

    x_BCHW = torch.from_numpy(context.sample(1)[0])
    generator = torch.Generator().manual_seed(context.seed)
    make = partial(scatterbrain_attention, config=config, generator=generator)
    made = exchange_cores(model, TECHNIQUE, config.blocks, x_BCHW, make)
    return Compressed(model, {**config.model_dump(exclude={"blocks"}), **made.notes}, structure=made.structure)


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put the attention of a saved model into a newly built one.

    Raises:
        UsageError: The architecture has no such attention.
    """
    from vitedge.compress._scatterbrain import make_core
    from vitedge.models.cores import rebuild_cores

    return rebuild_cores(model, structure["cores"], make_core)
