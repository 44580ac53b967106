"""DiffQ's layers: noise in place of rounding, so that the width of each group of weights has a gradient.

Defossez et al. 2021 (arXiv:2104.09987): training adds `Delta(b)/2 U[-1, 1]` to weights, `Delta(b) = (max - min)/(2^b - 1)`.
In eval mode, and in the last steps where asked, the weights are really rounded.
Shapes: O and I a layer's output and input features, G groups of S inputs in a row, B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

import fnmatch
import json
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.compress import Context
from vitedge.compress._diffq import MIB, BitPlan, GroupBits
from vitedge.compress._mixed_weight import MixedWeight, grids, integers
from vitedge.errors import UsageError
from vitedge.models.heads import classifier_names
from vitedge.models.quantized import LearnsToRound, check_roundable, quantized_layer
from vitedge.numerics import dequantize, grouped, ungrouped

if TYPE_CHECKING:
    from vitedge.compress.diffq import Config

# Of the checkpoint's header, beside tensors, layers, classes and preprocessing: the architecture's name and options, and padding.
HEADER_BYTES = 2048


def weight_range(w_OI: torch.Tensor, clip: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of a weight, widened to contain 0; with `clip`, at most so many root mean squares from it."""
    low, high = torch.aminmax(w_OI)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if clip is not None:
        # The floor keeps the root's gradient finite for a weight of zeros.
        bound = clip * w_OI.square().mean().clamp(min=torch.finfo(w_OI.dtype).tiny).sqrt()
        low, high = torch.maximum(low, -bound), torch.minimum(high, bound)
    return low, high


def noisy(w_OI: torch.Tensor, bits_OG: torch.Tensor, unit_OI: torch.Tensor, group: int, clip: float | None) -> torch.Tensor:
    """The weight as training sees it: inside its range, and with noise as large as rounding at those widths would be.

    Args:
        w_OI: The weight.
        bits_OG: Width of each group, as real numbers.
        unit_OI: Noise, uniform in -1..1.
        group: Inputs that share a width.
        clip: As in `weight_range`.
    """
    low, high = weight_range(w_OI, clip)
    half_step_OG = (high - low) / (torch.exp2(bits_OG) - 1) / 2
    noise_OI = ungrouped(grouped(unit_OI, group) * half_step_OG[..., None], w_OI.shape)
    return (w_OI if clip is None else torch.clamp(w_OI, low, high)) + noise_OI


class NoisyLayer(LearnsToRound):
    """What a layer with noise on its weight has in common with another.

    Attributes:
        widths: Of its groups.
        clip: As in `weight_range`.
    """

    weight: torch.Tensor
    widths: GroupBits
    clip: float | None

    def begin(self, layer: Any, widths: GroupBits, clip: float | None) -> None:
        """Take over a layer's weight and bias."""
        self.weight, self.bias, self.widths, self.clip = layer.weight, layer.bias, widths, clip
        self._plan: tuple[BitPlan, ...] = ()  # not a module of the layer's
        self._rounded: tuple[int, tuple[Any, ...]] = (0, ())

    def follow(self, plan: BitPlan) -> None:
        """Take widths from a plan."""
        self._plan = (plan,)

    def trained_weight(self) -> torch.Tensor:
        """What training computes with, in the weight's own shape: with noise, or once widths are settled rounded, straight through."""
        w_OI = self.weight.flatten(1)
        if not self._plan[0].rounding:
            used_OI = noisy(w_OI, self.widths.bits(), torch.rand_like(w_OI) * 2 - 1, self.widths.group, self.clip)
            return used_OI.reshape(self.weight.shape)
        with torch.no_grad():
            low, high = weight_range(w_OI, self.clip)
            settled = self.widths.settled
            scale_OG, zero_OG = grids(low, high, settled)
            values_OI = integers(w_OI, scale_OG, zero_OG, settled, self.widths.group)
            values_OGS = grouped(values_OI, self.widths.group)
            rounded_OI = ungrouped(dequantize(values_OGS, scale_OG[..., None], zero_OG[..., None]), w_OI.shape)
        inside_OI = torch.clamp(w_OI, low, high)
        return (inside_OI + (rounded_OI - inside_OI).detach()).reshape(self.weight.shape)

    def rounded(self) -> Any:
        """The layer as it is saved, made once for all images that are judged with it."""
        made = self._plan[0].current()
        if self._rounded[0] != made:
            # What is made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._rounded = (made, (self.convert(),))
        return self._rounded[1][0]

    def convert(self) -> Any:
        """The layer with integers, at the widths that are planned."""
        w_OI = self.weight.detach().flatten(1).float()
        low, high = weight_range(w_OI, self.clip)
        weight = MixedWeight.of(w_OI, low, high, self.widths.planned, self.widths.group)
        layer: Any = quantized_layer(self, weight.describe(), None, MixedWeight)
        getattr(layer, "linear", layer).weight = weight
        return layer.train(False)


