"""ViT-PE: attention and MLP that use each weight matrix twice, as it is and transposed, in half the encoder's parameters.

Koyun and Toreyin 2024, "Do Deep Neural Networks Utilize the Weight Space Efficiently?", section 3.1. Attention has
`Q = W_q x, K = W_kv x, V = W_kv^T x` and `W_q^T` for its output projection, two D x D matrices in the place of four; the MLP is
`W^T f(W x + b_1) + b_2`, 4 D^2 weights in the place of 8 D^2. The products are as many as before, so that the file becomes
smaller and the model no faster. The paper trains it from scratch, and its fair comparison is the untied twin trained the same
way: values by W_kv^T have nothing to do with those of a pretrained model, so a projected start is a start and no more.
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


class Config(Section):
    """What is shared, and what it starts from."""

    start: Literal["scratch", "project"] = Field(
        "scratch",
        description="first values of the shared matrices. scratch: random, as timm starts a ViT's, with biases of 0, whatever the "
        "model had there; project: those nearest to the model's own, in least squares",
    )
    attention: bool = Field(True, description="share in attention: queries with the output projection, keys with values")
    mlp: bool = Field(True, description="share in the MLP: its first layer with its second")
    attention_bias: bool = Field(
        True, description="keep the biases that attention has; the paper's equations 1 and 2 have none, those of the MLP (4) do"
    )

    @model_validator(mode="after")
    def _something_is_shared(self) -> Config:
        if not self.attention and not self.mlp:
            raise ValueError("attention or mlp to be true: with neither nothing is shared")
        if not self.attention and not self.attention_bias:
            raise ValueError("no attention_bias: false beside attention: false, which leaves attention as it is")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: the first values are random, or those of the model at hand."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Replace attention and MLP of every block by ones that share their weights, in place.

    Without `train` steps after it the model is of no use: neither start keeps its answers. With `distill: {teacher: self}`
    before it, the model as it was teaches the one that shares.

    Raises:
        UsageError: The model is no ViT, is quantized, shares already, or has layers that cannot be shared: pruned heads,
            factors, gates. It is then left as it was.
    """
    import torch

    from vitedge.compress._shared_vit import project_, restart_, tie_

    modules = dict(model.named_modules())
    before = sum(parameter.numel() for parameter in model.parameters())
    pairs = tie_(model, config.attention, config.mlp, config.attention_bias)
    # A generator of its own: a resumed run begins with the same values.
    generator = torch.Generator().manual_seed(context.seed)
    layers: dict[str, Any] = {}
    for name, tied in pairs.items():
        old: Any = modules[name]
        layers[name] = {"params": [_count(old), _count(tied)]}
        if config.start == "project":
            layers[name]["relative_distance"] = round(project_(tied, old), 4)
        else:
            restart_(tied, generator)
    after = sum(parameter.numel() for parameter in model.parameters())
    plain = config.model_dump(include={"attention", "mlp", "attention_bias"})
    notes = {**config.model_dump(), "params": [before, after], "layers": layers}
    return Compressed(model, notes, structure=partial(_structure, plain=plain))


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put layers that share their weights into a newly built model.

    Raises:
        UsageError: The architecture has no layers to share.
    """
    from vitedge.compress._shared_vit import tie_

    tie_(model, **structure)
    return model


def _structure(model: nn.Module, plain: dict[str, Any]) -> dict[str, Any]:
    return plain


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
