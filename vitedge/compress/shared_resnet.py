"""ResNet-PE: one matrix for all 1x1 convolutions of a stage, used as it is on the way in and transposed on the way out.

Koyun and Toreyin 2024, "Do Deep Neural Networks Utilize the Weight Space Efficiently?", section 3.2, equations 6 to 9: a
bottleneck is `W^T G(W x) + x`, where G has the block's own norms, activations and 3x3 convolution, and W is that of the stage.
`stages: [1, 2, 3, 4]` is the paper's PE1 and `stages: [3, 4]` its PE2. A stage begins with other channels than it goes on with:

- `transitions: projection` keeps the first block's own convolution on the way in, and its projection of the shortcut. Every product
  of the untouched model is done: a ResNet50 of 1,000 classes has 18.28 (PE1) or 18.74 (PE2) million parameters, of 25.56.
- `transitions: parameter_free` has neither: the shortcut is averaged over the stride and filled up with channels of zeros (He et
  al. 2016, option A), and the way in takes those columns of W that meet channels that are there: 14.81 or 15.46 million. Without
  its classifier that is 12.76 or 13.41: the paper's 12.8 and 13.4.
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
    """Which stages share, how they begin, and what W starts from."""

    stages: tuple[Literal[1, 2, 3, 4], ...] = Field(
        (1, 2, 3, 4), min_length=1, description="stages that share one matrix each: [1, 2, 3, 4] is PE1, [3, 4] PE2"
    )
    transitions: Literal["projection", "parameter_free"] = Field(
        "projection",
        description="first block of a shared stage. projection: its own convolutions, on the way in and in the shortcut; "
        "parameter_free: W's columns on the way in, averaging and channels of zeros in the shortcut",
    )
    start: Literal["scratch", "project"] = Field(
        "scratch",
        description="first values of W. scratch: random, as timm starts a convolution; project: the mean of the matrices that it "
        "stands for, which is nearest to them in least squares",
    )

    @model_validator(mode="after")
    def _each_stage_once(self) -> Config:
        if len(set(self.stages)) != len(self.stages):
            raise ValueError("each of stages once")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: the first values are random, or those of the model at hand."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Replace the shared stages of a ResNet, in place; the blocks' norms, activations and 3x3 convolutions stay.

    Without `train` steps after it the model is of no use: neither start keeps its answers.

    Raises:
        UsageError: The model is no ResNet of bottlenecks, is quantized, shares already, or has a stage whose 1x1 convolutions
            do not fit one matrix. It is then left as it was.
    """
    import torch

    from vitedge.compress._shared_resnet import share_, start_

    before = sum(parameter.numel() for parameter in model.parameters())
    old: dict[str, Any] = dict(model.named_children())
    stages = share_(model, config.stages, config.transitions)
    # A generator of its own: a resumed run begins with the same values.
    generator = torch.Generator().manual_seed(context.seed)
    found: dict[str, Any] = {}
    for name, stage in stages.items():
        found[name] = {
            "params": [sum(p.numel() for p in module.parameters()) for module in (old[name], stage)],
            "blocks": len(stage),
            "shared": list(stage.shared_weight.shape[:2]),
        }
        distance = start_(stage, old[name], generator if config.start == "scratch" else None)
        if distance is not None:
            found[name]["relative_distance"] = round(distance, 4)
    after = sum(parameter.numel() for parameter in model.parameters())
    plain = {"stages": list(config.stages), "transitions": config.transitions}
    notes = {**plain, "start": config.start, "params": [before, after], "layers": found}
    return Compressed(model, notes, structure=partial(_structure, plain=plain))


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put stages that share their weights into a newly built model.

    Raises:
        UsageError: The architecture has no stages to share.
    """
    from vitedge.compress._shared_resnet import share_

    share_(model, structure["stages"], structure["transitions"])
    return model


def _structure(model: nn.Module, plain: dict[str, Any]) -> dict[str, Any]:
    return plain
