"""Turn a patch embedding written as Conv into the MatMul that it is.

A convolution whose stride equals its kernel multiplies each patch by one matrix (Dosovitskiy et al. 2021,
section 3.1). As a MatMul it quantizes like every other one: ONNX Runtime's dynamic ConvInteger is slow
(microsoft/onnxruntime issue 16009), and a Conv left in float costs 0.4 MB of a DeiT-Ti's int8 file.
In float the two run equally fast, so this belongs to quantization only.

Shapes: B batch, C channels, P patch, N tokens, D embedding.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vitedge.graph import PassResult
from vitedge.graph._index import Index, attribute, drop_unused_initializers, replace_nodes

TOLERANCE = 1e-4


def apply(model: onnx.ModelProto) -> PassResult:
    """Rewrite every Conv -> Reshape -> Transpose that makes tokens of patches, in place.

    The MatMul keeps the Conv's name, so that a pattern that excludes the node still does.
    """
    candidates = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    changed = sum(_rewrite(model.graph, output) for output in candidates)
    if changed:
        drop_unused_initializers(model.graph)
    return PassResult(changed)


def _rewrite(graph: onnx.GraphProto, output: str) -> bool:
    """Rewrite the Conv with that output where it is a patch embedding; says whether it was."""
    index = Index(graph)
    conv = index.producer[output]
    weight_DCPP = index.constant(conv.input[1])
    if weight_DCPP is None or weight_DCPP.ndim != 4 or not _tiles(conv, weight_DCPP):
        return False
    reshape = index.only_consumer(conv.output[0], "Reshape")
    transpose = index.only_consumer(reshape.output[0], "Transpose") if reshape else None
    source = next((value for value in graph.input if value.name == conv.input[0]), None)
    if reshape is None or transpose is None or source is None or attribute(transpose, "perm") != [0, 2, 1]:
        return False
    embed_dim, channels, patch, _ = weight_DCPP.shape
    height, width = (dim.dim_value for dim in source.type.tensor_type.shape.dim[2:])
    if not height or not width or height % patch or width % patch:
        return False
    rows, columns = height // patch, width // patch
    shape = index.constant(reshape.input[1])
    if shape is None or len(shape) != 3 or shape[1] not in (embed_dim, 0) or shape[2] not in (-1, rows * columns):
        return False

    def constant(suffix: str, value: np.ndarray) -> str:
        name = f"{conv.output[0]}_{suffix}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    out, tokens = conv.output[0], transpose.output[0]
    batch = source.type.tensor_type.shape.dim[0].dim_value or -1
    grid = constant("grid_shape", np.array([batch, channels, rows, patch, columns, patch], np.int64))
    flat = constant("patch_shape", np.array([batch, rows * columns, channels * patch * patch], np.int64))
    matrix = constant("matrix", weight_DCPP.reshape(embed_dim, -1).T)
    has_bias = len(conv.input) > 2 and conv.input[2] != ""
    product = f"{out}_product" if has_bias else tokens
    nodes = [
        helper.make_node("Reshape", [conv.input[0], grid], [f"{out}_grid"], name=f"{conv.name}_grid"),
        helper.make_node("Transpose", [f"{out}_grid"], [f"{out}_patches"], name=f"{conv.name}_patches", perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", [f"{out}_patches", flat], [f"{out}_flat"], name=f"{conv.name}_flat"),
        helper.make_node("MatMul", [f"{out}_flat", matrix], [product], name=conv.name),
    ]
    if has_bias:
        nodes.append(helper.make_node("Add", [product, conv.input[2]], [tokens], name=f"{conv.name}_bias"))
    replace_nodes(graph, {conv.output[0]: nodes, reshape.output[0]: [], transpose.output[0]: []})
    return True


def _tiles(conv: onnx.NodeProto, weight_DCPP: np.ndarray) -> bool:
    """Whether a Conv's windows are square, touch, and do not overlap, and its channels are not grouped."""
    patch = weight_DCPP.shape[2]
    return (
        weight_DCPP.shape[3] == patch
        and attribute(conv, "strides", [1, 1]) == [patch, patch]
        and attribute(conv, "group", 1) == 1
        and set(attribute(conv, "pads", [0])) == {0}
        and attribute(conv, "dilations", [1, 1]) == [1, 1]
        and attribute(conv, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    )
