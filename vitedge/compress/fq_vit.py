"""FQ-ViT: a fully quantized ViT from a few hundred images, nothing trained (Lin et al. 2022, arXiv:2111.13824).

Two things of a ViT do not bear plain 8-bit rounding, LayerNorm inputs, whose channels differ in size by orders of magnitude, and
attention, nearly all of it close to 0. The first get a power-of-two factor per channel, and LayerNorm its integers
(`_fq_vit_layernorm`); the second is computed in integers and rounded in log2, so that its product with V is a shift
(`_fq_vit_softmax`). Linear layers, the patch embedding and the classifier have int8 weights per output and 8-bit
inputs; queries, keys, values and scores have 8 bits as well. GELU, biases, position embeddings and the sums of the residual
stream stay in float, as does the scale and shift of LayerNorm: what comes of each is rounded where the next layer reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn


class Config(Section):
    """Bits, and how ranges are found; the defaults are the paper's, but for fewer images than its 1,000."""

    images: int = Field(256, ge=100, le=1000, description="train images on which everything is calibrated")
    weight_bits: int = Field(8, ge=2, le=8, description="of weights, symmetric with a scale per output feature")
    activation_bits: int = Field(
        8, ge=4, le=8, description="of linear layers' inputs and of queries, keys and values, asymmetric with one scale"
    )
    layernorm_bits: int = Field(8, ge=4, le=8, description="of LayerNorm inputs, before they are shifted by their channel's exponent")
    max_exponent: int = Field(
        3, ge=0, le=3, description="largest exponent of a LayerNorm channel; 0: one scale for all channels of a layer"
    )
    softmax: Literal["log2", "uniform"] = Field(
        "log2", description="log2: integer softmax, weights are powers of two; uniform: float softmax, weights in equal steps, to compare"
    )
    attention_bits: int = Field(4, ge=2, le=8, description="of attention weights after softmax; with log2 at most 5")
    normalize: bool = Field(
        False,
        description="softmax: log2: count codes from each row's greatest weight and divide the row by its sum; the paper does neither",
    )
    method: Literal["minmax", "moving_average", "percentile", "mse"] = Field(
        "minmax", description="how ranges of activations are found; those of LayerNorm inputs are always their extremes"
    )

    @model_validator(mode="after")
    def _codes_have_weights(self) -> Config:
        if self.softmax == "log2" and self.attention_bits > 5:
            raise ValueError("attention_bits up to 5 beside softmax: log2, where 5 reach down to 2^-31 already")
        if self.softmax == "uniform" and self.normalize:
            raise ValueError("no normalize beside softmax: uniform")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: everything is measured on the model at hand."""
    return []


def scheme(config: Config) -> str:
    """Name of the exported files' scheme, such as `int8_fqvit_w8a8_log4`."""
    kind = {"log2": "log", "uniform": "uni"}[config.softmax]
    return f"int8_fqvit_w{config.weight_bits}a{config.activation_bits}_{kind}{config.attention_bits}"


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Quantize the model as it is, in place, from `config.images` train images or all there are; no `train` step can follow.

    Raises:
        UsageError: The model is no ViT of timm's, is quantized already, has gates, or shares weights.
        InputError: An activation is infinite or NaN.
    """
    import torch

    from vitedge.compress._fq_vit import quantize_model, structure

    x_BCHW, _ = context.sample(config.images)
    notes: dict[str, Any] = {"scheme": scheme(config), "method": config.method}
    notes |= quantize_model(model, config, torch.from_numpy(x_BCHW), context.torch_device)
    return Compressed(model, notes, structure=lambda saved: structure(saved, scheme(config)))


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """A newly built model with the modules of the saved one, whose values are still to be loaded.

    Raises:
        UsageError: The architecture does not have the layers that were quantized.
    """
    from vitedge.compress._fq_vit import rebuild

    return rebuild(model, structure)
