"""Small quantized and reduced-precision files, made by hand so that what must be counted in them is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from vitedge.runtimes._openvino_import import import_quietly

FEATURES, HIDDEN = 3 * tiny.SIZE * tiny.SIZE, 16
SCALE = 1 / 64


def int8_weights() -> tuple[np.ndarray, np.ndarray]:
    """Two layers of int8 weights, (features, hidden) and (hidden, classes)."""
    first = np.round(100 * np.sin(np.arange(FEATURES * HIDDEN))).reshape(FEATURES, HIDDEN)
    second = np.round(100 * np.cos(np.arange(HIDDEN * tiny.CLASSES))).reshape(HIDDEN, tiny.CLASSES)
    return first.astype(np.int8), second.astype(np.int8)


def write_qdq(path: Path, *, quantized_weights: bool = True) -> Path:
    """Two linear layers in QDQ form: both become int8, or, with float weights, neither.

    Args:
        path: Where.
        quantized_weights: False leaves the weights float, so that no engine has an int8 product for them.
    """
    nodes = [helper.make_node("Flatten", ["pixels"], ["x0"])]
    constants = {"scale": np.array(SCALE, np.float32), "zero": np.array(0, np.int8), "zero_u8": np.array(128, np.uint8)}
    for index, weight in enumerate(int8_weights()):
        nodes += [
            helper.make_node("QuantizeLinear", [f"x{index}", "scale", "zero_u8"], [f"q{index}"]),
            helper.make_node("DequantizeLinear", [f"q{index}", "scale", "zero_u8"], [f"dq{index}"]),
        ]
        if quantized_weights:
            constants[f"w{index}_int8"] = weight
            nodes.append(helper.make_node("DequantizeLinear", [f"w{index}_int8", "scale", "zero"], [f"w{index}"]))
        else:
            constants[f"w{index}"] = weight.astype(np.float32) * SCALE
        nodes.append(helper.make_node("MatMul", [f"dq{index}", f"w{index}"], [f"x{index + 1}" if index == 0 else "logits"]))
    return _save(path, nodes, constants)


def write_dynamic(path: Path) -> Path:
    """One linear layer whose input is quantized as it comes: DynamicQuantizeLinear, MatMulInteger, scale."""
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["x"]),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "x_zero", "w_zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["product_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["both_scales"]),
        helper.make_node("Mul", ["product_float", "both_scales"], ["logits"]),
    ]
    weight = np.round(100 * np.sin(np.arange(FEATURES * tiny.CLASSES))).reshape(FEATURES, tiny.CLASSES).astype(np.int8)
    return _save(path, nodes, {"w": weight, "w_zero": np.array(0, np.int8), "w_scale": np.array(SCALE, np.float32)})


def write_half(path: Path) -> Path:
    """One linear layer stored and computed in fp16, float32 at its ends."""
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["x"]),
        helper.make_node("Cast", ["x"], ["x_half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x_half", "w"], ["y_half"]),
        helper.make_node("Cast", ["y_half"], ["logits"], to=TensorProto.FLOAT),
    ]
    weight = np.sin(np.arange(FEATURES * tiny.CLASSES)).reshape(FEATURES, tiny.CLASSES).astype(np.float16)
    return _save(path, nodes, {"w": weight})


def write_quantized_ir(path: Path, *, int8_constants: bool) -> Path:
    """`write_qdq`'s layers with a Gelu between them, as an OpenVINO IR with FakeQuantize.

    Args:
        path: Where.
        int8_constants: Weights stored as int8 and scaled, the way NNCF writes them; else float ones under a FakeQuantize.
    """
    openvino = import_quietly("openvino")
    op = openvino.opset13

    def fake_quantize(value: object, low: float, high: float, levels: int) -> object:
        ends = [op.constant(np.array(end, np.float32)) for end in (low, high, low, high)]
        return op.fake_quantize(value, *ends, levels)

    pixels = op.parameter([-1, 3, tiny.SIZE, tiny.SIZE], np.float32, name="pixels")
    value = op.reshape(pixels, op.constant(np.array([0, -1])), True)
    for index, weight in enumerate(int8_weights()):
        if int8_constants:
            weights = op.multiply(op.convert(op.constant(weight), "f32"), op.constant(np.array(SCALE, np.float32)))
        else:
            weights = fake_quantize(op.constant(weight.astype(np.float32) * SCALE), -2.0, 2.0, 255)
        value = op.matmul(fake_quantize(value, -2.0, 2.0, 256), weights, False, False)
        value = op.gelu(value, "erf") if index == 0 else value
    openvino.save_model(openvino.Model([op.result(value)], [pixels], "quantized"), path, compress_to_fp16=False)
    return path


def _save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, tiny.SIZE, tiny.SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", tiny.CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", tiny.OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
