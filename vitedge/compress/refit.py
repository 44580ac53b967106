"""Least squares in the place of training: what is left of a model is fitted to what the whole model did.

He, Zhang and Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv:1707.06168), the least squares of section
3.1 without its choice of channels: given what goes into a layer after a cut, the weights for which what comes out is closest to what came
out before. Layer after layer, on what the layers in front make of the images now and towards what the model did before (its "whole model
pruning", section 3.2), so that a layer also makes good what was lost in front of it. Fitted are the linear layers that write to the
residual stream: the output projection of attention and the last layer of the MLP. They read what pruning, a factored layer, another kind
of attention or another activation left, and what they are to come to is the stream, whose shape none of these changes.

Each fit is a ridge regression towards the weights as they are: `min_D |E - X D|^2 + l |D|^2`, where X are a layer's inputs, E what the
stream lacks and D the change of weights, in closed form from sums over tokens. How strong the ridge is, each layer decides by a fifth of
the images, which its fits have not seen; no change is one of the choices. All tokens count alike, the class token no more than others.

    steps: [prune: {units: [mlp], target: {params: 0.72}}, activation: {kind: relu}, refit: {}]

It takes seconds to minutes and no labels; `train` steps may follow. Memory: twice the images' residual
streams, 4 bytes a value (2,048 images of DeiT-Ti at 224 px: 2 x 310 MB).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

TECHNIQUE = "refit"


class Config(Section):
    """On what, and which layers."""

    images: int = Field(2048, ge=10, description="train images, a fifth of them to choose the ridge by")
    layers: tuple[Literal["attn", "mlp"], ...] = Field(
        ("attn", "mlp"), min_length=1, description="attn: the output projection of attention; mlp: its last layer"
    )

    @model_validator(mode="after")
    def _each_layer_once(self) -> Config:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("each once in layers")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: it is fitted to the model that the steps before it started from."""
    return []


def looks_back(config: Config) -> bool:
    """Always: what the model did before the techniques in front of this one is what is fitted to."""
    return True


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Fit the layers, in place.

    Raises:
        UsageError: The model is quantized or no pre-norm ViT of timm's, its residual stream has another shape than it had, a layer is
            neither plain nor factored, there are too few images, or nothing has changed the model since it was loaded or last trained.
        InputError: What a layer reads is not finite.
    """
    from vitedge.compress._refit import refit_

    return Compressed(model, {**config.model_dump(), "fitted": refit_(model, context.origin, config, context.sample(config.images)[0])})
