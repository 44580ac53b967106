"""Transpose a stored weight as a stack of one matrix, so that OpenVINO does not make the transposition a flag of the product.

Three products of the same input, one of them with a weight that another has transposed (queries, keys and values of
`vitedge.models.tied`), get wrong answers in OpenVINO 2026.4 on the CPU, without a word, where the matrices are square: likely they
are fused into one product with one flag. A Transpose between two Reshapes is computed when the file is loaded, in every runtime, and its
result is a plain weight.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vitedge.graph import PassResult
from vitedge.graph._index import Index, attribute, replace_nodes

TOLERANCE = 1e-5


def apply(model: onnx.ModelProto) -> PassResult:
    """Put each Transpose of a constant float matrix between two Reshapes, in place; changed: how many."""
    graph, index = model.graph, Index(model.graph)
    shapes: dict[tuple[int, ...], str] = {}
    placed: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type != "Transpose" or node.output[0] in index.outputs:
            continue
        value = index.constant(node.input[0])
        if value is None or value.ndim != 2 or value.dtype.kind != "f" or list(attribute(node, "perm", [1, 0])) != [1, 0]:
            continue
        rows, columns = value.shape
        stack, result = (shapes.setdefault(shape, f"shape_{'x'.join(map(str, shape))}") for shape in ((1, rows, columns), (columns, rows)))
        end, name = node.output[0], node.name or node.output[0]
        placed[end] = [
            helper.make_node("Reshape", [node.input[0], stack], [f"{end}_stack"], name=f"{name}/Stack"),
            helper.make_node("Transpose", [f"{end}_stack"], [f"{end}_turned"], name=name, perm=[0, 2, 1]),
            helper.make_node("Reshape", [f"{end}_turned", result], [end], name=f"{name}/Matrix"),
        ]
    if placed:
        replace_nodes(graph, placed)
        there = {tensor.name for tensor in graph.initializer}
        made = {name: shape for shape, name in shapes.items() if name not in there}
        graph.initializer.extend(numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in made.items())
    return PassResult(len(placed))
