"""Modules of a quantized model after training or calibration: integers, scales, and where activations are rounded.

They are what techniques convert to: a checkpoint holds the weights bit-packed, PyTorch computes with what the integers
stand for, and the exporter writes them as QuantizeLinear and DequantizeLinear (`vitedge.export`), so that the
runtime has the same numbers. `describe` and `rebuild` are the shape manifest of a checkpoint.
Shapes: B batch, N tokens, I and O a layer's input and output features, G groups of weights, C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from vitedge import packing
from vitedge.errors import UsageError
from vitedge.models.attention import open_attention
from vitedge.models.gated import gated_layers
from vitedge.models.tied import TiedAttention, TiedMlp
from vitedge.numerics import Grid, dequantize, fake_quantize, spread

STORAGE = {(8, True): torch.int8, (8, False): torch.uint8, (16, True): torch.int16, (16, False): torch.uint16}


def storage(bits: int, signed: bool) -> torch.dtype:
    """The type that holds integers of so many bits in PyTorch, and that runtimes compute with."""
    return STORAGE[8 if bits <= 8 else 16, signed]


@torch.library.custom_op("vitedge::quantize_dequantize", mutates_args=())  # type: ignore[untyped-decorator]
def quantize_dequantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, bits: int, signed: bool) -> torch.Tensor:
    """What a value is after QuantizeLinear and DequantizeLinear.

    Args:
        x: Any shape.
        scale: float32; a scalar, or one per position of `axis`.
        zero_point: The shape of scale; of the type that `storage` names.
        axis: Of x; ignored where there is one scale.
        bits, signed: The integers it becomes.
    """
    zero_point = zero_point.to(torch.int32)
    if scale.ndim:
        scale, zero_point = spread(scale, x.ndim, axis), spread(zero_point, x.ndim, axis)
    return fake_quantize(x, scale, zero_point, Grid(bits, signed)).to(x.dtype)


@quantize_dequantize.register_fake  # type: ignore[untyped-decorator]
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, bits: int, signed: bool) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vitedge::dequantize_weight", mutates_args=())  # type: ignore[untyped-decorator]
def dequantize_weight(values_IO: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group: int) -> torch.Tensor:
    """What integers of a weight stand for, float32 (I, O).

    Args:
        values_IO: Integers; those without a sign have a zero point.
        scale: float32; per output feature (O,), or per group of input features too, (G, O).
        zero_point: As values, the shape of the scales.
        group: Input features that share a scale.
    """
    zero_point = zero_point.to(torch.int32)
    if scale.ndim == 2:
        scale, zero_point = (t.repeat_interleave(group, 0)[: len(values_IO)] for t in (scale, zero_point))
    return dequantize(values_IO.to(torch.int32), scale, zero_point)


@dequantize_weight.register_fake  # type: ignore[untyped-decorator]
def _(values_IO: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group: int) -> torch.Tensor:
    return torch.empty_like(values_IO, dtype=torch.float32)


class ActivationQuantizer(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Rounds activations to a grid whose step was learned or calibrated.

    Args:
        bits: Of the integers.
        signed: Whether they have a sign.
        channels: Scales along the last axis; None for one of the whole tensor.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, bits: int, signed: bool, channels: int | None = None) -> None:
        super().__init__()
        self.bits, self.signed, self.channels = bits, signed, channels
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=storage(bits, signed)))

    def set(self, scale: torch.Tensor, zero_point: torch.Tensor) -> ActivationQuantizer:
        """Take over scales and zero points."""
        self.scale.copy_(scale.detach().reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.detach().reshape(self.scale.shape))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape, rounded."""
        rounded: torch.Tensor = torch.ops.vitedge.quantize_dequantize(x, self.scale, self.zero_point, x.ndim - 1, self.bits, self.signed)
        return rounded

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"bits": self.bits, "signed": self.signed, "channels": self.channels}


