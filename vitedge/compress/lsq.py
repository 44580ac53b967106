"""LSQ: the steps that weights and activations are rounded to are learned together with the weights.

Esser et al. 2020, "Learned Step Size Quantization" (arXiv:1902.08153), with the learned offset of Bhalgat et al. 2020,
"LSQ+" (arXiv:2004.09576), for activations that have two unlike sides. Weights have a step per output feature, activations
one per tensor. What goes into every linear layer and, with `attention`, into both products of attention is rounded; the
class token, position embedding, LayerNorm, softmax, GELU, biases and the residual stream stay float: they are under 2 % of
the bytes of a DeiT, and an 8-bit residual stream alone costs tens of points.
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


class Config(Section):
    """How many bits, where, and how the steps start and learn."""

    weight_bits: int = Field(8, ge=2, le=8, description="of the weights of linear layers")
    activation_bits: int = Field(8, ge=2, le=8, description="of what goes into linear layers and into the products of attention")
    first_last_bits: int = Field(8, ge=2, le=8, description="of both, for the patch embedding and the classifier")
    attention: bool = Field(True, description="round queries, keys, values and attention weights too, so that both products are integer")
    exclude: tuple[str, ...] = Field((), description="layers that stay float: fnmatch patterns of module names, such as blocks.0.mlp.*")
    start: Literal["best", "lsq", "mse"] = Field(
        "best",
        description="first steps. lsq: 2 mean|x| / sqrt(Q_P), the paper's; mse: those of least squared error; "
        "best: whichever has the lower loss on the calibration images",
    )
    calibration_images: int = Field(128, ge=1, description="train images that the first steps of activations are found on")
    step_lr_scale: float = Field(10.0, gt=0, description="learning rate of a step, relative to its size, in times of the schedule's")


def files(config: Config, builds: Path) -> list[Path]:
    """None: the first steps are those of the model at hand."""
    return []


def step_cost(config: Config) -> float:
    """Each layer rounds twice, forward and back."""
    return 2.2


def scheme(config: Config) -> str:
    """`int8_lsq_w4a8` for weights of 4 bits and activations of 8: schemes begin with the arithmetic that runs."""
    return f"int8_lsq_w{config.weight_bits}a{config.activation_bits}"


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Make the model round as it will after training; the `train` steps that follow learn the steps with the weights.

    Without such a step it is post-training quantization with the first steps. It may stand before or after `distill`.

    Raises:
        UsageError: The model is quantized already, has gates or shares weights, a pattern matches no layer or all of them, attention
            cannot be opened, or a layer is of a kind that cannot be quantized.
        InputError: Activations are infinite or NaN.
    """
    import torch

    from vitedge.compress._lsq import convert
    from vitedge.compress._lsq_prepare import prepare

    x_BCHW, target = context.sample(config.calibration_images)
    notes = prepare(model, config, torch.from_numpy(x_BCHW), torch.from_numpy(target))
    return Compressed(model, notes, convert=convert, structure=partial(_structure, scheme=scheme(config)))


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put the quantized modules of a saved model into a newly built one.

    Raises:
        UsageError: The architecture has no such layers.
    """
    from vitedge.models import quantized

    return quantized.rebuild(model, structure["modules"])


def _structure(model: nn.Module, scheme: str) -> dict[str, Any]:
    from vitedge.models.quantized import describe

    return {"scheme": scheme, "modules": describe(model)}
