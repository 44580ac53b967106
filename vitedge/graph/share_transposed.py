"""Store a weight once that the graph holds twice, as it is and transposed.

A model that shares weights uses a matrix on both sides (`vitedge.models.tied`). torch's exporter folds small transpositions into
the file, so that it then holds both. The second becomes a Transpose of the first, which runtimes compute once, when they load it.
A weight that is there again as it is, is read from the first place as well.
"""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitedge.graph import PassResult, initializer_bytes
from vitedge.graph._index import Index, drop_unused_initializers, replace_nodes

# Values stay the same; a runtime may multiply by a transposed matrix in another order.
TOLERANCE = 1e-5
LEAST = 256  # values; a node takes about a hundred bytes in the file
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def apply(model: onnx.ModelProto) -> PassResult:
    """Replace repeated weights by a Transpose of the first, or by the first itself, in place.

    Weights are float matrices of at least `LEAST` values, and kernels of 1x1 convolutions.

    Returns:
        How many weights went, and `bytes_saved` in the notes.
    """
    graph, index, before = model.graph, Index(model.graph), initializer_bytes(model)
    ends = {value.name for value in [*graph.input, *graph.output]}
    kept: dict[tuple[int, tuple[int, ...], str], str] = {}
    same: dict[str, str] = {}
    transposed: dict[str, onnx.NodeProto] = {}
    for tensor in graph.initializer:
        # Only what the top level reads: there every reader is seen.
        if tensor.name in ends or tensor.name not in index.consumers or not _is_matrix(tensor):
            continue
        value = numpy_helper.to_array(tensor)
        own, other = _key(tensor, value), _key(tensor, value.swapaxes(0, 1))
        if own in kept:
            same[tensor.name] = kept[own]
        elif other in kept:
            order = [1, 0, *range(2, value.ndim)]
            transposed[tensor.name] = helper.make_node(
                "Transpose", [kept[other]], [tensor.name], name=f"{tensor.name}/Transpose", perm=order
            )
        else:
            kept[own] = tensor.name
    if not same and not transposed:
        return PassResult(0, {"bytes_saved": 0})
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in same:
                node.input[position] = same[name]
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name in transposed:
            del graph.initializer[position]
    if transposed:
        first = graph.node[0]
        replace_nodes(graph, {first.output[0]: [*transposed.values(), first]})
    drop_unused_initializers(graph)
    return PassResult(len(same) + len(transposed), {"bytes_saved": before - initializer_bytes(model)})


def _is_matrix(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor is a float matrix, perhaps with axes of length 1 after it, that is worth a node."""
    dims = list(tensor.dims)
    return tensor.data_type in _FLOATS and len(dims) >= 2 and all(d == 1 for d in dims[2:]) and dims[0] * dims[1] >= LEAST


def _key(tensor: onnx.TensorProto, value: np.ndarray) -> tuple[int, tuple[int, ...], str]:
    """What two tensors share that are equal to the bit."""
    return tensor.data_type, value.shape, hashlib.sha256(value.tobytes()).hexdigest()
