"""Store 8-bit weights whose values all fit into 4 bits as 4-bit integers: half the bytes, the same arithmetic.

A weight with a scale per channel is stored as INT4 and cast to INT8 in front of its DequantizeLinear. Runtimes
fold the cast when they load the file, and fuse what follows to 8-bit integer products as before; a DequantizeLinear
that takes INT4 itself they leave in float (ONNX Runtime 1.31, OpenVINO 2026.4). A weight with a scale per block
needs no cast: that form is what ONNX Runtime turns into MatMulNBits and OpenVINO into a compressed matrix product.
Needs opset 21, where 4-bit types begin.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitedge.graph import PassResult, initializer_bytes
from vitedge.graph._index import Index, attribute, drop_unused_initializers, replace_nodes
from vitedge.packing import pack

TOLERANCE = 0.0
OPSET = 21
_NARROW = {TensorProto.INT8: (TensorProto.INT4, -8, 7), TensorProto.UINT8: (TensorProto.UINT4, 0, 15)}


def apply(model: onnx.ModelProto) -> PassResult:
    """Narrow the constants of DequantizeLinear nodes, in place; below opset 21 nothing is done, and said."""
    graph = model.graph
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < OPSET:
        return PassResult(0, {"why": f"opset {opset} has no 4-bit integers"})
    before, index = initializer_bytes(model), Index(graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    casts: dict[str, list[onnx.NodeProto]] = {}
    made: dict[str, onnx.TensorProto] = {}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        values = index.constant(node.input[0])
        tensor = tensors.get(node.input[0])
        if values is None or tensor is None or tensor.data_type not in _NARROW or values.ndim < 2 or not _fits(values, tensor.data_type):
            continue
        blocked = bool(attribute(node, "block_size", 0))
        zero_points = tensors.get(node.input[2]) if len(node.input) > 2 else None
        if blocked and zero_points is not None and not _fits(numpy_helper.to_array(zero_points), zero_points.data_type):
            continue
        narrow = _narrowed(tensor, made)
        if blocked:
            node.input[0] = narrow
            if zero_points is not None:
                node.input[2] = _narrowed(zero_points, made)
            continue
        wide = f"{tensor.name}_wide"
        node.input[0] = wide
        if wide not in casts:
            casts[wide] = [helper.make_node("Cast", [narrow], [wide], name=f"{tensor.name}/Cast", to=tensor.data_type)]
    graph.initializer.extend(made.values())
    # Each cast stands in front of the first node that reads it.
    first = {wide: next(node for node in graph.node if wide in node.input) for wide in casts}
    placed: dict[str, list[onnx.NodeProto]] = {}
    for wide, nodes in casts.items():
        placed.setdefault(first[wide].output[0], [first[wide]])[:0] = nodes
    replace_nodes(graph, placed)
    drop_unused_initializers(graph)
    return PassResult(len(made), {"bytes_saved": before - initializer_bytes(model)})


def _fits(values: np.ndarray, data_type: int) -> bool:
    _, lowest, highest = _NARROW[data_type]
    return bool(values.size) and int(values.min()) >= lowest and int(values.max()) <= highest


def _narrowed(tensor: onnx.TensorProto, made: dict[str, onnx.TensorProto]) -> str:
    """Name of a tensor's 4-bit twin, made once."""
    name = f"{tensor.name}_4bit"
    if name not in made:
        kind = _NARROW[tensor.data_type][0]
        packed = pack(numpy_helper.to_array(tensor).ravel(), 4, signed=kind == TensorProto.INT4)
        # As bytes: onnx's own list of values takes up to two bytes for each pair of them.
        made[name] = helper.make_tensor(name, kind, list(tensor.dims), packed.tobytes(), raw=True)
    return name
