from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from tests.graph.made import count, graph, wave
from vitedge.graph import share_transposed
from vitedge.graph._run import run_model, run_passes


def shared() -> onnx.ModelProto:
    """`relu(x w) w^T` and then a product with a part of `w`, all of them of one stored matrix."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["active", "turned"], ["back"]),
        helper.make_node("Slice", ["turned", "begin", "end", "axis"], ["cut"]),
        helper.make_node("Transpose", ["cut"], ["cut_turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["back", "cut_turned"], ["y"]),
    ]
    cut = {"begin": np.array([0]), "end": np.array([16]), "axis": np.array([0])}
    return graph(nodes, {"w": wave(24, 32), **cut}, ["batch", 3, 24], ["batch", 3, None])


def test_every_product_has_its_weight_and_the_answer_stays() -> None:
    model, x = shared(), wave(2, 3, 24)
    w = wave(24, 32).astype(np.float64)
    expected = np.maximum(x @ w, 0) @ w.T @ w.T[:16].T
    (result,) = run_passes(model, ["fold_weights"], {"x": x})
    onnx.checker.check_model(model, full_check=True)
    assert result.changed == 2 and count(model)["Transpose"] == count(model)["Slice"] == 0
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert stored == {"w": (24, 32), "turned": (32, 24), "cut_turned": (24, 16)}
    np.testing.assert_allclose(run_model(model, {"x": x})[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_what_is_computed_from_the_input_stays() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]), helper.make_node("MatMul", ["turned", "w"], ["y"])]
    model = graph(nodes, {"w": wave(3, 8)}, ["batch", 3, 24], ["batch", 24, 8])
    (result,) = run_passes(model, ["fold_weights"], {"x": wave(2, 3, 24)})
    assert result.changed == 0 and count(model)["Transpose"] == 1


def test_it_undoes_sharing() -> None:
    weight = wave(24, 32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "turned"], ["y"]),
    ]
    model = graph(nodes, {"w": weight, "turned": weight.T.copy()}, ["batch", 3, 24], ["batch", 3, 24])
    assert share_transposed.apply(model).changed == 1 and count(model)["Transpose"] == 1
    (result,) = run_passes(model, ["fold_weights"], {"x": wave(2, 3, 24)})
    assert result.changed == 1 and count(model)["Transpose"] == 0 and len(model.graph.initializer) == 2
