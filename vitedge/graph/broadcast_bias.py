"""Give the bias after a MatMul the rank of what it is added to, so that static int8 survives a fixed batch.

Once all shapes are known, ONNX Runtime's MatMulAddFusion turns MatMul + Add of a one-dimensional bias into
Reshape + Gemm + Reshape. In a file of Q/DQ pairs that Gemm has a float bias, its integer kernel wants an int32
one, and so the whole model runs in float: 1 integer product instead of 50 in a DeiT-Ti (ONNX Runtime 1.31,
batch fixed at 1). A bias of shape (1, 1, N) is left alone by that fusion and the integer one applies.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from vitedge.errors import InputError
from vitedge.graph import PassResult
from vitedge.graph._index import Index, drop_unused_initializers

TOLERANCE = 1e-5


def apply(model: onnx.ModelProto) -> PassResult:
    """Reshape every one-dimensional constant added to a MatMul of three or more dimensions, in place.

    Raises:
        InputError: The model's shapes contradict each other.
    """
    graph, ranks = model.graph, _ranks(model)
    index = Index(graph)
    changed = 0
    for add in [node for node in graph.node if node.op_type == "Add"]:
        for side in (0, 1):
            bias, matmul = index.constant(add.input[side]), index.producer.get(add.input[1 - side])
            if bias is None or bias.ndim != 1 or matmul is None or matmul.op_type != "MatMul":
                continue
            rank = ranks.get(matmul.output[0], 0)
            if rank < 3:
                continue
            name = f"{add.input[side]}_rank{rank}"
            if not any(tensor.name == name for tensor in graph.initializer):
                shaped = np.ascontiguousarray(bias.reshape([1] * (rank - 1) + [-1]))
                graph.initializer.append(numpy_helper.from_array(shaped, name))
            add.input[side] = name
            changed += 1
    drop_unused_initializers(graph)
    return PassResult(changed)


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise InputError(
            "the model's graph", expected="shapes that can be inferred", found=str(error)[:200], fix="export the model again"
        ) from error
    values = [*inferred.graph.value_info, *inferred.graph.output]
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values if value.type.tensor_type.HasField("shape")}
