"""SOFT attention: a Gaussian kernel in the place of softmax, through landmarks.

Lu et al. 2021, "SOFT: Softmax-free Transformer with Linear Complexity" (arXiv:2110.11945): `S V` with
`S_ij = exp(-|q_i - k_j|^2 / (2 sqrt(K)))` and one projection for queries and keys, so that S is a kernel's matrix; and S by the
Nystroem method, `P^T pinv(A) P` with A among landmarks and P between landmarks and tokens, the pseudo-inverse by twenty
iterations of Newton and Raphson (`vitedge.models.pseudo_inverse`). Rows of S are not divided by their sums, which is what lets a symmetric
decomposition hold; pretrained weights, made for rows that sum to 1, have to be trained to it.

Three things differ from the paper: landmarks are means of segments in the order of tokens (`vitedge.models.landmarks`) and not of a
learned convolution over the image; the iteration starts from `A^T / (||A||_1 ||A||_inf)`, the paper's `2 b^n / ||A||_1^2` with b one
half and n = 1, which converges for every A; and gradients go through the iterations.

Products of one head, keys as queries: `N m (K + 2 V) + m^2 (K + V) + 40 m^3` multiply-accumulates, where softmax has `N^2 (K + V)`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "soft"


class Config(Section):
    """How many landmarks, and of what."""

    landmarks: int = Field(
        49, ge=1, description="m, those of prefix: own included; at most as many as there are tokens; the paper's are 49"
    )
    keys: Literal["queries", "own"] = Field(
        "queries",
        description="queries: the projection of queries gives keys too, as in the paper, and that of keys stays in the file unused; "
        "own: keys have theirs, and the kernel between them is not symmetric",
    )
    prefix: Literal["own", "pooled"] = Field(
        "own",
        description="own: class and distillation token are landmarks themselves, segments are of patches; pooled: of all tokens",
    )
    iterations: int = Field(20, ge=1, le=24, description="of the pseudo-inverse; the paper's are 20, more than 24 only add rounding errors")
    blocks: tuple[str, ...] = Field(("*",), min_length=1, description="which: fnmatch patterns of block names, such as blocks.1?")


def files(config: Config, builds: Path) -> list[Path]:
    """None: the weights are those of the model at hand."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Exchange attention, in place; `train` steps that follow fit the weights to the kernel.

    Raises:
        UsageError: The model has no softmax attention to exchange, is quantized, or does not fit the landmarks.
    """
    import torch

    from vitedge.compress._soft import soft_attention
    from vitedge.models.cores import exchange_cores

    x_BCHW = torch.from_numpy(context.sample(1)[0])
    made = exchange_cores(model, TECHNIQUE, config.blocks, x_BCHW, partial(soft_attention, config=config))
    return Compressed(model, {**config.model_dump(exclude={"blocks"}), **made.notes}, structure=made.structure)


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put the attention of a saved model into a newly built one.

    Raises:
        UsageError: The architecture has no such attention.
    """
    from vitedge.compress._soft import SoftAttention
    from vitedge.models.cores import rebuild_cores

    return rebuild_cores(model, structure["cores"], SoftAttention)
