"""Write a weight out where the graph turns or cuts a stored one, so that quantizers see it.

A model that shares a matrix reads it transposed, or a part of it, in a second place (`share_transposed`). ONNX Runtime's quantizer takes
a product for a weight's only where an initializer stands there, and leaves it in float otherwise. An int8 file of such a model therefore
holds the matrix once for each way it is read: integers that share a scale per output feature cannot be shared across a transposition.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from vitedge.graph import PassResult
from vitedge.graph._index import Index, drop_unused_initializers, replace_nodes

TOLERANCE = 1e-5
_MOVES = ("Transpose", "Slice", "Reshape")


def apply(model: onnx.ModelProto) -> PassResult:
    """Compute every Transpose, Slice and Reshape whose inputs are all constants, float data first, in place.

    Returns:
        How many weights were written out; what leads to another is none.
    """
    from onnx.reference import ReferenceEvaluator

    graph, made = model.graph, set[str]()
    while True:  # one that reads another's result is a constant in the next round
        index, folded = Index(graph), {}
        for node in graph.node:
            if node.op_type not in _MOVES or node.output[0] in index.outputs:
                continue
            values = {name: index.constant(name) for name in node.input if name}
            if any(value is None for value in values.values()) or values[node.input[0]].dtype.kind != "f":  # type: ignore[union-attr]
                continue
            folded[node.output[0]] = ReferenceEvaluator(node).run(None, values)[0]
        if not folded:
            break
        replace_nodes(graph, {name: [] for name in folded})
        graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in folded.items())
        made |= set(folded)
    drop_unused_initializers(graph)
    return PassResult(sum(tensor.name in made for tensor in graph.initializer))
