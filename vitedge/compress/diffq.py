"""DiffQ: weights whose width in bits is learned for each group, until the packed model has a size that was asked for.

Defossez et al. 2021, "Differentiable Model Compression via Pseudo Quantization Noise" (arXiv:2104.09987). Training adds noise as
large as rounding would be, so that widths have a gradient; the loss has the model's size as a term. What is saved is really packed,
every group at its own width. Runtimes have no mixed widths: the ONNX file holds a weight as integers of 4 bits where none of
its groups has more, else of 8 (or 16), with a scale for each group.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn


class Config(Section):
    """How widths are grouped and bounded, and what decides the size."""

    group_size: int = Field(
        16,
        ge=4,
        le=4096,
        description="inputs that share a width; ONNX Runtime multiplies blocks of 16, 32, 64 or 128 packed, others in float",
    )
    min_bits: int = Field(2, ge=2, le=14, description="least width")
    max_bits: int = Field(15, ge=3, le=15, description="greatest width; 4 gives ONNX files of 4-bit integers throughout")
    start_bits: float = Field(8.0, gt=2, lt=15, description="width that every group begins with")
    penalty: float = Field(
        1.0, ge=0, description="lambda: loss per MiB of the checkpoint. Beside target_mib it is steered, and begins here; without, sizes "
        "fall as training goes on: set train.evaluate_every to its steps, so that no earlier, larger model is kept"
    )  # fmt: skip
    target_mib: float | None = Field(None, gt=0, description="the checkpoint's file is at most so large; null: the penalty alone decides")
    bits_lr_scale: float = Field(50.0, gt=0, description="learning rate of the widths in multiples of the train step's")
    clip: float | None = Field(
        None, gt=0, description="weights are kept within so many root mean squares, so that few outliers do not set the step of all; "
        "null: the range is that of all weights, as in the paper"
    )  # fmt: skip
    round_share: float = Field(
        0.0, ge=0, lt=1, description="share of the last steps in which widths are final and weights are rounded, with straight-through "
        "gradients; 0: noise to the end, as in the paper"
    )  # fmt: skip
    first_last_bits: int | None = Field(
        None, ge=2, le=15, description="width of the patch embedding and of the classifier, not learned; null: learned as all others"
    )
    exclude: tuple[str, ...] = Field((), description="layers that stay float, by name or pattern (`blocks.0.*`)")
    min_elements: int = Field(1024, ge=1, description="layers with fewer weights stay float")

    @model_validator(mode="after")
    def _start_is_inside(self) -> Config:
        if not self.min_bits < self.start_bits < self.max_bits:
            raise ValueError(f"min_bits < start_bits < max_bits; {self.min_bits}, {self.start_bits:g}, {self.max_bits} are not so")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: widths are learned from the training images."""
    return []


def step_cost(config: Config) -> float:
    """Noise is drawn for every weight in every step."""
    return 2.0


def scheme(config: Config) -> str:
    """The name that exported files carry."""
    return "diffq"


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Let the `train` steps that follow learn widths and weights together; the model keeps its weights, and changes in place.

    In training mode weights have noise on them; in eval mode they are rounded at the widths that would be saved, so that
    every top-1 on the way is one of a model that has the target's size.

    Raises:
        UsageError: No layer is left to quantize, a pattern fits none, the target is too small, or the model is quantized, has gates or
            shared weights.
    """
    from vitedge.compress._diffq import SizePenalty
    from vitedge.compress._diffq_layers import convert, prepare

    plan = prepare(model, config, context)
    notes: dict[str, Any] = {**config.model_dump(mode="json"), "weights": sum(int(w.sizes_OG.sum()) for w in plan.widths)}
    # With a target every top-1 is one at that size; without, the best would be one of before the widths have shrunk.
    keeps_last = config.target_mib is None
    return Compressed(model, notes, (SizePenalty(plan),), plan.on_step, partial(convert, notes=notes), structure, keeps_last=keeps_last)


def structure(model: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs of a converted model."""
    from vitedge.compress._mixed_weight import MixedWeight
    from vitedge.models.quantized import QuantizedPatchEmbedding, describe

    made = describe(model)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in made}
    linears = {name: layer.linear if isinstance(layer, QuantizedPatchEmbedding) else layer for name, layer in layers.items()}
    mixed = {name: made[name] for name, layer in linears.items() if isinstance(getattr(layer, "weight", None), MixedWeight)}
    return {"scheme": "diffq", "modules": mixed}


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """The packed layers in a newly built model, their bytes still to be loaded.

    Raises:
        UsageError: The architecture has no such layer.
    """
    from vitedge.compress._mixed_weight import MixedWeight
    from vitedge.models.quantized import rebuild as rebuild_modules

    return rebuild_modules(model, structure["modules"], MixedWeight)
