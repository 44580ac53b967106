from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests import tiny
from tests.graph.made import count, graph, wave
from vitedge.errors import InputError, UsageError
from vitedge.graph import fix_batch
from vitedge.graph._run import run_model


def with_shape_arithmetic() -> onnx.ModelProto:
    """A class token expanded to the batch and joined to two tokens, as exporters write it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch_size"]),
        helper.make_node("Unsqueeze", ["batch_size", "axis"], ["batch_list"]),
        helper.make_node("Concat", ["batch_list", "ones", "width"], ["target"], axis=0),
        helper.make_node("Expand", ["token", "target"], ["tokens"]),
        helper.make_node("Concat", ["tokens", "x"], ["joined"], axis=1),
        helper.make_node("Reshape", ["joined", "flat"], ["y"]),
    ]
    constants = {
        "zero": np.array(0, np.int64),
        "axis": np.array([0], np.int64),
        "ones": np.array([1], np.int64),
        "width": np.array([3], np.int64),
        "flat": np.array([0, -1], np.int64),
        "token": wave(1, 1, 3),
    }
    return graph(nodes, constants, ["batch", 2, 3], ["batch", 9])


@settings(max_examples=6, deadline=None)
@given(batch=st.integers(1, 5))
def test_folds_shape_arithmetic_and_keeps_the_answers(batch: int) -> None:
    model = with_shape_arithmetic()
    x = wave(batch, 2, 3)
    expected = np.concatenate([np.tile(wave(1, 1, 3), (batch, 1, 1)), x], axis=1).reshape(batch, 9)
    result = fix_batch.apply(model, batch)
    onnx.checker.check_model(model, full_check=True)
    assert result.changed > 0 and result.notes["batch_size"] == batch
    assert set(count(model)) == {"Concat", "Reshape"}
    assert not any(d.dim_param for v in [*model.graph.input, *model.graph.output] for d in v.type.tensor_type.shape.dim)
    target = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer}[model.graph.node[-1].input[1]]
    assert target == [batch, 9]
    assert np.array_equal(run_model(model, {"x": x})[0], expected)


@settings(max_examples=4, deadline=None)
@given(batch=st.integers(1, 4))
def test_equals_the_dynamic_model(batch: int) -> None:
    x = tiny.images(batch)
    dynamic, fixed = tiny.tiny_model(), tiny.tiny_model()
    fix_batch.apply(fixed, batch_size=batch)
    assert fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    assert fixed.graph.output[0].type.tensor_type.shape.dim[0].dim_value == batch
    assert np.abs(run_model(fixed, {"pixels": x})[0] - run_model(dynamic, {"pixels": x})[0]).max() < 1e-6


def test_a_model_of_that_batch_already_changes_little_and_another_is_refused() -> None:
    model = tiny.tiny_model(batch=2)
    assert fix_batch.apply(model, 2).changed == 1  # the -1 of its Reshape
    assert fix_batch.apply(model, 2).changed == 0
    with pytest.raises(InputError, match="fixed to 2"):
        fix_batch.apply(model, 1)


def test_refuses_a_batch_below_one() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        fix_batch.apply(tiny.tiny_model(), 0)


def test_never_folds_randomness_or_large_constants() -> None:
    nodes = [
        helper.make_node("RandomNormal", [], ["noise"], shape=[2]),
        helper.make_node("Expand", ["one", "large"], ["ones"]),
        helper.make_node("ReduceSum", ["ones"], ["total"], keepdims=0),
        helper.make_node("Add", ["x", "noise"], ["moved"]),
        helper.make_node("Add", ["moved", "total"], ["y"]),
    ]
    model = graph(nodes, {"one": np.float32(1), "large": np.array([300, 300], np.int64)}, ["batch", 2], ["batch", 2])
    fix_batch.apply(model, 1)
    assert {"RandomNormal", "Expand"} <= set(count(model))


def test_weights_in_few_bits_stay_integers() -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=onnx.TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["wide", "s"], ["d"], axis=1),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    model = graph(nodes, {"s": np.abs(wave(12)) + 0.1}, ["batch", 12], ["batch", 12], opset=21)
    packed = np.arange(72, dtype=np.uint8).tobytes()
    model.graph.initializer.append(helper.make_tensor("w", onnx.TensorProto.INT4, [12, 12], packed, raw=True))
    fix_batch.apply(model, 1)
    assert count(model) == {"Cast": 1, "DequantizeLinear": 1, "MatMul": 1}
    assert {tensor.name: tensor.data_type for tensor in model.graph.initializer}["w"] == onnx.TensorProto.INT4
