"""Stages of a ResNet whose bottlenecks share one matrix, their making, and the first values of what they share.

Shapes: B batch, C channels of a stage, I channels that come into it, P those between a block's 1x1 convolutions, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.errors import UsageError
from vitedge.models.quantized import rounds


class SharedBottleneck(nn.Module):  # type: ignore[misc]  # the library carries no types
    """timm's bottleneck without the weights of its 1x1 convolutions, which the stage passes to it.

    Args:
        block: timm's; everything else is taken over, under the same names.
        channels: C.
        transition: Whether this is the first block of a stage, where channels or size change, and is to do so without parameters;
            if not, it keeps whatever convolutions of its own it needs for that.
    """

    def __init__(self, block: Any, channels: int, transition: bool) -> None:
        super().__init__()
        self.added = channels - block.conv1.in_channels
        self.stride: int = block.stride
        # One of its own only where W does not fit what comes in.
        self.conv1 = block.conv1 if self.added and not transition else None
        self.bn1, self.act1 = block.bn1, block.act1
        self.conv2, self.bn2, self.drop_block, self.act2, self.aa = block.conv2, block.bn2, block.drop_block, block.act2, block.aa
        self.bn3, self.se, self.act3 = block.bn3, block.se, block.act3
        self.downsample = None if transition else block.downsample
        self.drop_path = block.drop_path
        self.transition = transition

    def forward(self, x_BIHW: torch.Tensor, in_PC11: torch.Tensor, out_CP11: torch.Tensor) -> torch.Tensor:
        """The block's output, BCHW, its height and width divided by the stride.

        Args:
            x_BIHW: Its input.
            in_PC11: The stage's matrix, as a kernel.
            out_CP11: The same, transposed.
        """
        if self.conv1 is None:
            # What comes in has the first channels only; zeros in the place of the others would meet the columns left out.
            kernel_PI11 = in_PC11[:, : x_BIHW.shape[1]] if self.added else in_PC11
            inner = F.conv2d(x_BIHW, kernel_PI11)
        else:
            inner = self.conv1(x_BIHW)
        inner = self.act1(self.bn1(inner))
        inner = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(inner)))))
        out_BCHW = self.bn3(F.conv2d(inner, out_CP11))
        if self.se is not None:
            out_BCHW = self.se(out_BCHW)
        if self.drop_path is not None:
            out_BCHW = self.drop_path(out_BCHW)
        return self.act3(out_BCHW + self._shortcut(x_BIHW))

    def _shortcut(self, x_BIHW: torch.Tensor) -> torch.Tensor:
        if self.downsample is not None:
            return self.downsample(x_BIHW)
        if self.transition and self.stride > 1:
            # Sizes that the stride does not divide are rounded up, as the 3x3 convolution does.
            x_BIHW = F.avg_pool2d(x_BIHW, self.stride, self.stride, ceil_mode=True, count_include_pad=False)
        return F.pad(x_BIHW, (0, 0, 0, 0, 0, self.added)) if self.transition and self.added else x_BIHW


class SharedStage(nn.Sequential):  # type: ignore[misc]  # the library carries no types
    """A stage of `W^T G_i(W x) + x`, equations 7 to 9; it owns W and passes it, with its transpose, to its blocks.

    W is zero until it is set or loaded.

    Args:
        blocks: timm's bottlenecks.
        transitions: `projection` or `parameter_free`.

    Attributes:
        shared_weight: W as a 1x1 kernel, (P, C, 1, 1).
    """

    def __init__(self, blocks: Sequence[Any], transitions: str) -> None:
        last = blocks[0].conv3
        first = _changes(blocks[0]) and transitions == "parameter_free"
        super().__init__(*(SharedBottleneck(block, last.out_channels, first and i == 0) for i, block in enumerate(blocks)))
        self.shared_weight = nn.Parameter(torch.zeros_like(last.weight.transpose(0, 1)).contiguous())

    def forward(self, x_BIHW: torch.Tensor) -> torch.Tensor:
        """The stage's output, BCHW."""
        transposed_CP11 = self.shared_weight.transpose(0, 1)
        for block in self:
            x_BIHW = block(x_BIHW, self.shared_weight, transposed_CP11)
        return x_BIHW


def _changes(block: Any) -> bool:
    """Whether a block's output has other channels, or another size, than its input."""
    return bool(block.conv1.in_channels != block.conv3.out_channels or block.stride > 1)


