"""Give a model a fixed batch: shape arithmetic becomes constants, for toolchains that want static shapes.

Dynamic axes keep several toolchains from quantizing or fusing (microsoft/onnxruntime issues 12178, 23600).
Shapes come from ONNX's own shape inference and constants from its reference evaluator; no engine is needed.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from vitedge.errors import InputError, UsageError
from vitedge.graph import PassResult
from vitedge.graph._index import Index, drop_unused_initializers, replace_nodes

# The runtime may fuse a static graph differently.
TOLERANCE = 1e-5

_FOLDED_ELEMENTS = 65_536  # a constant larger than this costs more file than its node costs time
# Of a weight in few bits these make one in many, which is neither small any more nor multiplied as integers.
_WIDENING, _WIDENED_ELEMENTS = ("Cast", "DequantizeLinear"), 64
# What these make of a weight is stored already, and would then be there twice (`share_transposed`).
_MOVING, _MOVED_ELEMENTS = ("Transpose", "Reshape", "Slice"), 255


def apply(model: onnx.ModelProto, batch_size: int = 1) -> PassResult:
    """Replace the symbolic batch by `batch_size` everywhere and fold what that makes constant, in place.

    Raises:
        UsageError: The batch size is below one.
        InputError: The model has another batch already fixed, or its graph is not valid.
    """
    if batch_size < 1:
        raise UsageError("batch_size", expected="a whole number of at least 1", found=str(batch_size), fix="give another batch size")
    changed = _fix_dimensions(model, batch_size)
    while True:
        folded = _fold_constants(model)
        changed += folded
        if not folded:
            break
    changed += _state_reshapes(model)
    drop_unused_initializers(model.graph)
    return PassResult(changed, {"batch_size": batch_size})


def _fix_dimensions(model: onnx.ModelProto, batch_size: int) -> int:
    """Set the leading dimension of the inputs, and every dimension of the same symbol, to the batch."""
    initialized = {tensor.name for tensor in model.graph.initializer}
    symbols, changed = set(), 0
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in initialized or not dims:
            continue
        if dims[0].HasField("dim_value"):
            if dims[0].dim_value != batch_size:
                raise InputError(
                    f"input '{value.name}'",
                    expected=f"a dynamic batch, or one of {batch_size}",
                    found=f"a batch fixed to {dims[0].dim_value}",
                    fix="export the model with a dynamic batch",
                )
            continue
        if dims[0].dim_param:
            symbols.add(dims[0].dim_param)
        dims[0].dim_value = batch_size
        changed += 1
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = batch_size
                changed += 1
    return changed


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that inference finds to be static."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise InputError(
            "the model's graph", expected="shapes that can be inferred", found=str(error)[:200], fix="export the model again"
        ) from error
    shapes = {}
    for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes


def _fold_constants(model: onnx.ModelProto) -> int:
    """Replace Shape of static tensors, and small nodes that read constants only, by their values; returns how many."""
    graph, shapes = model.graph, _shapes(model)
    index = Index(graph)
    values: dict[str, np.ndarray] = {}
    for node in graph.node:
        value = _value(node, index, values, shapes, model)
        if value is not None:
            values[node.output[0]] = value
    replace_nodes(graph, {name: [] for name in values})
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return len(values)


def _value(
    node: onnx.NodeProto, index: Index, values: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], model: onnx.ModelProto
) -> np.ndarray | None:
    """What a node gives, where that is known without running the model."""
    if len(node.output) != 1 or node.output[0] in index.outputs or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Shape" and node.input[0] in shapes:
        known: dict[str, np.ndarray] = {node.input[0]: np.empty(shapes[node.input[0]], np.float32)}
    else:
        if any(attr.HasField("g") for attr in node.attribute) or node.op_type.startswith("Random"):
            return None
        limit = _WIDENED_ELEMENTS if node.op_type in _WIDENING else _MOVED_ELEMENTS if node.op_type in _MOVING else _FOLDED_ELEMENTS
        if int(np.prod(shapes.get(node.output[0], (limit + 1,)))) > limit:
            return None
        known = {}
        for name in filter(None, node.input):
            value = values[name] if name in values else index.constant(name)
            if value is None:
                return None
            known[name] = value
    from onnx.reference import ReferenceEvaluator

    inputs = [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for name, v in known.items()]
    output = onnx.ValueInfoProto(name=node.output[0])
    single = onnx.helper.make_model(onnx.helper.make_graph([node], "fold", inputs, [output]), opset_imports=model.opset_import)
    return np.asarray(ReferenceEvaluator(single).run(None, known)[0])


def _state_reshapes(model: onnx.ModelProto) -> int:
    """Write out the -1 and 0 of Reshape targets whose result is static; returns how many were."""
    graph, shapes = model.graph, _shapes(model)
    index = Index(graph)
    made: dict[tuple[int, ...], str] = {}
    changed = 0
    for node in graph.node:
        if node.op_type != "Reshape" or node.output[0] not in shapes:
            continue
        target, shape = index.constant(node.input[1]), shapes[node.output[0]]
        if target is None or tuple(target) == shape:
            continue
        if shape not in made:
            made[shape] = f"{node.output[0]}_static_shape"
            graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), made[shape]))
        node.input[1] = made[shape]
        changed += 1
    return changed
