from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.graph.made import count, graph, wave
from vitedge.graph import transpose_in_3d
from vitedge.graph._run import run_model


def three_products() -> onnx.ModelProto:
    """Queries, keys and values whose values' weight is that of the keys transposed."""
    nodes = [
        helper.make_node("Transpose", ["k"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "q"], ["queries"]),
        helper.make_node("MatMul", ["x", "k"], ["keys"]),
        helper.make_node("MatMul", ["x", "turned"], ["values"]),
        helper.make_node("Concat", ["queries", "keys", "values"], ["y"], axis=-1),
    ]
    return graph(nodes, {"q": wave(16, 16), "k": wave(256).reshape(16, 16) ** 2}, ["batch", 5, 16], ["batch", 5, 48])


def test_answers_are_the_same_in_both_runtimes(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, x = three_products(), wave(2, 5, 16)
    key = wave(256).reshape(16, 16) ** 2
    expected = np.concatenate([x @ wave(16, 16), x @ key, x @ key.T], axis=-1)
    assert transpose_in_3d.apply(model).changed == 1
    onnx.checker.check_model(model, full_check=True)
    assert count(model) == {"Reshape": 2, "Transpose": 1, "MatMul": 3, "Concat": 1}
    onnx.save(model, tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found in (run_model(model, {"x": x})[0], next(iter(compiled(x).values()))):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert transpose_in_3d.apply(model).changed == 0


def test_activations_are_left_alone() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])]
    assert transpose_in_3d.apply(graph(nodes, {}, [3, 4], [4, 3])).changed == 0
