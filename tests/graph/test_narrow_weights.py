from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.graph.made import count, graph, wave
from vitedge.graph import narrow_weights
from vitedge.graph._run import run_model


def _model(values: np.ndarray, opset: int = 21) -> onnx.ModelProto:
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1), helper.make_node("MatMul", ["x", "d"], ["y"])]
    return graph(nodes, {"w": values, "s": np.abs(wave(values.shape[1])) + 0.1}, ["batch", len(values)], ["batch", None], opset)


@pytest.mark.parametrize(
    ("kind", "low", "high", "narrow"),
    [(np.int8, -8, 7, TensorProto.INT4), (np.uint8, 0, 15, TensorProto.UINT4)],
    ids=["signed", "unsigned"],
)
def test_takes_half_a_byte_a_value_and_changes_none(kind: type, low: int, high: int, narrow: int) -> None:
    values = np.random.default_rng(0).integers(low, high + 1, (9, 5)).astype(kind)
    values[0, :2] = low, high
    model, x = _model(values), {"x": wave(3, 9)}
    expected = run_model(model, x)[0]
    assert narrow_weights.apply(model).changed == 1
    onnx.checker.check_model(model, full_check=True)
    (stored,) = [tensor for tensor in model.graph.initializer if tensor.data_type == narrow]
    assert len(stored.raw_data) == math.ceil(values.size / 2) and not stored.int32_data
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int32), values)
    assert count(model) == {"Cast": 1, "DequantizeLinear": 1, "MatMul": 1}
    assert np.array_equal(run_model(model, x)[0], expected)


def test_leaves_wider_values_and_older_opsets_alone() -> None:
    wide = _model(np.array([[8, 0], [1, 2]], np.int8))
    assert narrow_weights.apply(wide).changed == 0
    old = _model(np.array([[7, 0], [1, 2]], np.int8), opset=19)
    result = narrow_weights.apply(old)
    assert result.changed == 0 and "opset 19" in result.notes["why"]
