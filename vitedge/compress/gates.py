"""Trainable gates on the dimensions of a ViT, which learn what can be pruned.

Zhu, Tang and Han 2021, "Vision Transformer Pruning" (arXiv:2104.08500): what goes into qkv, into the projection of attention and
into the second layer of the MLP is multiplied with factors `a` that start at 1, and the loss gets `lambda ||a||_1`. A `prune` step
with `score: gates` then cuts the dimensions whose factors are the least. Soft gates are `sigmoid(a / temperature)`, with a
temperature that falls while they train and 0 or 1 outside of training, so that validation judges what a cut would leave.
`skip` gates the channels of the residual stream, which the skip connections tie together over all blocks (Yu and Wu 2021, "A
Unified Pruning Framework for Vision Transformers", arXiv:2111.15127): one factor for a channel, wherever it is read.
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

LR_SCALES = {"l1": 10.0, "soft": 100.0}  # a factor has 1 to fall, a logit 3


class Config(Section):
    """Which dimensions have gates, and what drives them to zero."""

    where: tuple[Literal["qkv_input", "value_dims", "mlp", "heads", "skip"], ...] = Field(
        ("qkv_input", "value_dims", "mlp"),
        min_length=1,
        description="qkv_input: what qkv reads, value_dims: what attention's projection reads, mlp: its hidden units (those three are the "
        "paper's), heads: whole ones, skip: channels of the residual stream",
    )
    kind: Literal["l1", "soft"] = Field("l1", description="l1: factors, driven to 0 by their L1 norm; soft: sigmoids that harden")
    l1: float = Field(
        1e-4, gt=0, description="lambda: of the sum of all gates, |a| or the open share of soft ones, in the loss of each image"
    )
    temperature: float = Field(0.1, gt=0, lt=1, description="soft: what logits are divided by at the end of a `train` step, from 1 on")
    lr_scale: float | None = Field(
        None, gt=0, description="learning rate of gates in times of the schedule's; null: 10, or 100 for soft ones"
    )

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Config:
        if len(set(self.where)) < len(self.where):
            raise ValueError("each kind once in where")
        if self.kind == "l1" and self.temperature != 0.1:
            raise ValueError("no temperature beside kind: l1, whose factors have none")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: gates start open."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Put open gates into the model, in place, for the `train` steps that follow.

    Outside of training the model answers as before. A later `prune` with `score: gates` takes them; gates that no such step took are
    folded into the weights in the end, so that the saved model is the architecture's own.

    Raises:
        UsageError: The model has gates already, is quantized or no ViT, or a layer to gate is not a plain one.
    """
    from vitedge.compress._gates import Annealing, Sparsity, fold, insert
    from vitedge.models.gated import gated_layers

    lr_scale = LR_SCALES[config.kind] if config.lr_scale is None else config.lr_scale
    gates, units = insert(model, config.where, config.kind == "soft", lr_scale)
    names = tuple(gated_layers(model))
    notes: dict[str, Any] = {"kind": config.kind, "l1": config.l1, "lr_scale": lr_scale, "gates": units}
    if config.kind == "soft":
        notes["temperature"] = config.temperature
    return Compressed(
        model,
        notes,
        (Sparsity(gates, config.l1),),
        on_step=Annealing(model, names, gates, config.temperature),
        convert=partial(fold, names=names),
        keeps_last=True,
    )
