from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from tests.graph.made import graph, optimized, wave
from vitedge.graph import reorder_gelu

ORDERS = list(itertools.product((False, True), repeat=3))


def exporters_gelu(order: tuple[bool, bool, bool], half: float = 0.5, multiply: bool = False, extra: bool = False) -> onnx.ModelProto:
    """`x * (0.5 * (1 + erf(x / sqrt 2)))`, the inputs of its commutative nodes in any order."""

    def pair(a: str, b: str, swap: bool) -> list[str]:
        return [b, a] if swap else [a, b]

    nodes = [
        helper.make_node("Mul" if multiply else "Div", ["x", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", pair("erf", "one", order[0]), ["plus"]),
        helper.make_node("Mul", pair("half", "plus", order[1]), ["halved"]),
        helper.make_node("Mul", pair("x", "halved", order[2]), ["gelu" if extra else "y"]),
    ]
    if extra:
        nodes.append(helper.make_node("Add", ["gelu", "halved"], ["y"]))
    root = math.sqrt(0.5) if multiply else math.sqrt(2)
    constants = {"root": np.float32(root), "one": np.float32(1), "half": np.float32(half)}
    return graph(nodes, constants, ["batch", 8], ["batch", 8])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("multiply", [False, True])
def test_is_exact_and_lets_the_runtime_fuse(order: tuple[bool, bool, bool], multiply: bool, tmp_path: Path) -> None:
    model = exporters_gelu(order, multiply=multiply)
    x = wave(5, 8) * 4
    before = ReferenceEvaluator(model).run(None, {"x": x})[0]
    assert reorder_gelu.apply(model).changed == 1
    onnx.checker.check_model(model, full_check=True)
    after = ReferenceEvaluator(model).run(None, {"x": x})[0]
    assert np.array_equal(before, after)  # a factor of one half moves without rounding
    exact = 0.5 * x.astype(np.float64) * (1 + np.vectorize(math.erf)(x.astype(np.float64) / math.sqrt(2)))
    assert np.abs(after - exact).max() < 1e-6
    if not multiply:
        assert optimized(model, tmp_path)["Gelu"] == 1


def test_the_exporters_order_is_what_the_runtime_misses(tmp_path: Path) -> None:
    """When this fails, ONNX Runtime has learnt the exporter's order and the pass can go."""
    assert optimized(exporters_gelu(ORDERS[0]), tmp_path)["Gelu"] == 0


def test_leaves_alone_what_is_no_gelu_or_is_needed_twice() -> None:
    for model in (exporters_gelu(ORDERS[0], half=0.25), exporters_gelu(ORDERS[0], extra=True)):
        before = model.SerializeToString()
        assert reorder_gelu.apply(model).changed == 0
        assert model.SerializeToString() == before
