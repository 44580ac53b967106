"""What every graph pass must hold to; a new file in `vitedge/graph/` is tested by being there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from tests.graph.made import wave
from vitedge import plugins
from vitedge.graph._run import run_model, run_passes

PASSES = plugins.names("graph")


def untidy_model() -> onnx.ModelProto:
    """One block in which there is something to do for every pass that the tiny model gives nothing: notes of the exporter, GELU in its
    order of factors, a matrix held as it is and transposed, a stored one turned in the graph, and 8-bit weights that fit into 4.
    """
    weight, turned = wave(16, 16), wave(16, 16) * 0.5
    integers = (np.arange(256).reshape(16, 16) % 15 - 7).astype(np.int8)
    constants = {
        "w": weight, "w_turned": np.ascontiguousarray(weight.T), "v": turned, "half": np.float32(0.5), "one": np.float32(1),
        "root": np.float32(np.sqrt(2)), "q": integers, "q_scale": np.full(16, 0.05, np.float32), "q_zero": np.zeros(16, np.int8),
        "head": wave(16, 4),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["pixels", "patch"], ["patched"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Reshape", ["patched", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1], doc_string="File model.py, line 1"),
        helper.make_node("MatMul", ["tokens", "w"], ["a"]),
        helper.make_node("Div", ["a", "root"], ["a_root"]),
        helper.make_node("Erf", ["a_root"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["erf_one"]),
        helper.make_node("Mul", ["half", "erf_one"], ["factor"]),
        helper.make_node("Mul", ["a", "factor"], ["gelu"]),
        helper.make_node("MatMul", ["gelu", "w_turned"], ["b"]),
        helper.make_node("Transpose", ["v"], ["v_turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["b", "v_turned"], ["c"]),
        helper.make_node("DequantizeLinear", ["q", "q_scale", "q_zero"], ["q_float"], axis=1),
        helper.make_node("MatMul", ["c", "q_float"], ["d"]),
        helper.make_node("ReduceMean", ["d", "middle"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "head"], ["logits"]),
    ]
    side = tiny.SIZE // 4
    constants |= {"patch": wave(16, 3, 4, 4) * 0.1, "flat": np.array([0, 16, side * side], np.int64), "middle": np.array([1], np.int64)}
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "untidy",
            [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, tiny.SIZE, tiny.SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    made.metadata_props.add(key="vitedge.kept", value="a contract")
    return made


MODELS = {"tiny": tiny.tiny_model, "untidy": untidy_model}


@pytest.mark.parametrize("name", PASSES)
def test_keeps_the_answers_and_is_done_after_one_application(name: str) -> None:
    module, x = plugins.load("graph", name), tiny.images(1)
    assert module.TOLERANCE <= 1e-3
    changed = 0
    for make in MODELS.values():
        model = make()
        expected_BC = run_model(model, {"pixels": x})[0]
        (result,) = run_passes(model, [name], {"pixels": x})
        changed += result.changed
        onnx.checker.check_model(model, full_check=True)
        assert np.abs(run_model(model, {"pixels": x})[0] - expected_BC).max() < 1e-5 * max(1.0, np.abs(expected_BC).max())
        once = model.SerializeToString(deterministic=True)
        assert module.apply(model).changed == 0
        assert model.SerializeToString(deterministic=True) == once
    assert changed, "neither model gives it anything to do: put it into untidy_model"


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("name", PASSES)
def test_keeps_the_contract_and_the_ends(name: str, make: Callable[[], onnx.ModelProto]) -> None:
    model = make()
    before = {entry.key: entry.value for entry in model.metadata_props}
    plugins.load("graph", name).apply(model)
    assert before and {entry.key: entry.value for entry in model.metadata_props} == before
    assert [value.name for value in model.graph.input] == ["pixels"]
    assert [value.name for value in model.graph.output] == ["logits"]


def test_no_pass_needs_an_engine_to_be_imported() -> None:
    code = "import sys; from vitedge import plugins; [plugins.load('graph', n) for n in plugins.names('graph')]; " + (
        "sys.exit(bool({'torch', 'onnxruntime', 'openvino', 'nncf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
