from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from tests import tiny
from tests.graph.made import graph, optimized, wave
from vitedge.graph import broadcast_bias
from vitedge.graph._run import run_model


def test_keeps_a_fixed_batch_from_turning_products_into_gemm(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    assert optimized(model, tmp_path, batch=1)["Gemm"] == 3  # two of the MLP beside the head: why the pass is there
    assert broadcast_bias.apply(model).changed == 2
    onnx.checker.check_model(model, full_check=True)
    assert optimized(model, tmp_path, batch=1)["Gemm"] == 1
    x = tiny.images(2)
    assert np.abs(run_model(model, {"pixels": x})[0] - tiny.logits(x)).max() < 1e-5


def test_leaves_matrices_and_shared_constants_alone() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Mul", ["sum", "b"], ["y"]),
    ]
    flat = graph(nodes, {"w": wave(4, 4), "b": wave(4)}, ["batch", 4], ["batch", 4])
    assert broadcast_bias.apply(flat).changed == 0
    tokens = graph(nodes, {"w": wave(4, 4), "b": wave(4)}, ["batch", 2, 4], ["batch", 2, 4])
    assert broadcast_bias.apply(tokens).changed == 1
    shapes = {tensor.name: list(tensor.dims) for tensor in tokens.graph.initializer}
    assert shapes == {"w": [4, 4], "b": [4], "b_rank3": [1, 1, 4]}  # the Mul still reads the old one
