"""One layer of the fp32 model rounded as a scheme would round it, all others left in float.

A stand-in for the library's own file of one quantized layer, because that takes seconds to build and there are
dozens: ranges are the lowest and highest value seen instead of a percentile, nothing is bias-corrected. It ranks
layers; what is decided is decided on real files.

Uniform quantization is METHODS' `q = clamp(round(x / s) + z)`, `x~ = s (q - z)`. Shapes: K inputs, N outputs, G rows of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vitedge.device import QuantizationRules
from vitedge.graph._index import Index, attribute
from vitedge.guard.layers import weight_matrix


@dataclass(frozen=True)
class Rounding:
    """How a scheme rounds a product.

    Attributes:
        weight_bits: Of a weight, symmetric around zero.
        group: Weights along the inputs that share a scale; None for all of an output.
        per_channel: Whether each output has its own scale.
        activations: Whether they are rounded too, to 8 bits per tensor.
        symmetric: Whether an activation's range reaches as far below zero as above.
        smooth_alpha: SmoothQuant's alpha (Xiao et al. 2023, equation 4); None for none.
    """

    weight_bits: int = 8
    group: int | None = None
    per_channel: bool = True
    activations: bool = True
    symmetric: bool = False
    smooth_alpha: float | None = None


def rounding_of(scheme: str, config: Any, rules: QuantizationRules) -> Rounding:
    """What a scheme does, by its name (`int4_weights`: 4 bits, weights only) and the settings it has.

    Args:
        scheme: `library.scheme`.
        config: Its settings.
        rules: What the device wants where the settings leave it open.
    """
    kind = scheme.partition(".")[2]
    per_channel = getattr(config, "per_channel", None)
    group = getattr(config, "block_size", None) or getattr(config, "group_size", None)
    activation_type = getattr(config, "activation_type", None) or rules.activation_type
    bits = int(kind[3]) if kind.startswith("int") else 8
    return Rounding(
        weight_bits=bits - 1 if rules.reduce_range and bits == 8 else bits,
        group=group if group and group > 0 else None,
        per_channel=rules.per_channel if per_channel is None else per_channel,
        activations=not kind.endswith("_weights"),
        symmetric=getattr(config, "preset", "mixed") == "performance" or activation_type == "int8",
        smooth_alpha=getattr(config, "smooth_quant_alpha", None),
    )


@dataclass(frozen=True)
class Span:
    """How far an activation reaches, per position of its last axis: float64 (K,) each."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Span:
        """Of one batch of values (..., K)."""
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        return cls(flat.min(axis=0), flat.max(axis=0))

    def union(self, other: Span) -> Span:
        """Of both."""
        return Span(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    @property
    def furthest(self) -> np.ndarray:
        """Largest magnitude per position, (K,)."""
        return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)))


def round_weight(matrix_KN: np.ndarray, rounding: Rounding) -> np.ndarray:
    """A weight after quantization and back, float32 (K, N)."""
    highest = 2 ** (rounding.weight_bits - 1) - 1
    group = rounding.group or len(matrix_KN)
    rounded_KN = np.empty(matrix_KN.shape, np.float32)
    for start in range(0, len(matrix_KN), group):
        part_GN = matrix_KN[start : start + group].astype(np.float64)
        scale = np.abs(part_GN).max(axis=0 if rounding.per_channel else None, keepdims=True) / highest
        scale = np.where(scale > 0, scale, 1.0)
        rounded_KN[start : start + group] = scale * np.clip(np.round(part_GN / scale), -highest, highest)
    return rounded_KN


def scale_and_zero(span: Span, symmetric: bool) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of an activation in 8 unsigned bits; zero itself is exact."""
    low, high = min(0.0, float(span.low.min())), max(0.0, float(span.high.max()))
    if symmetric:
        reach = max(-low, high)
        low, high = (-reach if low < 0 else 0.0), reach
    step = (high - low) / 255
    # A constant zero, or a step below float32's smallest normal number, as in `vitedge.numerics.parameters`.
    scale = np.float32(step) if step >= np.finfo(np.float32).tiny else np.float32(1)
    return scale, np.uint8(np.clip(np.round(-low / scale), 0, 255))


def smoothing_factors(span: Span, matrix_KN: np.ndarray, alpha: float) -> np.ndarray:
    """What each input channel is divided by, and its weights multiplied by: float64 (K,), 1 where either is zero."""
    weight_K = np.abs(matrix_KN.astype(np.float64)).max(axis=1)
    usable = (span.furthest > 0) & (weight_K > 0)
    activation_K = np.where(usable, span.furthest, 1.0)
    return np.asarray(np.where(usable, activation_K**alpha / np.where(usable, weight_K, 1.0) ** (1 - alpha), 1.0))


def rounded_product(
    node: onnx.NodeProto, index: Index, spans: dict[str, Span], rounding: Rounding
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A product that reads rounded inputs, and writes the same tensor: the nodes that take its place, and their constants.

    Args:
        node: MatMul, Gemm or Conv; left as it is.
        index: Of its graph.
        spans: Of the activations it reads, by tensor name.
        rounding: How.
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(suffix: str, value: np.ndarray) -> str:
        name = f"{node.name}/guard_{suffix}"
        # np.ascontiguousarray would make a vector of a scalar, and a scale per tensor is a scalar.
        constants.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    product = onnx.NodeProto.FromString(node.SerializeToString())
    matrix_KN, span = weight_matrix(index, node), spans[node.input[0]]
    smooth = matrix_KN is not None and rounding.smooth_alpha is not None and node.op_type != "Conv"
    if matrix_KN is not None:
        factors_K = smoothing_factors(span, matrix_KN, rounding.smooth_alpha or 0.0) if smooth else np.ones(len(matrix_KN))
        rounded_KN = round_weight(matrix_KN * factors_K[:, None], rounding)
        product.input[1] = constant("weight", _as_stored(rounded_KN, node, index))
        if smooth:
            inverse = constant("inverse", (1 / factors_K).astype(np.float32))
            product.input[0] = f"{node.name}/guard_smoothed"
            nodes.append(helper.make_node("Mul", [node.input[0], inverse], [product.input[0]]))
            span = Span(span.low / factors_K, span.high / factors_K)
    for position in range(0 if rounding.activations else 2, 1 if matrix_KN is not None else 2):
        scale, zero = scale_and_zero(span if position == 0 else spans[node.input[1]], rounding.symmetric)
        grid = [constant(f"scale_{position}", np.array(scale)), constant(f"zero_{position}", np.array(zero))]
        names = [f"{node.name}/guard_{step}_{position}" for step in ("quantized", "rounded")]
        nodes.append(helper.make_node("QuantizeLinear", [product.input[position], *grid], names[:1]))
        nodes.append(helper.make_node("DequantizeLinear", [names[0], *grid], names[1:]))
        product.input[position] = names[1]
    return [*nodes, product], constants


def _as_stored(matrix_KN: np.ndarray, node: onnx.NodeProto, index: Index) -> np.ndarray:
    """`weight_matrix` undone."""
    if node.op_type == "Conv":
        weight = index.constant(node.input[1])
        return np.asarray(matrix_KN.T.reshape(weight.shape if weight is not None else ()))
    return matrix_KN.T if attribute(node, "transB", 0) else matrix_KN