def share_(model: nn.Module, stages: Sequence[int], transitions: str) -> dict[str, SharedStage]:
    """Replace stages in place; returns the new ones by name, in order, their matrices zero.

    Args:
        model: A timm ResNet of bottlenecks.
        stages: Their numbers, from 1.
        transitions: `projection` or `parameter_free`.

    Raises:
        UsageError: A stage cannot be shared; then nothing was replaced.
    """
    from timm.models.resnet import ResNet

    if rounds(model):
        raise UsageError(
            "shared_resnet", expected="a float model", found="a quantized one", fix="put `shared_resnet` before the step that quantizes"
        )
    if not isinstance(model, ResNet):
        raise UsageError(
            "shared_resnet",
            expected="a timm ResNet of bottlenecks, such as resnet50",
            found=type(model).__name__,
            fix="choose one as model.arch, or use `shared_vit` for a ViT",
        )
    names = [f"layer{number}" for number in sorted(stages)]
    for name in names:
        stage = getattr(model, name, None)
        if stage is None or isinstance(stage, SharedStage):
            raise UsageError(
                f"shared_resnet: {name}",
                expected="a stage with weights of its own for each block",
                found="no such stage" if stage is None else "one that shares already",
                fix="name each stage once, in one `shared_resnet` of `steps:`",
            )
        for index, block in enumerate(stage):
            _check(f"{name}.{index}", block, stage[0], index == 0, transitions)
    made = {}
    for name in names:
        stage = getattr(model, name)
        made[name] = SharedStage(list(stage), transitions).train(stage.training)
        setattr(model, name, made[name])
    return made


def _check(name: str, block: Any, first: Any, is_first: bool, transitions: str) -> None:
    """Refuse a block that is no plain bottleneck, or that one matrix does not fit."""
    from timm.models.resnet import Bottleneck

    if type(block) is not Bottleneck:
        raise _refusal(name, "a bottleneck, with two 1x1 convolutions", type(block).__name__)
    for part, layer in (("conv1", block.conv1), ("conv3", block.conv3)):
        plain = type(layer) is nn.Conv2d and layer.bias is None
        if not plain or (layer.kernel_size, layer.stride, layer.groups) != ((1, 1), (1, 1), 1):
            raise _refusal(f"{name}.{part}", "a plain 1x1 convolution in float, without bias", str(layer))
    shape_CP, in_PI = tuple(first.conv3.weight.shape[:2]), tuple(block.conv1.weight.shape[:2])
    if tuple(block.conv3.weight.shape[:2]) != shape_CP or in_PI[0] != shape_CP[1] or (not is_first and in_PI[1] != shape_CP[0]):
        found = f"{tuple(block.conv1.weight.shape[:2])} and {tuple(block.conv3.weight.shape[:2])}"
        raise _refusal(name, f"1x1 convolutions of {shape_CP[::-1]} and {shape_CP}, as where the stage began", found)
    if is_first and transitions == "parameter_free" and in_PI[1] > shape_CP[0]:
        raise _refusal(name, f"no more than the stage's {shape_CP[0]} channels coming in", str(in_PI[1]))


def _refusal(where: str, expected: str, found: str) -> UsageError:
    return UsageError(
        f"shared_resnet: {where}",
        expected=expected,
        found=found,
        fix="choose a ResNet of bottlenecks as model.arch, such as resnet50, or leave the stage out of shared_resnet.stages",
    )


def start_(stage: SharedStage, old: Sequence[Any], generator: torch.Generator | None) -> float | None:
    """Give W its first values, in place.

    With a generator those of He et al. 2015 for a convolution, as in timm: normal, of variance 2 / P. Without one, the matrix that
    makes `sum_i |W - A_i|^2 + |W^T - B_i|^2` least over the blocks' convolutions A_i on the way in and B_i on the way out: every
    column of W is the mean of those that it stands for, `A_i` and `B_i^T`. The first block's A has no part in it where it stays its
    own, and only as many columns as channels come in where W's take its place.

    Args:
        stage: The stage that shares.
        old: The blocks that it took the place of.
        generator: For random values; None for the nearest.

    Returns:
        With None for a generator, the distance that is left over the norm of the blocks' convolutions; else None.
    """
    weight = stage.shared_weight
    with torch.no_grad():
        if generator is not None:
            weight.copy_(nn.init.kaiming_normal_(torch.empty(weight.shape), mode="fan_out", nonlinearity="relu", generator=generator))
            return None
        parts = [block.conv3.weight.double().transpose(0, 1) for block in old]
        parts += [block.conv1.weight.double() for block, new in zip(old, stage, strict=True) if new.conv1 is None]
        total_PC11, uses_C = torch.zeros_like(weight, dtype=torch.float64), torch.zeros(weight.shape[1], dtype=torch.float64)
        for part in parts:
            total_PC11[:, : part.shape[1]] += part
            uses_C[: part.shape[1]] += 1
        mean_PC11 = total_PC11 / uses_C.to(weight.device)[:, None, None]
        weight.copy_(mean_PC11)
        error = sum(float((mean_PC11[:, : part.shape[1]] - part).square().sum()) for part in parts)
        size = sum(float(part.square().sum()) for part in parts)
    return float((error / size) ** 0.5) if size else 0.0
