"""One layer rounded: against float64 written out here, and as the libraries' own files round it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from tests.guard.made import CHANNEL, HOSTILE, LAYERS, OUTLIER, guard_job, write_hostile
from tests.quantize.made import SCHEMES
from vitedge import plugins
from vitedge.artifact import Artifact
from vitedge.device import QuantizationRules
from vitedge.graph._index import Index
from vitedge.graph._run import run_model
from vitedge.guard import can_guard
from vitedge.guard.clock import Clock
from vitedge.guard.judge import Verdict, compare, cross_entropy
from vitedge.guard.layers import Layer, find_layers, open_float, weight_matrix
from vitedge.guard.rounding import Rounding, Span, round_weight, rounded_product, rounding_of, scale_and_zero, smoothing_factors
from vitedge.guard.sensitivity import Probe
from vitedge.model_file import open_artifact

FLOATS = st.floats(-100, 100, width=32)
MATRICES = st.builds(lambda rows, seed: np.random.default_rng(seed).normal(size=(rows, 3)), st.integers(1, 9), st.integers(0, 2**32 - 1))
RULES = QuantizationRules(reduce_range=False)
GUARDED = [pair for pair in SCHEMES if can_guard(plugins.load("quantize", pair[0]).SCHEMES[pair[1]]())]


@given(MATRICES, st.integers(2, 8), st.sampled_from([None, 2, 4]), st.booleans())
def test_a_weight_moves_by_half_a_step_at_most(normal_KN: np.ndarray, bits: int, group: int | None, per_channel: bool) -> None:
    matrix_KN = np.where(np.abs(normal_KN) < 0.5, 0, normal_KN).astype(np.float32)
    rounded_KN = round_weight(matrix_KN, Rounding(weight_bits=bits, group=group, per_channel=per_channel))
    assert rounded_KN.shape == matrix_KN.shape and rounded_KN.dtype == np.float32
    assert np.all(rounded_KN[matrix_KN == 0] == 0)
    size = group or len(matrix_KN)
    for start in range(0, len(matrix_KN), size):
        part = matrix_KN[start : start + size].astype(np.float64)
        step = np.abs(part).max(axis=0 if per_channel else None, keepdims=True) / (2 ** (bits - 1) - 1)
        assert np.all(np.abs(part - rounded_KN[start : start + size]) <= step / 2 * (1 + 1e-5) + 1e-30)


@given(FLOATS, FLOATS, st.booleans())
def test_zero_is_exact_and_the_range_is_covered(a: float, b: float, symmetric: bool) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = scale_and_zero(Span(np.array([low]), np.array([high])), symmetric)
    assert scale > 0 and 0 <= int(zero) <= 255
    reached = (float(scale) * (0 - int(zero)), float(scale) * (255 - int(zero)))
    assert reached[0] <= min(low, 0) + float(scale) * 0.51 and reached[1] >= max(high, 0) - float(scale) * 0.51


def test_smoothing_is_the_papers_equation_and_changes_no_product() -> None:
    x = np.array([[4.0, -1.0, 0.0], [-16.0, 0.5, 0.0]])
    w = np.array([[0.25, -1.0], [2.0, 0.5], [3.0, 1.0]])
    factors = smoothing_factors(Span.of(x), w, 0.5)
    assert factors == pytest.approx([math.sqrt(16 / 1), math.sqrt(1 / 2), 1.0])
    assert (x / factors) @ (w * factors[:, None]) == pytest.approx(x @ w)


def model_of(node: onnx.NodeProto, shape: list[int], weight: np.ndarray | None) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y", "out")]
    graph = helper.make_graph(
        [node], "one", values[: 2 if weight is None else 1], values[2:], [] if weight is None else [numpy_helper.from_array(weight, "w")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def fake(values: np.ndarray) -> np.ndarray:
    """Asymmetric 8 bits per tensor, in float64."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = np.float32((high - low) / 255)
    zero = np.round(-low / scale)
    return np.asarray(scale * (np.clip(np.round(values / scale) + zero, 0, 255) - zero))


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm transposed", "Conv", "attention"])
def test_a_rounded_product_is_the_product_of_rounded_inputs(kind: str) -> None:
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(6, 8)).astype(np.float32), generator.normal(size=(8, 5)).astype(np.float32)
    feeds, stored, attributes = {"x": x}, w, {}
    operator = kind.split()[0]
    exact = {"x": x, "w": round_weight(w, Rounding())}
    if kind == "Gemm transposed":
        stored, attributes = np.ascontiguousarray(w.T), {"transB": 1}
    elif kind == "Conv":
        feeds = {"x": x.reshape(6, 2, 2, 2)}
        stored, attributes = np.ascontiguousarray(w.T).reshape(5, 2, 2, 2), {"strides": [2, 2]}
    elif kind == "attention":
        operator, feeds = "MatMul", {"x": x, "y": w}
        exact["w"] = fake(w)
    inputs = ["x", "y"] if kind == "attention" else ["x", "w"]
    node = helper.make_node(operator, inputs, ["out"], name="product", **attributes)
    model = model_of(node, list(x.shape), None if kind == "attention" else stored)
    spans = {name: Span.of(value) for name, value in feeds.items()}
    nodes, constants = rounded_product(node, Index(model.graph), spans, Rounding())
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    found = run_model(model, feeds)[0].reshape(6, 5)
    assert found == pytest.approx(fake(exact["x"]) @ exact["w"].astype(np.float64), abs=2e-5)
    assert np.abs(found - x @ w).max() > 1e-3  # it is rounded


