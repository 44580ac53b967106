"""Small graphs made by hand, and what engines do with them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def graph(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    input_shape: list[int | str],
    output_shape: list[int | str | None] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """A model of one float input `x` and one float output `y`."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "made",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=9,
    )


def wave(*shape: int) -> np.ndarray:
    """Deterministic float32 values near one."""
    return np.sin(np.arange(np.prod(shape), dtype=np.float64) * 0.7).reshape(shape).astype(np.float32)


def count(model: onnx.ModelProto) -> Counter[str]:
    """Nodes by operator."""
    return Counter(node.op_type for node in model.graph.node)


def optimized(model: onnx.ModelProto, folder: Path, batch: int | None = None) -> Counter[str]:
    """Nodes by operator after ONNX Runtime's own optimizations for the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return count(onnx.load(folder / "optimized.onnx"))
