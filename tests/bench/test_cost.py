"""Weights and multiply-accumulates in closed form, and the same for quantized twins."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from vitedge.bench.cost import Cost, count_cost, count_onnx, matmul_macs
from vitedge.errors import InputError
from vitedge.model_file import open_artifact

TOKENS = (tiny.SIZE // tiny.PATCH) ** 2
PARAMS = sum(value.size for value in tiny.weights().values())
MACS = (
    TOKENS * 3 * tiny.PATCH**2 * tiny.EMBED  # patch embedding
    + 2 * TOKENS * tiny.EMBED * tiny.HIDDEN  # the two layers of the MLP
    + tiny.EMBED * tiny.CLASSES  # head
)


def one_node(
    op: str, inputs: dict[str, tuple[int, ...]], constants: dict[str, np.ndarray], domain: str = "", **attributes: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, [*inputs, *constants], ["out"], domain=domain, **attributes)],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)])


@pytest.mark.parametrize("batch", ["batch", 1, 8])
def test_tiny_model_in_closed_form_whatever_its_batch(batch):
    assert count_onnx(tiny.tiny_model(batch=batch)) == Cost(PARAMS, MACS)


def test_attention_of_two_activations_is_counted():
    model = one_node("MatMul", {"q": (1, 3, 5, 7), "k": (1, 3, 7, 5)}, {})
    assert count_onnx(model) == Cost(0, 3 * 5 * 7 * 5)
    heads, tokens, depth = 3, 5, 8
    shape = (1, heads, tokens, depth)
    assert count_onnx(one_node("Attention", {"q": shape, "k": shape, "v": shape}, {})) == Cost(0, 2 * heads * tokens * tokens * depth)
    flat = (1, tokens, heads * depth)
    packed = one_node("Attention", {"q": flat, "k": flat, "v": flat}, {}, q_num_heads=heads, kv_num_heads=heads)
    assert count_onnx(packed) == Cost(0, 2 * heads * tokens * tokens * depth)


def test_gemm_transposes_and_grouped_convolution():
    gemm = one_node("Gemm", {"x": (1, 7)}, {"w": np.ones((11, 7), np.float32)}, transB=1)
    assert count_onnx(gemm) == Cost(77, 77)
    conv = one_node("Conv", {"x": (1, 6, 8, 8)}, {"w": np.ones((6, 2, 3, 3), np.float32)}, group=3)
    assert count_onnx(conv) == Cost(108, 6 * 6 * 6 * 2 * 9)


def test_integer_twin_counts_weights_and_not_scales():
    model = one_node(
        "MatMulInteger",
        {},
        {},
    )
    model.graph.node[0].input.extend(["x", "w", "x_zero", "w_zero"])
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4, 8]))
    model.graph.input.append(helper.make_tensor_value_info("x_zero", TensorProto.UINT8, []))
    for name, value in {"w": np.ones((8, 16), np.int8), "w_zero": np.zeros(16, np.int8)}.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    assert count_onnx(model) == Cost(128, 4 * 8 * 16)


def test_packed_four_bit_weights_count_what_they_stand_for():
    packed = np.zeros((16, 2, 16), np.uint8)  # 16 outputs, 2 blocks of 32 inputs, two weights a byte
    model = one_node(
        "MatMulNBits", {"x": (1, 5, 64)}, {"w": packed, "scales": np.ones((16, 2), np.float32)}, "com.microsoft", K=64, N=16, bits=4
    )
    assert count_onnx(model) == Cost(64 * 16, 5 * 64 * 16)


def test_macs_are_none_with_a_reason_where_a_shape_is_unknown():
    unknown = one_node("MatMul", {"x": ("a", "b"), "y": ("b", "c")}, {})
    cost = count_onnx(unknown)
    assert cost.macs is None
    assert "MatMul" in cost.reason


@pytest.mark.parametrize(("left", "right"), [((2, 3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((2, 1, 3, 4), (7, 4, 5))])
def test_matmul_macs_follow_numpys_broadcasting(left, right):
    product = np.matmul(np.ones(left), np.ones(right))
    assert matmul_macs(left, right) == product.size * left[-1]


def test_quantized_files_of_onnxruntime_cost_the_same(tmp_path: Path):
    from onnxruntime.quantization import quantize_dynamic

    source = tiny.write_tiny_onnx(tmp_path / "model.onnx")
    for per_channel in (False, True):
        target = tmp_path / f"{per_channel}.onnx"
        quantize_dynamic(source, target, per_channel=per_channel, op_types_to_quantize=["MatMul"])
        assert count_cost(open_artifact(target)) == Cost(PARAMS, MACS)


def test_ir_costs_the_same_as_the_onnx_file(tmp_path: Path):
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(tiny.write_tiny_onnx(tmp_path / "model.onnx"))
    for compressed in (False, True):
        openvino.save_model(model, tmp_path / "ir.xml", compress_to_fp16=compressed)
        assert count_cost(open_artifact(tmp_path / "ir.xml")) == Cost(PARAMS, MACS)


def test_ir_with_entities_is_refused(tmp_path: Path):
    from vitedge.bench.cost_ir import count_ir

    path = tmp_path / "model.xml"
    path.write_text('<!DOCTYPE net [<!ENTITY a "aaaa">]><net>&a;</net>')
    with pytest.raises(InputError, match="document type"):
        count_ir(path)
    path.write_text("<net>")
    with pytest.raises(InputError, match="broken XML"):
        count_ir(path)


def test_checkpoint_has_weights_and_no_graph(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    safetensors.save_file({"a": np.zeros((3, 4), np.float16), "b": np.zeros(5, np.float32)}, path)
    from vitedge.artifact import Artifact

    cost = count_cost(Artifact("model", "checkpoint", "fp32", (path,), "", path.stat().st_size))
    assert cost.params == 17
    assert cost.macs is None
    assert math.isclose(cost.params, 3 * 4 + 5)


def test_a_packed_checkpoint_is_not_counted_by_its_bytes_and_statistics_are_no_weights(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.numpy")
    from vitedge.artifact import Artifact

    path = tmp_path / "model.safetensors"
    tensors = {"bn.weight": np.ones(4, np.float32), "bn.running_mean": np.ones(4, np.float32), "bn.num_batches_tracked": np.array(3)}
    safetensors.save_file(tensors, path)
    assert count_cost(Artifact("model", "checkpoint", "fp32", (path,), "", path.stat().st_size)).params == 4
    safetensors.save_file({**tensors, "layer.packed": np.zeros(100, np.uint8)}, path)
    cost = count_cost(Artifact("model", "checkpoint", "lsq", (path,), "", path.stat().st_size))
    assert cost.params is None and "packed integers" in cost.reason


@pytest.mark.parametrize("op", ["Attention", "MultiHeadAttention"])
def test_fused_attention_is_not_counted_as_nothing(op: str):
    model = one_node(op, {"x": (1, 5, 12), "y": (1, 5, 12), "z": (1, 5, 12)}, {}, "com.microsoft", num_heads=2)
    cost = count_onnx(model)
    assert cost.macs is None and op in cost.reason