class NoisyLinear(NoisyLayer, nn.Linear):  # type: ignore[misc]  # the library carries no types
    """A linear layer; its own weight and bias, under the same names."""

    def __init__(self, layer: nn.Linear, widths: GroupBits, clip: float | None) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.begin(layer, widths, clip)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O)."""
        result: torch.Tensor = F.linear(x, self.trained_weight(), self.bias) if self.training else self.rounded()(x)
        return result


class NoisyPatchEmbedding(NoisyLayer, nn.Conv2d):  # type: ignore[misc]  # the library carries no types
    """A patch embedding's convolution; its own weight and bias, under the same names."""

    def __init__(self, layer: nn.Conv2d, widths: GroupBits, clip: float | None) -> None:
        sizes: Any = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride)
        nn.Conv2d.__init__(self, *sizes, bias=layer.bias is not None, device="meta")
        self.begin(layer, widths, clip)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """BCHW to BOhw."""
        if not self.training:
            result: torch.Tensor = self.rounded()(x_BCHW)
            return result
        return F.conv2d(x_BCHW, self.trained_weight(), self.bias, self.stride)


def prepare(model: nn.Module, config: Config, context: Context) -> BitPlan:
    """Give a model's layers noise on their weights, in place, and learned widths; the plan becomes its module `diffq`.

    Raises:
        UsageError: No layer is left to quantize, the target is below what the least widths take, or the model is quantized, has gates or
            shares weights.
    """
    check_roundable(model, "diffq")
    chosen = _chosen(model, config)
    ends = {*classifier_names(model), *(name for name, layer in chosen.items() if isinstance(layer, nn.Conv2d))}
    widths: list[GroupBits] = []
    other = _other_bytes(model, chosen, context)
    for name, layer in chosen.items():
        fixed = config.first_last_bits if name in ends else None
        settings = (layer.weight, config.group_size, (config.min_bits, config.max_bits))
        bits = GroupBits(*settings, config.start_bits if fixed is None else fixed, fixed is None, config.bits_lr_scale)
        parent, _, leaf = name.rpartition(".")
        kind = NoisyPatchEmbedding if isinstance(layer, nn.Conv2d) else NoisyLinear
        setattr(model.get_submodule(parent), leaf, kind(layer, bits, config.clip).train(layer.training))
        widths.append(bits)
    target = None if config.target_mib is None else math.floor(config.target_mib * MIB)
    plan = BitPlan(widths, other, target, config.penalty, config.round_share)
    if target is not None and plan.least_bytes() > target:
        raise UsageError(
            "diffq.target_mib",
            expected=f"at least {plan.least_bytes() / MIB:.3f} MiB, which the least widths take",
            found=f"{config.target_mib}",
            fix="raise it, or lower min_bits, exclude fewer layers, or take larger groups",
        )
    model.diffq = plan
    for module in model.modules():
        if isinstance(module, NoisyLayer):
            module.follow(plan)
    return plan


def convert(model: Any, notes: dict[str, Any]) -> nn.Module:
    """Round the weights at integer widths for good, in place; `notes` are told sizes and widths."""
    plan: BitPlan = model.diffq
    plan.allot()
    notes |= plan.report()
    for name, module in list(model.named_modules()):
        if isinstance(module, NoisyLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.convert())
    del model.diffq
    converted: nn.Module = model
    return converted


def _chosen(model: nn.Module, config: Config) -> dict[str, Any]:
    """Layers to quantize by name, in order.

    Raises:
        UsageError: There are none, or a pattern of `exclude` fits no layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.stride == module.kernel_size and module.padding == (0, 0) and module.groups == 1)
    }
    for pattern in config.exclude:
        if not fnmatch.filter(layers, pattern):
            raise UsageError("diffq.exclude", expected="patterns that fit a layer", found=f"'{pattern}'", fix="see `vitedge inspect MODEL`")
    chosen = {
        name: layer
        for name, layer in layers.items()
        if layer.weight.numel() >= config.min_elements and not any(fnmatch.fnmatch(name, pattern) for pattern in config.exclude)
    }
    if not chosen:
        raise UsageError(
            "diffq",
            expected=f"a layer of {config.min_elements} weights or more that is not excluded",
            found="none",
            fix="lower diffq.min_elements, or exclude less",
        )
    return chosen


def _other_bytes(model: nn.Module, chosen: dict[str, Any], context: Context) -> int:
    """Bytes of the checkpoint that are no quantized weights, at most: float tensors, and the header with everything it says."""
    packed = {f"{name}.weight" for name in chosen}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    layers = {name: {"inputs": None, "weight": {"group": 10**4, "packed_bytes": 10**9, "widest": 16}} for name in chosen}
    kept = {"labels": context.labels, "preprocessing": context.contract.to_json(), "structure": [["diffq", {"modules": layers}]]}
    place = {"dtype": "BF16", "data_offsets": [10**9, 10**9]}
    # A patch embedding keeps its weight one module further down.
    named = {f"{name}.linear": {**place, "shape": list(tensor.shape)} for name, tensor in tensors.items()}
    named |= {f"{name}.linear.packed": {**place, "shape": [10**9]} for name in packed}
    header = json.dumps({"__metadata__": {"vitedge": json.dumps(kept)}, **named})
    stored: int = sum(t.numel() * t.element_size() for t in tensors.values())
    return stored + len(header.encode()) + HEADER_BYTES
