"""Where int8 really runs: known files, held to what a session of the runtime counts."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests import tiny
from tests.inspect import made
from tests.runtimes import files
from vitedge.inspect.onnx_file import open_onnx
from vitedge.inspect.placement import Placement, place
from vitedge.inspect.placement_openvino import place_ir
from vitedge.model_file import open_artifact
from vitedge.runtimes import Target, onnxruntime, openvino


def placed(path: Path) -> Placement:
    artifact = open_artifact(path)
    return place(artifact, open_onnx(artifact, 1)[1], 1)


def session_counts(path: Path) -> dict[str, int]:
    return onnxruntime.load(open_artifact(path), Target(onnxruntime.CPU, threads=1, batch_size=1)).facts.node_counts


def test_qdq_around_both_inputs_becomes_int8(tmp_path: Path) -> None:
    path = files.write_qdq(tmp_path / "m.onnx")
    found = placed(path)
    assert found.in_file == {"QuantizeLinear": 2, "DequantizeLinear": 4}
    assert [(row.in_file, row.runs_as) for row in found.products] == [("Q/DQ", "int8")] * 2
    assert found.counts() == session_counts(path)
    # The first product answers in int8 at once, so that only its own input is quantized by a node of its own.
    assert [row.operator for row in found.products] == ["QLinearMatMul", "MatMulIntegerToFloat"]
    assert found.left == {"QuantizeLinear": 1} and [row.quantize_left for row in found.products] == [1, 0]


def test_qdq_that_nothing_fuses_is_left_over(tmp_path: Path) -> None:
    path = files.write_qdq(tmp_path / "m.onnx", quantized_weights=False)
    found = placed(path)
    assert [(row.in_file, row.runs_as, row.operator) for row in found.products] == [("activations only", "float", "MatMul")] * 2
    assert found.counts() == session_counts(path)
    assert sum(found.left.values()) == 4 and [row.quantize_left for row in found.products] == [2, 2]
    assert found.left_elsewhere == 0


def test_dynamic_quantization_is_fused_into_its_product(tmp_path: Path) -> None:
    found = placed(files.write_dynamic(tmp_path / "m.onnx"))
    (row,) = found.products
    assert (row.in_file, row.runs_as, row.quantize_left) == ("dynamic", "int8", 0)
    assert found.in_file == {"DynamicQuantizeLinear": 1} and found.left == {}


def test_a_float_file_has_nothing_quantized(tmp_path: Path) -> None:
    found = placed(made.write_vit(tmp_path / "m.onnx"))
    assert {(row.in_file, row.runs_as) for row in found.products} == {("no", "float")}
    assert (found.in_file, found.left) == ({}, {})


def test_a_vits_products_are_told_apart(tmp_path: Path) -> None:
    root = made.make_build(tmp_path / "build", None)
    rows = {row.layer: row for row in placed(root / "model.int8_static.onnx").products}
    assert {layer for layer, row in rows.items() if row.runs_as == "float"} == {"blocks.0.attn.scores", "blocks.0.attn.values"}
    assert {row.in_file for row in rows.values() if row.runs_as == "int8"} == {"Q/DQ"}
    assert rows["patch_embed.proj"].runs_as == rows["head"].runs_as == "int8"


def test_weights_alone_are_told_apart(tmp_path: Path) -> None:
    path = files.write_qdq(tmp_path / "m.onnx")
    model = onnx.load(path)
    bypass = {"dq0": "x0", "dq1": "x1"}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.input[0] = bypass[node.input[0]]
    keep = [node for node in model.graph.node if not (node.op_type.endswith("Linear") and node.output[0].startswith(("q", "dq")))]
    del model.graph.node[:]
    model.graph.node.extend(keep)
    onnx.save(model, path)
    assert [row.in_file for row in placed(path).products] == ["weights only"] * 2


@pytest.mark.parametrize("int8_constants", [True, False])
def test_an_ir_is_counted_as_a_session_counts_it(tmp_path: Path, int8_constants: bool) -> None:
    artifact = open_artifact(files.write_quantized_ir(tmp_path / "model.xml", int8_constants=int8_constants))
    found = place_ir(artifact, {}, 1)
    wanted = openvino.load(artifact, Target("CPU", threads=1, batch_size=1)).facts.node_counts
    assert found.counts() == wanted
    assert [row.in_file for row in found.products] == ["Q/DQ", "Q/DQ"]
    assert found.in_file == {"FakeQuantize": 2 if int8_constants else 4}


def test_a_float_ir_has_nothing_quantized(tmp_path: Path) -> None:
    core = openvino.import_quietly("openvino")
    core.save_model(core.convert_model(str(tiny.write_tiny_onnx(tmp_path / "m.onnx"))), tmp_path / "model.xml", compress_to_fp16=False)
    found = place_ir(open_artifact(tmp_path / "model.xml"), {"/head/Gemm": "head"}, 1)
    assert {(row.in_file, row.runs_as) for row in found.products} == {("no", "float")}
    assert "head" in {row.layer for row in found.products}
