"""Weights and multiply-accumulates of a file, counted from its graph.

Counted as multiply-accumulates, per image: matrix products and convolutions in every spelling, float,
quantized or fused (the two inside ONNX's own Attention included). A graph with ONNX Runtime's fused attention or an
Einsum is not counted at all. Not counted in any: normalization, softmax,
activation functions, additions, quantizing and dequantizing, and anything inside control flow. A MAC is
one multiplication and one addition; twice as many FLOPs.

Counted as weights: constants of a float type or of a quantized one with more than one element, each
once. Scales, zero points, shapes and scalars are not weights.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitedge.artifact import Artifact

if TYPE_CHECKING:
    import onnx

# ONNX Runtime's own attention, whose projections are inside or whose shapes are its own, and free notation.
_UNCOUNTED = ("MultiHeadAttention", "QAttention", "PackedAttention", "PackedMultiHeadAttention", "GroupQueryAttention", "Einsum")
# Products of two matrices, by the positions of the left and right factor.
_MATMULS = {
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "TransposeMatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "MatMulNBits": (0, 1),
    "QLinearMatMul": (0, 3),
    "Gemm": (0, 1),
    "FusedGemm": (0, 1),
    "QGemm": (0, 3),
}
_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}  # position of the weight
# Inputs that are scales or zero points.
_SCALES = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "MatMulInteger": (2, 3),
    "ConvInteger": (2, 3),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "MatMulNBits": (2, 3),
}
_CHECKPOINT_FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms, as torch names them
_INT32_BIAS = {"DequantizeLinear": 0, "QGemm": 6, "QLinearConv": 8}  # position of a bias held as int32


@dataclass(frozen=True)
class Cost:
    """What a model holds and does.

    Attributes:
        params: Weights; None where `reason` says they cannot be counted.
        macs: Multiply-accumulates for one image; None where `reason` says they cannot be counted.
        reason: Why not.
    """

    params: int | None
    macs: int | None
    reason: str = ""


def count_cost(artifact: Artifact) -> Cost:
    """Count the weights and multiply-accumulates of an ONNX file, an OpenVINO IR or a checkpoint."""
    if artifact.format == "onnx":
        import onnx

        return count_onnx(onnx.load(str(artifact.path)))
    if artifact.format == "openvino":
        from vitedge.bench.cost_ir import count_ir

        return count_ir(artifact.path)
    with artifact.path.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if any(entry["dtype"] not in _CHECKPOINT_FLOATS for name, entry in tensors.items() if not name.endswith(_STATISTICS)):
        return Cost(None, None, "a checkpoint of packed integers says neither how many weights it holds, nor has it a graph to count")
    params = sum(math.prod(entry["shape"]) for name, entry in tensors.items() if not name.endswith(_STATISTICS))
    return Cost(params, None, "a checkpoint has no graph to count")


def count_onnx(model: onnx.ModelProto) -> Cost:
    """Count an ONNX model; shapes are inferred at batch 1."""
    import onnx

    constants = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                constants[node.output[0]] = (tuple(attribute.t.dims), attribute.t.data_type)
    params = _count_onnx_params(model.graph.node, constants, onnx.TensorProto)
    shapes = _infer_shapes(model) | {name: dims for name, (dims, _) in constants.items()}
    macs = 0
    for node in model.graph.node:
        counted = _node_macs(node, shapes)
        if counted is None:
            return Cost(params, None, f"{node.op_type} '{node.name}' cannot be counted, or the shapes at it cannot be inferred")
        macs += counted
    return Cost(params, macs)


def _infer_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors whose every dimension is known once the batch is 1."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    held = {tensor.name for tensor in fixed.graph.initializer}
    # Shapes the file states may name the free batch; inferred ones must not be mixed with them.
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        if value.name not in held and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes


def _node_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Multiply-accumulates of a node: 0 for those not counted, None where a shape is missing."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type in _CONVOLUTIONS:
        weight, out = shapes.get(node.input[_CONVOLUTIONS[node.op_type]]), shapes.get(node.output[0])
        # Weight (out channels, in channels / groups, *kernel): one sum of its tail per output value.
        return None if weight is None or out is None else math.prod(out) * math.prod(weight[1:])
    if node.op_type in _MATMULS:
        left, right = (shapes.get(node.input[position]) for position in _MATMULS[node.op_type])
        if node.op_type == "MatMulNBits":
            return None if left is None else math.prod(left[:-1]) * attributes["K"].i * attributes["N"].i
        if left is None or right is None:
            return None
        if attributes.get("transA") and attributes["transA"].i:
            left = (*left[:-2], left[-1], left[-2])
        if attributes.get("transB") and attributes["transB"].i:
            right = (*right[:-2], right[-1], right[-2])
        return matmul_macs(left, right)
    if node.op_type in _UNCOUNTED or (node.op_type == "Attention" and node.domain == "com.microsoft"):
        return None
    if node.op_type == "Attention":
        out = shapes.get(node.input[0])
        key, value = shapes.get(node.input[1]), shapes.get(node.input[2])
        return None if out is None or key is None or value is None else _attention_macs(out, key, value, attributes)
    return 0


def matmul_macs(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Multiply-accumulates of `left @ right`, numpy's rules for the leading dimensions."""
    if len(left) == 1:
        left = (1, *left)
    if len(right) == 1:
        right = (*right, 1)
    rank = max(len(left), len(right))
    lead_left, lead_right = (1,) * (rank - len(left)) + left[:-2], (1,) * (rank - len(right)) + right[:-2]
    lead = math.prod(max(a, b) for a, b in zip(lead_left, lead_right, strict=True))
    return lead * left[-2] * left[-1] * right[-1]


def _attention_macs(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], attributes: dict[str, Any]) -> int:
    """Both products of an ONNX `Attention` node, in its rank 4 (B, H, N, K) or rank 3 (B, N, H K) form."""
    tokens, tokens_kept = query[-2], key[-2]
    batch = query[0]
    if len(query) == 4:
        return int(batch * query[1] * tokens * tokens_kept * (query[-1] + value[-1]))
    heads, kv_heads = attributes["q_num_heads"].i, attributes["kv_num_heads"].i
    return int(batch * tokens * tokens_kept * (query[-1] + heads * (value[-1] // kv_heads)))


def _count_onnx_params(nodes: Iterable[onnx.NodeProto], constants: dict[str, tuple[tuple[int, ...], int]], types: Any) -> int:
    weight_types = {types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE, types.INT8, types.UINT8, types.INT4, types.UINT4}
    not_weights: set[str] = set()
    packed: dict[str, int] = {}
    dynamic_scales = {node.output[1] for node in nodes if node.op_type == "DynamicQuantizeLinear"}
    biases: set[str] = set()
    for node in nodes:
        not_weights.update(node.input[position] for position in _SCALES.get(node.op_type, ()) if position < len(node.input))
        if node.op_type == "Mul" and dynamic_scales & set(node.input):
            # ONNX Runtime's dynamic quantization multiplies the input's scale by the weight's.
            not_weights.update(node.input)
        if node.op_type == "MatMulNBits":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            packed[node.input[1]] = attributes["K"] * attributes["N"]
        if node.op_type in _INT32_BIAS and _INT32_BIAS[node.op_type] < len(node.input):
            biases.add(node.input[_INT32_BIAS[node.op_type]])
    total = 0
    for name, (dims, kind) in constants.items():
        if name in packed:
            total += packed[name]
        elif math.prod(dims) > 1 and name not in not_weights and (kind in weight_types or (kind == types.INT32 and name in biases)):
            total += math.prod(dims)
    return total
