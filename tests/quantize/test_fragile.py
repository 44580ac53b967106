"""Which products of two activations stay in float: those of pseudo-inverses and of token merging, in ONNX's graph and in OpenVINO's."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.compress import made, reducing
from tests.quantize.made import job, quantize
from vitedge.compress import nystrom, soft, tome
from vitedge.export import to_onnx
from vitedge.models.build import create
from vitedge.quantize import onnxruntime, openvino
from vitedge.quantize._fragile import Operation, fragile_products

ITERATIONS = 2
# A technique, its settings, and how many of its products stay in float, counted from the equations.
TECHNIQUES: dict[str, tuple[Any, Any, int]] = {
    # Four products an iteration, and the inverse times what landmarks gathered.
    "nystrom": (nystrom, nystrom.Config(landmarks=5, iterations=ITERATIONS), 4 * ITERATIONS + 1),
    # Two products an iteration, the same, and two kernels of differences.
    "soft": (soft, soft.Config(landmarks=5, iterations=ITERATIONS), 2 * ITERATIONS + 1 + 2),
    # Scores that choose, and sums of the chosen.
    "tome": (tome, tome.Config(r=3), 2),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a one-block ViT, whole or with a technique, written once."""

    @functools.cache
    def export(technique: str) -> Path:
        model = create(reducing.arch(False), reducing.SIZE, 4, len(made.LABELS), options={**made.VIT, "depth": 1}).eval()
        if technique in TECHNIQUES:
            module, config, _ = TECHNIQUES[technique]
            model = module.apply(model, config, reducing.context()).model.eval()
        proto = to_onnx(model, reducing.SIZE, 18)
        for position, node in enumerate(proto.graph.node):
            node.name = node.name or f"{node.op_type}_{position}"
        path = tmp_path_factory.mktemp(technique) / "source.onnx"
        onnx.save(proto, path)
        return path

    return export


@pytest.mark.parametrize("technique", ["whole", *TECHNIQUES])
def test_those_of_inverses_and_of_merging_and_no_others(technique: str, exported: Callable[[str], Path]) -> None:
    library = pytest.importorskip("openvino")
    path = exported(technique)
    graph = onnx.load(path).graph
    expected = TECHNIQUES[technique][2] if technique in TECHNIQUES else 0
    found = fragile_products(onnxruntime._operations(graph))
    assert len(found) == len(set(found)) == expected
    weights = {tensor.name for tensor in graph.initializer}
    assert all(not weights & {*node.input} for node in graph.node if node.name in found)
    assert len(fragile_products(openvino._operations(library.convert_model(path)))) == expected


def test_products_with_weights_are_not_asked_about() -> None:
    graph = {
        "in": Operation("Parameter", ()),
        "projected": Operation("MatMul", ("in",)),
        "centred": Operation("Sub", ("projected",)),
        "product": Operation("MatMul", ("centred", "in")),
    }
    assert fragile_products(graph) == ["product"]


def test_a_static_file_rounds_the_products_of_softmax_and_no_step_of_an_inverse(exported: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(exported("nystrom"), tmp_path / "source.onnx")
    asked = job(tmp_path, "onnxruntime", "int8_static", reducing.images(8).numpy(), attention=True)
    graph = onnx.load(quantize(asked, "onnxruntime").path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    unpacked = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights}
    products = [node for node in graph.node if node.op_type == "MatMul" and not (weights | unpacked) & {*node.input}]
    rounded = [node for node in products if all(made_by[name] == "DequantizeLinear" for name in node.input)]
    # Softmax's three scores, and what two of the three multiply; the third is in the inverse.
    assert len(rounded) == 5
    assert len(products) - len(rounded) == TECHNIQUES["nystrom"][2]