def test_rounding_is_read_off_a_schemes_name_and_settings() -> None:
    static = plugins.load("quantize", "onnxruntime").SCHEMES["int8_static"]
    assert rounding_of("onnxruntime.int8_static", static(), RULES) == Rounding()
    arm = QuantizationRules(activation_type="int8", per_channel=False, reduce_range=True)
    assert rounding_of("onnxruntime.int8_static", static(), arm) == Rounding(weight_bits=7, per_channel=False, symmetric=True)
    smooth = plugins.load("quantize", "openvino").SCHEMES["int8_static"](smooth_quant_alpha=0.5)
    assert rounding_of("openvino.int8_static", smooth, RULES) == Rounding(symmetric=True, smooth_alpha=0.5)

    four = plugins.load("quantize", "onnxruntime").SCHEMES["int4_weights"](block_size=16)
    assert rounding_of("onnxruntime.int4_weights", four, RULES) == Rounding(weight_bits=4, group=16, activations=False)
    per_channel = plugins.load("quantize", "openvino").SCHEMES["int4_weights"](group_size=-1)
    assert rounding_of("openvino.int4_weights", per_channel, RULES) == Rounding(weight_bits=4, activations=False)


@pytest.mark.parametrize(("library", "scheme"), GUARDED, ids=[".".join(pair) for pair in GUARDED])
def test_layers_are_those_that_the_file_quantizes(library: str, scheme: str, tmp_path: Path) -> None:
    asked = guard_job(tmp_path, library, scheme, {}, exclude=("/mlp/fc2/*",))
    quantize = plugins.load("quantize", library).quantize
    model, built = open_float(asked.job.source), quantize(asked.job)
    layers = find_layers(model, built, asked.job.config)
    assert [layer.name for layer in layers] == [name for name in LAYERS if "fc2" not in name]
    assert len({layer.weight_sha256 for layer in layers}) == 3 == quantized(built)
    # Their library finds each under its pattern, and leaves it in float.
    config = asked.job.config.model_copy(update={"exclude": (*asked.job.config.exclude, layers[0].exclude, layers[2].exclude)})
    fewer = quantize(replace(asked.job, config=config, folder=tmp_path / "fewer"))
    assert quantized(fewer) == 1 and find_layers(model, fewer, config) == [layers[1]]


def test_products_that_an_ir_computes_in_float_are_no_layers_to_leave_in_float(tmp_path: Path) -> None:
    """Weights alone in integers: both products of attention stay as they are."""
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixels", "axis"], ["rows"], keepdims=0),
            helper.make_node("MatMul", ["rows", "weight"], ["keys"], name="linear"),
            helper.make_node("MatMul", ["rows", "keys"], ["scores"], name="product"),
            helper.make_node("ReduceMean", ["scores", "axis"], ["logits"], keepdims=0),
        ],
        "attention",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    asked = guard_job(tmp_path, "openvino", "int8_weights", {})
    onnx.save(model, tmp_path / "attention.onnx")
    source = open_artifact(tmp_path / "attention.onnx")
    built = plugins.load("quantize", "openvino").quantize(replace(asked.job, source=source))
    assert [layer.name for layer in find_layers(open_float(source), built, asked.job.config)] == ["linear"]


def quantized(artifact: Artifact) -> int:
    return sum(count for kind, count in artifact.notes["node_counts"].items() if kind.startswith("int"))


