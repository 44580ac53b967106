"""Performer attention: the exponential of a product is estimated by a product of random features, so that tokens never meet in pairs.

Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv:2009.14794), FAVOR+ for attention in both directions:
`phi(Q) (phi(K)^T V) / phi(Q) (phi(K)^T 1)` with positive orthogonal random features (`vitedge.models.random_features`). The estimate has
no bias and its error falls with the root of the number of features, but pretrained attention is peaked, and few features do not
tell its peaks: it needs training. Each block draws its directions once, from the recipe's seed; they are kept in the checkpoint.

Products of one head: `N r (2 K + 2 V + 1)` multiply-accumulates with r features, where softmax has `N^2 (K + V)`: fewer up to r = N / 2.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "performer"


class Config(Section):
    """How many features."""

    features: int = Field(64, ge=1, description="r, of each query and key; the error falls with its root, the cost is proportional to it")
    blocks: tuple[str, ...] = Field(("*",), min_length=1, description="which: fnmatch patterns of block names, such as blocks.1?")


def files(config: Config, builds: Path) -> list[Path]:
    """None: directions are drawn."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Exchange attention, in place; `train` steps that follow fit the weights to its features.

    Raises:
        UsageError: The model has no softmax attention to exchange, or is quantized.
    """
    import torch

    from vitedge.compress._performer import performer_attention
    from vitedge.models.cores import exchange_cores

    x_BCHW = torch.from_numpy(context.sample(1)[0])
    generator = torch.Generator().manual_seed(context.seed)
    make = partial(performer_attention, config=config, generator=generator)
    made = exchange_cores(model, TECHNIQUE, config.blocks, x_BCHW, make)
    return Compressed(model, {**config.model_dump(exclude={"blocks"}), **made.notes}, structure=made.structure)


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put the attention of a saved model into a newly built one.

    Raises:
        UsageError: The architecture has no such attention.
    """
    from vitedge.compress._performer import PerformerAttention
    from vitedge.models.cores import rebuild_cores

    return rebuild_cores(model, structure["cores"], PerformerAttention)
