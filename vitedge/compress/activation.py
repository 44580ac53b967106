"""A cheaper activation in the MLP, where GELU costs what int8 products save.

Mirzadeh et al. 2023, "ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models" (arXiv:2310.04564), stage 1: ReLU
in the place of GELU in a model that was trained with GELU, which is then trained on for a little. Hard swish is Howard et al. 2019,
"Searching for MobileNetV3" (arXiv:1905.02244), section 5.2: `x min(max(x + 3, 0), 6) / 6`.

GELU is an error function of every value between the two layers. Int8 makes the products around it faster and leaves it what it was, so
that it weighs more there than in float; ReLU is one comparison. Weights, shapes and multiply-accumulates stay what they were: only a
measurement on the device says what an activation is worth.

Without `refit` or `train` steps after it the model answers with a function that its weights were not made for, and mostly wrongly
(results/LOG.md). A step of `prune` before this one scores units by the model as it was, one right after it by those answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "activation"


class Config(Section):
    """Which function, and where."""

    kind: Literal["relu", "hard_swish"] = Field(
        "relu", description="relu: the cheapest; hard_swish: dearer, and below zero for small negative values, as GELU is"
    )
    blocks: tuple[str, ...] = Field(("*",), min_length=1, description="which: fnmatch patterns of block names, such as blocks.1?")


def files(config: Config, builds: Path) -> list[Path]:
    """None: the weights are those of the model at hand."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Exchange the activation of MLPs, in place; `refit` or `train` steps that follow fit the weights to it.

    Raises:
        UsageError: The model is quantized or has no transformer blocks, a pattern names none of them, or a block's MLP has no activation.
    """
    from vitedge.compress._activation import exchange_
    from vitedge.models.blocks import block_names, matching_blocks

    chosen = matching_blocks(block_names(model, TECHNIQUE), config.blocks, TECHNIQUE)
    before = exchange_(model, config.kind, chosen)
    return Compressed(model, {"kind": config.kind, "before": before}, structure=lambda saved: {"kind": config.kind, "blocks": chosen})


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Give a newly built model the activations of the saved one.

    Raises:
        UsageError: The architecture has no such MLP.
    """
    from vitedge.compress._activation import exchange_

    exchange_(model, structure["kind"], structure["blocks"])
    return model
