"""Nystroem attention: softmax attention through a few landmarks, with the pretrained weights as they are.

Xiong et al. 2021, "Nystroemformer: A Nystroem-Based Algorithm for Approximating Self-Attention" (arXiv:2102.03902):
`softmax(Q Kl^T) pinv(softmax(Ql Kl^T)) softmax(Ql K^T) V`, every product divided by sqrt(K), with landmarks Ql and Kl that are
means of segments of the queries and keys (`vitedge.models.landmarks`), and the pseudo-inverse by six iterations of third order
(`vitedge.models.pseudo_inverse`). It adds no weights: a checkpoint of one number of landmarks is where another starts, by `weights:`.

Products of one head: `N m (2 K + 2 V) + m^2 (K + V) + 24 m^3` multiply-accumulates, where softmax has `N^2 (K + V)`. With 197 tokens and
64 landmarks that is twice as many, with 32 half, with 24 a third; the notes count it. A runtime that computes in bf16 has the
pseudo-inverse in bf16 as well: hold such a file to its top-1.
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

TECHNIQUE = "nystrom"


class Config(Section):
    """How many landmarks, and which."""

    landmarks: int = Field(64, ge=1, description="m, those of prefix: own included; at most as many as there are tokens")
    prefix: Literal["own", "pooled"] = Field(
        "own",
        description="own: class and distillation token are landmarks themselves, segments are of patches; pooled: of all tokens",
    )
    iterations: int = Field(6, ge=1, le=12, description="of the pseudo-inverse; the paper's are 6, more than 12 only add rounding errors")
    conv_kernel: int | None = Field(
        None,
        ge=1,
        description="odd: add a depthwise convolution over so many tokens of V, as the paper does; it starts at zero, to be trained",
    )
    blocks: tuple[str, ...] = Field(("*",), min_length=1, description="which: fnmatch patterns of block names, such as blocks.1?")

    @model_validator(mode="after")
    def _kernel_has_a_middle(self) -> Config:
        if self.conv_kernel is not None and self.conv_kernel % 2 == 0:
            raise ValueError("an odd conv_kernel")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: the weights are those of the model at hand."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Exchange attention, in place; `train` steps that follow win back what it loses.

    Raises:
        UsageError: The model has no softmax attention to exchange, is quantized, or does not fit the landmarks.
    """
    import torch

    from vitedge.compress._nystrom import nystrom_attention
    from vitedge.models.cores import exchange_cores

    x_BCHW = torch.from_numpy(context.sample(1)[0])
    made = exchange_cores(model, TECHNIQUE, config.blocks, x_BCHW, partial(nystrom_attention, config=config))
    return Compressed(model, {**config.model_dump(exclude={"blocks"}), **made.notes}, structure=made.structure)


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put the attention of a saved model into a newly built one.

    Raises:
        UsageError: The architecture has no such attention.
    """
    from vitedge.compress._nystrom import NystromAttention
    from vitedge.models.cores import rebuild_cores

    return rebuild_cores(model, structure["cores"], NystromAttention)