def test_sqnr_of_the_hostile_layer_is_float64s(tmp_path: Path) -> None:
    source = open_artifact(write_hostile(tmp_path / "model.onnx"))
    asked = guard_job(tmp_path, "onnxruntime", "int8_static", {})
    built = plugins.load("quantize", "onnxruntime").quantize(asked.job)
    model = open_float(source)
    layers = find_layers(model, built, asked.job.config)
    x_BCHW = tiny.images(16)
    clock = Clock(1)
    probe = Probe(source, model, layers, Rounding())
    found = {one.layer.name: one.sqnr_db for one in probe.measure_sqnr(x_BCHW, 8, clock)}
    assert min(found, key=lambda name: found[name]) == HOSTILE and found[HOSTILE] < 10 < 30 < min(
        v for k, v in found.items() if k != HOSTILE
    )
    friendly = Probe(source, model, layers, Rounding(smooth_alpha=0.5))
    assert {one.layer.name: one.sqnr_db for one in friendly.measure_sqnr(x_BCHW, 8, clock)}[HOSTILE] > 30  # what SmoothQuant is for

    weights = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}
    side = tiny.SIZE // tiny.PATCH
    patches = x_BCHW.astype(np.float64).reshape(16, 3, side, tiny.PATCH, side, tiny.PATCH).transpose(0, 2, 4, 1, 3, 5)
    tokens = patches.reshape(16, side * side, -1) @ weights["patch_weight"].reshape(tiny.EMBED, -1).T + weights["patch_bias"]
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights["norm_weight"] + weights["norm_bias"]
    assert np.abs(normed[..., CHANNEL]).max() > OUTLIER
    low, high = min(normed.min(), 0.0), max(normed.max(), 0.0)
    scale, exact = (high - low) / 255, normed[8:] @ weights["fc1_weight"]
    zero = np.round(-low / scale)
    rounded = scale * (np.clip(np.round(normed[8:] / scale) + zero, 0, 255) - zero)
    step = np.abs(weights["fc1_weight"]).max(axis=0) / 127
    noise = exact - rounded @ (np.round(weights["fc1_weight"] / step) * step)
    assert found[HOSTILE] == pytest.approx(10 * math.log10((exact**2).sum() / (noise**2).sum()), abs=0.1)


def test_a_model_with_one_rounded_layer_differs_in_that_layer_alone(tmp_path: Path) -> None:
    source = open_artifact(write_hostile(tmp_path / "model.onnx"))
    asked = guard_job(tmp_path, "onnxruntime", "int8_static", {})
    built = plugins.load("quantize", "onnxruntime").quantize(asked.job)
    model = open_float(source)
    layers = find_layers(model, built, asked.job.config)
    probe = Probe(source, model, layers, Rounding())
    probe.measure_sqnr(tiny.images(8), 8, Clock(1))
    before = model.SerializeToString()
    for layer in layers:
        rounded = probe.with_rounded(layer)
        onnx.checker.check_model(rounded)
        old, new = (Index(one.graph) for one in (model, rounded))
        changed = [n.name for n in rounded.graph.node if n.op_type in ("MatMul", "Gemm", "Conv") and _weight(new, n) != _weight(old, n)]
        assert changed == [layer.name]
    assert model.SerializeToString() == before


def test_a_constant_on_the_left_is_rounded_as_an_activation_is(tmp_path: Path) -> None:
    """Linformer multiplies keys by a learned projection from the left."""
    projection = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixels", "axis"], ["rows"], keepdims=0),
            helper.make_node("MatMul", ["projection", "rows"], ["projected"], name="left"),
            helper.make_node("ReduceMean", ["projected", "axis"], ["logits"], keepdims=0),
        ],
        "left",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(projection, "projection"), numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    probe = Probe(open_artifact(tmp_path / "model.onnx"), model, [Layer("left", "left", "MatMul", "left", "left")], Rounding())
    x_BCHW = tiny.images(8)
    (found,) = probe.measure_sqnr(x_BCHW, 8, Clock(1))

    def rounded(values: np.ndarray) -> np.ndarray:
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        scale = (high - low) / 255
        zero = np.round(-low / scale)
        return scale * (np.clip(np.round(values / scale) + zero, 0, 255) - zero)

    rows = x_BCHW.astype(np.float64).mean(axis=1)
    exact = projection.astype(np.float64) @ rows
    noise = exact - rounded(projection.astype(np.float64)) @ rounded(rows)
    assert found.sqnr_db == pytest.approx(10 * math.log10((exact**2).sum() / (noise**2).sum()), abs=0.3)


def _weight(index: Index, node: onnx.NodeProto) -> Any:
    """Bytes of a product's weight, found by its name in either graph."""
    here = next(one for one in index.producer.values() if one.name == node.name)
    matrix = weight_matrix(index, here)
    return None if matrix is None else matrix.tobytes()


def test_loss_and_paired_drop_are_the_closed_forms() -> None:
    logits = np.array([[2.0, 0.0, -1.0], [1e4, 0.0, 0.0]], np.float32)
    labels = np.array([1, 0])
    expected = math.log(math.exp(2) + 1 + math.exp(-1))
    assert cross_entropy(logits, labels) == pytest.approx([expected, 0.0])
    reference = Verdict(np.array([True] * 8 + [False] * 2), np.zeros(10))
    other = Verdict(np.array([True] * 5 + [False] * 4 + [True]), np.full(10, 0.25))
    change = compare(reference, other)
    assert (change.drop, change.loss) == pytest.approx((20.0, 0.25)) and change.low < 20.0 < change.high
    assert reference.top1 == 80.0
