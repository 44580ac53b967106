from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from tests.graph.made import graph, wave
from tests.quantize.made import initializers, job, quantize
from vitedge.artifact import Artifact
from vitedge.bench.rows import choose_uses
from vitedge.device import RuntimeUse
from vitedge.graph._run import run_model
from vitedge.model_file import open_artifact
from vitedge.quantize._alone import logits
from vitedge.quantize._onnxruntime_weights import Blocks, Int4Weights, Int8Weights, round_to_blocks, store_weights, takes
from vitedge.runtimes import Target
from vitedge.runtimes import onnxruntime as engine

SCHEMES = ("int8_weights", "int4_weights")


def dequantized(blocks: Blocks, bits: int, inputs: int) -> np.ndarray:
    """The matrix that blocks stand for, float64 (inputs, outputs), decoded value by value."""
    outputs, groups, _ = blocks.packed_NGS.shape

    def code(row: np.ndarray, position: int) -> int:
        return int(row[position]) if bits == 8 else int(row[position // 2]) >> 4 * (position % 2) & 15

    matrix = np.zeros((inputs, outputs))
    size = blocks.packed_NGS.shape[2] * 8 // bits
    for n in range(outputs):
        for k in range(inputs):
            g = k // size
            zero = 2 ** (bits - 1) if blocks.zero_points is None else code(blocks.zero_points[n], g)
            matrix[k, n] = float(blocks.scales_NG[n, g]) * (code(blocks.packed_NGS[n, g], k % size) - zero)
    assert groups == -(-inputs // size)
    return matrix


def stored(path: Path, name: str, bits: int) -> Blocks:
    """A matrix of a file, as written."""
    made = initializers(path)
    return Blocks(made[f"{name}_q{bits}"], made[f"{name}_scales"], made.get(f"{name}_zero_points"))


matrices = arrays.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=st.floats(-4, 4, width=32))


@settings(max_examples=60, deadline=None)
@given(weight_KN=matrices, bits=st.sampled_from([4, 8]), symmetric=st.booleans())
def test_every_weight_is_within_half_a_step_and_zero_is_exact(weight_KN: np.ndarray, bits: int, symmetric: bool) -> None:
    blocks = round_to_blocks(weight_KN, bits, 16, symmetric)
    found = dequantized(blocks, bits, len(weight_KN))
    step = np.repeat(np.abs(blocks.scales_NG.T.astype(np.float64)), 16, axis=0)[: len(weight_KN)]
    # Symmetric codes reach one step farther on the side of the largest weight: a weight as large on the other side is one step off.
    bound = step if symmetric else step / 2
    assert (np.abs(found - weight_KN) <= bound * (1 + 1e-4) + 1e-30).all()
    assert not found[weight_KN == 0].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_librarys_own_kernel(bits: int, symmetric: bool) -> None:
    from onnxruntime.capi import _pybind_state as library

    inputs, outputs, size = 128, 6, 32
    weight_KN = (wave(inputs, outputs) * np.linspace(0.1, 3, outputs) + np.linspace(-1, 1, outputs)).astype(np.float32)
    expected = (
        np.zeros((outputs, inputs // size, size * bits // 8), np.uint8),
        np.zeros((outputs, inputs // size), np.float32),
        np.zeros((outputs, inputs // size * bits // 8), np.uint8),
    )
    kernel = library.quantize_matmul_4bits if bits == 4 else library.quantize_matmul_8bits
    kernel(expected[0], weight_KN, expected[1], expected[2], size, outputs, inputs, symmetric)
    found = round_to_blocks(weight_KN, bits, size, symmetric)
    np.testing.assert_array_equal(found.packed_NGS, expected[0])
    np.testing.assert_array_equal(found.scales_NG, expected[1])
    if symmetric:
        assert found.zero_points is None
    else:
        np.testing.assert_array_equal(found.zero_points, expected[2])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_engine_answers_what_the_stored_weights_give_in_float64(
    scheme: str, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = quantize(job(tmp_path, "onnxruntime", scheme, symmetric=symmetric, block_size=16), "onnxruntime")
    bits = 8 if scheme == "int8_weights" else 4
    rounded = dict(tiny.weights())
    for name in ("fc1_weight", "fc2_weight", "head_weight"):
        rounded[name] = dequantized(stored(artifact.path, name, bits), bits, len(rounded[name]))
    patches = dequantized(stored(artifact.path, "patches_matrix", bits), bits, 3 * tiny.PATCH**2)
    rounded["patch_weight"] = patches.T.reshape(rounded["patch_weight"].shape)
    x_BCHW = tiny.images(8)
    before = tiny.logits(x_BCHW)
    monkeypatch.setattr(tiny, "weights", lambda: rounded)
    expected = tiny.logits(x_BCHW)
    assert np.abs(expected - before).max() > 1e-4  # the weights are rounded
    np.testing.assert_allclose(logits(artifact, x_BCHW, threads=1), expected, atol=2e-5)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize(job(tmp_path_factory.mktemp("int4"), "onnxruntime", "int4_weights"), "onnxruntime")


def test_facts_tell_packed_weights_from_the_arithmetic(int4: Artifact, tmp_path: Path) -> None:
    facts = engine.load(int4, Target(engine.CPU)).facts
    assert (facts.precision, facts.float_precision) == ("fp32", "fp32")
    assert facts.node_counts == {"int8": 0, "float": 0, "quantize_left": 0, "int4_weights": 4}
    rounding = quantize(job(tmp_path, "onnxruntime", "int4_weights", arithmetic="int8"), "onnxruntime")
    facts = engine.load(rounding, Target(engine.CPU)).facts
    assert (facts.precision, facts.float_precision) == ("int8", "fp32")
    assert facts.node_counts["int4_weights"] == 4
    model = onnx.load(rounding.path)
    levels = [attribute.i for node in model.graph.node for attribute in node.attribute if attribute.name == "accuracy_level"]
    assert levels == [4] * 4


def test_where_the_bytes_went(int4: Artifact) -> None:
    found = int4.notes["bytes"]
    shapes = [(3 * tiny.PATCH**2, tiny.EMBED), (tiny.EMBED, tiny.HIDDEN), (tiny.HIDDEN, tiny.EMBED), (tiny.EMBED, tiny.CLASSES)]
    blocks = [(-(-inputs // 32), outputs) for inputs, outputs in shapes]
    assert found["packed_bytes"] == sum(groups * outputs * 32 // 2 for groups, outputs in blocks)
    assert found["padding_bytes"] == found["packed_bytes"] - sum(inputs * outputs // 2 for inputs, outputs in shapes)
    assert found["scale_bytes"] == sum(groups * outputs * 4 + outputs * -(-groups // 2) for groups, outputs in blocks)
    kept = {name: weight for name, weight in tiny.weights().items() if weight.ndim == 1}
    assert found["float_bytes"] == sum(weight.nbytes for weight in kept.values()) + 3 * 4  # and the three constants of GELU
    assert found["largest_in_float"][0] == {"tensor": "fc1_bias", "bytes": 4 * tiny.HIDDEN}


def test_it_runs_in_its_own_library_with_the_last_float_precision(int4: Artifact) -> None:
    uses = [
        (RuntimeUse(runtime="onnxruntime", provider=engine.CPU), "fp32", ""),
        (RuntimeUse(runtime="openvino", provider="CPU", precisions=("fp32", "bf16")), "bf16", ""),
    ]
    assert choose_uses(int4, uses) == uses[:1]


def test_a_transposed_gemm_and_a_matrix_used_twice() -> None:
    weight_NK, bias = wave(16, 16), wave(16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="second"),
        helper.make_node("Gemm", ["b", "w", "bias"], ["y"], name="last", transB=1),
    ]
    model = graph(nodes, {"w": weight_NK, "bias": bias}, [3, 16], [3, 16])
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    assert all(takes(node, constants) for node in model.graph.node)
    store_weights(model, ["first", "second", "last"], Int8Weights(block_size=16))
    onnx.checker.check_model(model)
    names = sorted(tensor.name for tensor in model.graph.initializer)
    assert names == ["bias", "w_q8", "w_scales", "w_transposed_q8", "w_transposed_scales"]
    first, last = (dequantized(round_to_blocks(weight, 8, 16, symmetric=True), 8, 16) for weight in (weight_NK, weight_NK.T))
    x = wave(3, 16)
    np.testing.assert_allclose(run_model(model, {"x": x})[0], x @ first @ first @ last + bias, atol=1e-4)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5), (4, 4)),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), (4, 4)),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (2, 4, 4)),
        (helper.make_node("MatMul", ["w", "x"], ["y"]), (4, 4)),
    ],
    ids=["scaled", "transposed input", "batched", "two activations"],
)
def test_what_the_operator_has_no_form_for_stays_float(node: onnx.NodeProto, shape: tuple[int, ...]) -> None:
    assert not takes(node, {"w": numpy_helper.from_array(wave(*shape), "w")})


def test_blocks_written_as_dequantize_linear_are_counted_as_what_the_engine_makes_of_them(tmp_path: Path) -> None:
    """ONNX Runtime turns DequantizeLinear by blocks and MatMul into MatMulNBits, and lets that multiply in int8."""
    inputs = 3 * tiny.SIZE * tiny.SIZE
    codes = np.arange(inputs * 4).reshape(inputs, 4) % 16 - 8
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["x"]),
        helper.make_node("DequantizeLinear", ["q", "scales"], ["w"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "blocks",
            [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, tiny.SIZE, tiny.SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
            [
                helper.make_tensor("q", TensorProto.INT4, [inputs, 4], codes.flatten().tolist()),
                numpy_helper.from_array(np.full((inputs // 32, 4), 0.05, np.float32), "scales"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "m.onnx")
    artifact = open_artifact(tmp_path / "m.onnx")
    assert artifact.scheme == "int4_weights"
    session = engine.load(artifact, Target(engine.CPU))
    assert session.facts.node_counts == {"int8": 0, "float": 0, "quantize_left": 0, "int4_weights": 1}
    assert session.facts.precision == "int8"
    x_BCHW = tiny.images(3)
    error = np.abs(session(x_BCHW) - x_BCHW.reshape(3, -1).astype(np.float64) @ (codes * 0.05)).max()
    assert error > 1e-3  # in fp32 it would be 1e-6


def test_four_bits_are_coarser_than_eight_and_smaller() -> None:
    weight_KN = wave(64, 8)
    errors = {}
    for config in (Int8Weights(block_size=32), Int4Weights()):
        blocks = round_to_blocks(weight_KN, config.bits, config.block_size, config.symmetric)
        errors[config.bits] = np.abs(dequantized(blocks, config.bits, 64) - weight_KN).max()
        assert blocks.packed_NGS.nbytes == 64 * 8 * config.bits // 8
    assert errors[8] * 8 < errors[4] < 0.1
