from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.graph.made import count, graph, optimized, wave
from vitedge.graph import share_transposed
from vitedge.graph._run import run_model, run_passes


def chain(constants: dict[str, np.ndarray], width: int) -> onnx.ModelProto:
    """`x` times each of the constants in order, with ReLU between them."""
    nodes, name = [], "x"
    for i, weight in enumerate(constants):
        nodes.append(helper.make_node("MatMul", [name, weight], [f"product{i}"]))
        name = "y" if i == len(constants) - 1 else f"relu{i}"
        nodes.append(helper.make_node("Relu", [f"product{i}"], [name]))
    return graph(nodes, constants, ["batch", 3, width], ["batch", 3, None])


def stored(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


@given(st.integers(16, 40), st.integers(16, 40), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_matrix_and_its_transpose_become_one(rows: int, columns: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    model = chain({"w": weight, "turned": weight.T.copy(), "again": weight}, rows)
    x = wave(2, 3, rows)
    expected = np.maximum(np.maximum(np.maximum(x @ weight, 0) @ weight.T, 0) @ weight, 0)
    (result,) = run_passes(model, ["share_transposed"], {"x": x})
    onnx.checker.check_model(model, full_check=True)
    assert result.changed == 2 and stored(model) == {"w": (rows, columns)} and count(model)["Transpose"] == 1
    assert rows * columns * 8 <= int(str(result.notes["bytes_saved"])) <= rows * columns * 8 + 100
    np.testing.assert_allclose(run_model(model, {"x": x})[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert share_transposed.apply(model).changed == 0


def test_kernels_of_1x1_convolutions_are_matrices() -> None:
    weight = wave(32, 16, 1, 1)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["inner"]),
        helper.make_node("Relu", ["inner"], ["active"]),
        helper.make_node("Conv", ["active", "turned"], ["y"]),
    ]
    model = graph(nodes, {"w": weight, "turned": weight.swapaxes(0, 1).copy()}, ["batch", 16, 4, 4], ["batch", 16, 4, 4])
    before = run_model(model, {"x": wave(2, 16, 4, 4)})[0]
    (result,) = run_passes(model, ["share_transposed"], {"x": wave(2, 16, 4, 4)})
    assert result.changed == 1 and stored(model) == {"w": (32, 16, 1, 1)}
    np.testing.assert_allclose(run_model(model, {"x": wave(2, 16, 4, 4)})[0], before, rtol=1e-5, atol=1e-5)


def test_the_runtime_folds_the_transpose_when_it_loads_the_file(tmp_path: Path) -> None:
    weight = wave(16, 32)
    model = chain({"w": weight, "turned": weight.T.copy()}, 16)
    before = optimized(model, tmp_path)
    assert share_transposed.apply(model).changed == 1
    assert optimized(model, tmp_path) == before


def test_a_symmetric_matrix_needs_no_transpose() -> None:
    weight = wave(16, 16)
    weight = weight + weight.T
    model = chain({"w": weight, "again": weight.T.copy()}, 16)
    assert share_transposed.apply(model).changed == 1
    assert stored(model) == {"w": (16, 16)} and count(model)["Transpose"] == 0


def _almost() -> dict[str, Any]:
    turned = wave(16, 32).T.copy()
    turned[3, 5] = np.nextafter(turned[3, 5], np.float32(9))
    return {"w": wave(16, 32), "turned": turned}


@pytest.mark.parametrize(
    "constants",
    [
        _almost(),
        {"w": wave(8, 16), "turned": wave(8, 16).T.copy()},  # too small to be worth a node
        {"w": wave(16, 32), "turned": wave(16, 32).reshape(32, 16)},
    ],
)
def test_what_is_not_the_same_to_the_bit_or_small_stays(constants: dict[str, np.ndarray]) -> None:
    model = chain(constants, constants["w"].shape[0])
    before = model.SerializeToString(deterministic=True)
    assert share_transposed.apply(model).changed == 0
    assert model.SerializeToString(deterministic=True) == before


def test_integers_and_kernels_that_see_more_than_a_pixel_stay() -> None:
    kernel, codes = wave(16, 16, 3, 3), np.arange(256).astype(np.int8).reshape(16, 16)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["first"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["first", "turned"], ["second"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["codes"], ["weight"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["turned_codes"], ["other"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["weight", "other"], ["square"]),
        helper.make_node("Add", ["second", "square"], ["y"]),
    ]
    constants = {"kernel": kernel, "turned": kernel.swapaxes(0, 1).copy(), "codes": codes, "turned_codes": codes.T.copy()}
    model = graph(nodes, constants, ["batch", 16, 16, 16], ["batch", 16, 16, 16])
    assert share_transposed.apply(model).changed == 0 and len(stored(model)) == 4


def test_what_a_caller_may_replace_or_read_stays() -> None:
    weight = wave(16, 32)
    model = chain({"w": weight, "turned": weight.T.copy()}, 16)
    model.graph.input.append(helper.make_tensor_value_info("turned", TensorProto.FLOAT, [32, 16]))
    assert share_transposed.apply(model).changed == 0
    model = chain({"w": weight, "turned": weight.T.copy()}, 16)
    model.graph.output.append(helper.make_tensor_value_info("turned", TensorProto.FLOAT, [32, 16]))
    assert share_transposed.apply(model).changed == 0


def test_a_subgraph_sees_what_was_shared() -> None:
    """A branch reads names of the graph around it."""
    weight = wave(16, 16)

    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["x", name], [f"{name}_out"])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["first"]),
        helper.make_node("MatMul", ["first", "turned"], ["second"]),
        helper.make_node("MatMul", ["second", "again"], ["third"]),
        helper.make_node("If", ["flag"], ["chosen"], then_branch=branch("turned"), else_branch=branch("again")),
        helper.make_node("Add", ["third", "chosen"], ["y"]),
    ]
    for flag in (True, False):
        constants = {"w": weight, "turned": weight.T.copy(), "again": weight.copy(), "flag": np.array(flag)}
        model = graph(nodes, constants, ["batch", 3, 16], ["batch", 3, 16])
        x = wave(2, 3, 16)
        before = run_model(model, {"x": x})[0]
        (result,) = run_passes(model, ["share_transposed"], {"x": x})
        onnx.checker.check_model(model)
        assert result.changed == 2
        np.testing.assert_allclose(run_model(model, {"x": x})[0], before, rtol=1e-4, atol=1e-4 * np.abs(before).max())


def test_half_precision_is_shared_as_well() -> None:
    weight = wave(16, 32).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "w"], ["inner"]),
        helper.make_node("MatMul", ["inner", "turned"], ["outer"]),
        helper.make_node("Cast", ["outer"], ["y"], to=TensorProto.FLOAT),
    ]
    model = graph(nodes, {"w": weight, "turned": weight.T.copy()}, ["batch", 3, 16], ["batch", 3, 16])
    assert share_transposed.apply(model).changed == 1
    (tensor,) = model.graph.initializer
    assert tensor.data_type == TensorProto.FLOAT16 and np.array_equal(numpy_helper.to_array(tensor), weight)
