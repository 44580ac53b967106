"""Weight-only files for ONNX Runtime: matrices in 8 or 4 bits, every activation and every sum in float.

Each product with a constant matrix becomes ONNX Runtime's `MatMulNBits`, which keeps the matrix packed and
unpacks it as it multiplies; a Gemm becomes one with an Add behind it. Rounding is that of the library's own
`MatMulNBitsQuantizer` (round to nearest in blocks along the input channels), written out here because that class
needs onnx_ir, which ONNX Runtime does not install. What the operator has no form for stays in float and is listed.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits

Shapes: K input channels, N output channels, G blocks of one output channel, S weights of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper
from pydantic import Field

from vitedge.graph._index import attribute, drop_unused_initializers, replace_nodes
from vitedge.packing import pack
from vitedge.recipe import Scheme

_DOMAIN = "com.microsoft"
# `accuracy_level` of the operator: the least exact type activations may be multiplied in. 4 is int8; absent, they stay as they come.
_INT8_ARITHMETIC = 4
_LISTED = 8


class Int8Weights(Scheme):
    """Matrices in int8 with a scale per block; all arithmetic in float."""

    op_types: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")
    bits: ClassVar[int] = 8

    block_size: Literal[16, 32, 64, 128] = Field(
        64, description="weights of an output channel that share a scale; input channels that it does not divide are padded"
    )
    symmetric: bool = Field(True, description="false: a zero point per block as well, for weights that lie to one side of zero")
    arithmetic: Literal["float", "int8"] = Field(
        "float", description="int8: ONNX Runtime may round activations to 8 bits per block as it multiplies (accuracy_level 4)"
    )
    exclude: tuple[str, ...] = Field((), description="patterns of node names that stay in float")


class Int4Weights(Int8Weights):
    """Matrices in int4 with a scale per block; all arithmetic in float."""

    bits: ClassVar[int] = 4

    block_size: Literal[16, 32, 64, 128] = Field(
        32, description="weights of an output channel that share a scale; input channels that it does not divide are padded"
    )
    symmetric: bool = Field(False, description="false: a zero point per block as well, for weights that lie to one side of zero")


@dataclass(frozen=True)
class Blocks:
    """One matrix in blocks, as `MatMulNBits` takes it.

    Attributes:
        packed_NGS: Codes from 0 to 2^bits - 1, uint8 (N, G, S * bits / 8), the first code in the lowest bits.
        scales_NG: float32; a weight is its scale times (code - zero point).
        zero_points: uint8 (N, ceil(G * bits / 8)); None where every zero point is 2^(bits - 1).
    """

    packed_NGS: np.ndarray
    scales_NG: np.ndarray
    zero_points: np.ndarray | None


def round_to_blocks(weight_KN: np.ndarray, bits: int, block_size: int, symmetric: bool) -> Blocks:
    """Round a float32 matrix to the nearest of 2^bits values in each block of input channels.

    Symmetric: the weight farthest from zero is the lowest code exactly, so that all codes are used whichever its sign.
    Not symmetric: the codes span from the lowest weight to the highest, widened to hold zero. Zero is exact in both.
    A last block of fewer channels is filled up with zeros.
    """
    inputs, outputs = weight_KN.shape
    blocks, half, top = -(-inputs // block_size), 2 ** (bits - 1), 2**bits - 1
    padded = np.zeros((outputs, blocks * block_size), np.float32)
    padded[:, :inputs] = weight_KN.T
    w_NGS = padded.reshape(outputs, blocks, block_size)
    low, high = np.minimum(w_NGS.min(-1), 0), np.maximum(w_NGS.max(-1), 0)
    if symmetric:
        scales = (np.where(high > -low, high, low) / -half).astype(np.float32)
        zeros = np.full(scales.shape, half, np.uint8)
    else:
        scales = ((high - low) / top).astype(np.float32)
        zeros = np.clip(np.rint(-low / np.where(scales == 0, 1, scales)), 0, top).astype(np.uint8)
    # A block of zeros has scale 0 and may have any code.
    steps = w_NGS / np.where(scales == 0, 1, scales)[..., None]
    codes = np.clip(np.rint(steps) + zeros[..., None], 0, top).astype(np.uint8)
    packed = pack(codes, bits, signed=False).reshape(outputs, blocks, block_size * bits // 8)
    if symmetric:
        return Blocks(packed, scales, None)
    per_byte = 8 // bits
    rows = np.zeros((outputs, -(-blocks // per_byte) * per_byte), np.uint8)
    rows[:, :blocks] = zeros
    return Blocks(packed, scales, pack(rows, bits, signed=False).reshape(outputs, -1))


def takes(node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto]) -> bool:
    """Whether a product is one that `MatMulNBits` can be: with a constant float32 matrix, a Gemm neither scaled nor fed a transpose."""
    tensor = initializers.get(node.input[1])
    if tensor is None or len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT:
        return False
    plain = attribute(node, "transA", 0) == 0 and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    return bool(node.op_type == "MatMul" or (node.op_type == "Gemm" and plain))


def store_weights(model: onnx.ModelProto, chosen: list[str], config: Int8Weights) -> dict[str, Any]:
    """Turn the chosen products into `MatMulNBits`, in place.

    Args:
        model: Products are named; their weights are initializers.
        chosen: Names of products that `takes` says yes to.
        config: Bits and blocks.

    Returns:
        What became of the bytes: `packed_bytes`, of them `padding_bytes`, `scale_bytes` with zero points, `float_bytes`,
        and the largest tensors that stayed in float by name.
    """
    graph, names = model.graph, set(chosen)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, onnx.TensorProto] = {}
    padding = 0
    replacements: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.name not in names:
            continue
        transposed = bool(attribute(node, "transB", 0))
        matrix = numpy_helper.to_array(constants[node.input[1]])
        weight_KN = matrix.T if transposed else matrix
        stem = f"{node.input[1]}_transposed" if transposed else node.input[1]
        if f"{stem}_q{config.bits}" not in made:  # a matrix that two products share is stored once
            blocks = round_to_blocks(weight_KN, config.bits, config.block_size, config.symmetric)
            made |= _tensors(blocks, stem, config.bits)
            padding += blocks.packed_NGS.nbytes - weight_KN.size * config.bits // 8
        replacements[node.output[0]] = _product(node, weight_KN.shape, stem, made, config)
    graph.initializer.extend(made.values())
    replace_nodes(graph, replacements)
    drop_unused_initializers(graph)
    if not any(entry.domain == _DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return _bytes(graph, made, padding)


def _tensors(blocks: Blocks, stem: str, bits: int) -> dict[str, onnx.TensorProto]:
    arrays = {f"{stem}_q{bits}": blocks.packed_NGS, f"{stem}_scales": blocks.scales_NG, f"{stem}_zero_points": blocks.zero_points}
    return {name: numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None}


def _product(
    node: onnx.NodeProto, shape_KN: tuple[int, ...], stem: str, made: dict[str, onnx.TensorProto], config: Int8Weights
) -> list[onnx.NodeProto]:
    """The nodes in a product's place; the first keeps its name, so that a pattern that excludes it still does."""
    inputs = [node.input[0], f"{stem}_q{config.bits}", f"{stem}_scales"]
    if not config.symmetric:
        inputs.append(f"{stem}_zero_points")
    bias = node.input[2] if len(node.input) > 2 else ""
    output = f"{node.output[0]}_product" if bias else node.output[0]
    arithmetic = {"accuracy_level": _INT8_ARITHMETIC} if config.arithmetic == "int8" else {}
    product = helper.make_node(
        "MatMulNBits",
        inputs,
        [output],
        name=node.name,
        domain=_DOMAIN,
        K=shape_KN[0],
        N=shape_KN[1],
        bits=config.bits,
        block_size=config.block_size,
        **arithmetic,
    )
    return [product, helper.make_node("Add", [output, bias], [node.output[0]], name=f"{node.name}_bias")] if bias else [product]


def _bytes(graph: onnx.GraphProto, made: dict[str, onnx.TensorProto], padding: int) -> dict[str, Any]:
    sizes = {tensor.name: _size(tensor) for tensor in graph.initializer}
    packed = {name for name in made if not name.endswith(("_scales", "_zero_points"))}
    kept = {tensor.name: sizes[tensor.name] for tensor in graph.initializer if tensor.name not in made and _is_float(tensor)}
    largest = sorted(kept, key=lambda name: (-kept[name], name))[:_LISTED]
    return {
        "packed_bytes": sum(sizes[name] for name in packed),
        "padding_bytes": padding,
        "scale_bytes": sum(sizes[name] for name in made.keys() - packed),
        "float_bytes": sum(kept.values()),
        "largest_in_float": [{"tensor": name, "bytes": kept[name]} for name in largest],
    }


def _is_float(tensor: onnx.TensorProto) -> bool:
    return int(tensor.data_type) == int(onnx.TensorProto.FLOAT)


def _size(tensor: onnx.TensorProto) -> int:
    return int(numpy_helper.to_array(tensor).nbytes)