class IntegerWeight(nn.Module):  # type: ignore[misc]  # the library carries no types
    """A weight matrix kept as integers with a scale per output feature, or per group of its input features.

    In a state dict the integers are bit-packed (`packed`, uint8), with `scale` and, for unsigned integers, `zero_point`.

    Args:
        in_features, out_features: I and O.
        bits: Of the integers, 2..16.
        signed: Symmetric without a zero point; else unsigned with one.
        group: Input features that share a scale; None for all of them.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, signed: bool = True, group: int | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.signed, self.group = in_features, out_features, bits, signed, group
        shape = (out_features,) if group is None else (math.ceil(in_features / group), out_features)
        self.register_buffer("values", torch.zeros(in_features, out_features, dtype=storage(bits, signed)), persistent=False)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=storage(bits, signed)), persistent=not signed)

    def set(self, values_IO: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> IntegerWeight:
        """Take over integers and scales, (O,) or (G, O)."""
        self.values.copy_(values_IO)
        self.scale.copy_(scale.detach().reshape(self.scale.shape))
        if zero_point is not None:
            self.zero_point.copy_(zero_point.reshape(self.scale.shape))
        return self

    def forward(self) -> torch.Tensor:
        """The weight, float32 (I, O)."""
        weight_IO: torch.Tensor = torch.ops.vitedge.dequantize_weight(
            self.values, self.scale, self.zero_point, self.group or self.in_features
        )
        return weight_IO

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor but the sizes, which are the layer's."""
        return {"bits": self.bits, "signed": self.signed, "group": self.group}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        values = self.values.cpu().to(torch.int32).numpy().ravel()
        destination[f"{prefix}packed"] = torch.from_numpy(packing.pack(values, self.bits, self.signed))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        packed = state_dict.pop(f"{prefix}packed", None)
        if packed is None:
            args[2].append(f"{prefix}packed")  # torch's list of missing keys
        else:
            values = packing.unpack(np.asarray(packed.cpu()), self.bits, self.values.numel(), self.signed)
            self.values.copy_(torch.from_numpy(values).reshape(self.values.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(nn.Module):  # type: ignore[misc]  # the library carries no types
    """A linear layer with an integer weight, and activations rounded on their way in.

    Args:
        weight: I to O; called without arguments it gives the float weight (I, O).
        bias: (O,) or None.
        inputs: Rounds what comes in; None where only the weight is quantized.
    """

    def __init__(self, weight: nn.Module, bias: torch.Tensor | None, inputs: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.inputs = inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O)."""
        rounded = x if self.inputs is None else self.inputs(x)
        y = self.sums(rounded) if self._is_integer(x) else rounded @ self.weight().to(x.dtype)
        return y if self.bias is None else y + self.bias

    def sums(self, rounded: torch.Tensor) -> torch.Tensor:
        """Products of integers, summed as integers and scaled once, as the runtimes' kernels do: (..., I) to (..., O).

        Sums of scaled products would differ from those in their last bits, and in the next rounding now and then by a step.
        float32 holds the integers exactly up to 2^24: more than 500 products of the largest
        8-bit values; a wider layer would need most of its inputs and weights at their ends to lose the last bit.
        """
        inputs, weight = cast(ActivationQuantizer, self.inputs), cast(IntegerWeight, self.weight)
        values_IO = weight.values.to(rounded.dtype) - weight.zero_point.to(rounded.dtype)
        return torch.round(rounded / inputs.scale) @ values_IO * (inputs.scale * weight.scale)

    def _is_integer(self, x: torch.Tensor) -> bool:
        """Whether there is one scale for what comes in and one a feature for what goes out; an exported graph says it its own way."""
        one_scale = isinstance(self.inputs, ActivationQuantizer) and self.inputs.channels is None
        per_feature = isinstance(self.weight, IntegerWeight) and self.weight.group is None
        is_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        return one_scale and per_feature and is_float32 and not torch.compiler.is_exporting()


class QuantizedPatchEmbedding(nn.Module):  # type: ignore[misc]  # the library carries no types
    """A patch embedding's convolution, which is a linear layer on cut-out patches.

    Args:
        linear: C x patch height x patch width to O.
        patch: Height and width, which are also the stride.
    """

    def __init__(self, linear: QuantizedLinear, patch: tuple[int, int]) -> None:
        super().__init__()
        self.linear, self.patch = linear, patch

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """BCHW to BOhw."""
        batch, channels, height, width = x_BCHW.shape
        (down, right), rows, columns = self.patch, height // self.patch[0], width // self.patch[1]
        cut = x_BCHW.reshape(batch, channels, rows, down, columns, right).permute(0, 2, 4, 1, 3, 5)
        tokens_BNO = self.linear(cut.reshape(batch, rows * columns, channels * down * right))
        return tokens_BNO.transpose(1, 2).reshape(batch, -1, rows, columns)


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The quantized modules of a model by name, as plain data for `rebuild`."""
    found: dict[str, dict[str, Any]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        linear = module.linear if isinstance(module, QuantizedPatchEmbedding) else module
        if isinstance(linear, QuantizedLinear) and linear not in inside:
            weight: Any = linear.weight
            found[name] = {"weight": weight.describe(), "inputs": linear.inputs.describe() if linear.inputs is not None else None}
            inside |= set(module.modules())
        elif isinstance(module, ActivationQuantizer) and module not in inside:
            found[name] = {"activation": module.describe()}
    return found


def rebuild(model: nn.Module, modules: dict[str, dict[str, Any]], weight_type: type[nn.Module] = IntegerWeight) -> nn.Module:
    """Put quantized modules, values still to be loaded, where `describe` found them.

    Args:
        model: The architecture as timm builds it.
        modules: What `describe` gave.
        weight_type: What keeps the weights; takes I, O and what its own `describe` gave.

    Raises:
        UsageError: The architecture has no such layer.
    """
    if any(".on_" in name for name in modules):
        open_attention(model)
    for name, made in modules.items():
        parent, _, leaf = name.rpartition(".")
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise UsageError("checkpoint", expected=f"a layer {name}", found="none", fix="train it again") from error
        if "activation" in made:
            setattr(model.get_submodule(parent), leaf, ActivationQuantizer(**made["activation"]))
        else:
            inputs = ActivationQuantizer(**made["inputs"]) if made["inputs"] else None
            setattr(model.get_submodule(parent), leaf, quantized_layer(layer, made["weight"], inputs, weight_type))
    return model


def quantized_layer(
    layer: Any, weight: dict[str, Any], inputs: nn.Module | None, weight_type: type[nn.Module] = IntegerWeight
) -> QuantizedLinear | QuantizedPatchEmbedding:
    """The quantized twin of a linear layer or a patch embedding, with its bias; integers and scales are still to be set.

    Args:
        layer: nn.Linear, or nn.Conv2d whose stride is its kernel.
        weight: What `weight_type` takes beside I and O.
        inputs: Rounds what comes in, or None.
        weight_type: What keeps the weight.

    Raises:
        UsageError: A convolution that is no patch embedding, or another kind of layer.
    """
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(weight_type(layer.in_features, layer.out_features, **weight), layer.bias, inputs)
    if isinstance(layer, nn.Conv2d) and layer.stride == layer.kernel_size and layer.padding == (0, 0) and layer.groups == 1:
        features = layer.in_channels * math.prod(layer.kernel_size)
        linear = QuantizedLinear(weight_type(features, layer.out_channels, **weight), layer.bias, inputs)
        return QuantizedPatchEmbedding(linear, (layer.kernel_size[0], layer.kernel_size[1]))
    raise UsageError("quantized layer", expected="a linear layer or a patch embedding", found=type(layer).__name__, fix="exclude it")


class LearnsToRound:
    """Mark of a layer that a quantizing technique gives a model while it trains, and that its `convert` takes away again."""


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has integers in it, so that its exported file is int8 or less and not fp32."""
    return any(isinstance(module, (ActivationQuantizer, IntegerWeight)) for module in model.modules())


def rounds(model: nn.Module) -> bool:
    """Whether a model is quantized, or learns to be in the `train` steps to come: nothing else may change its layers then."""
    return is_quantized(model) or any(isinstance(module, LearnsToRound) for module in model.modules())


def check_roundable(model: nn.Module, technique: str) -> None:
    """Refuse a model with weights that cannot each be rounded where they are: rounded already, behind gates, or used twice.

    A layer that takes the place of a gated one would drop its gates. A matrix that is used as it is and transposed has outputs along
    both of its axes, each of which asks for scales of its own.

    Args:
        model: Any.
        technique: Whom an error speaks of.

    Raises:
        UsageError: There are such weights.
    """
    if rounds(model):
        raise UsageError(
            technique,
            expected="a model in float",
            found="a quantized one",
            fix="name one quantizing technique in `steps:`, and name it once",
        )
    gated = next(iter(gated_layers(model)), None)
    if gated is not None:
        raise UsageError(
            f"{technique}: {gated}",
            expected="a layer without gates",
            found="those of a `gates` step",
            fix=f"put `prune: {{score: gates}}` before `{technique}`",
        )
    tied = next((name for name, module in model.named_modules() if isinstance(module, (TiedAttention, TiedMlp))), None)
    if tied is not None:
        raise UsageError(
            f"{technique}: {tied}",
            expected="weights that are used once",
            found="a matrix used as it is and transposed, which cannot have the scales of both",
            fix=f"leave out `{technique}` or the step that shares weights; schemes of `quantize:` take the exported file",
        )
