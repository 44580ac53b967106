from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests import tiny
from tests.graph.made import count, graph, wave
from vitedge.graph import patch_embed_matmul
from vitedge.graph._run import run_model


def patch_embed(size: int = 8, channels: int = 3, bias: bool = True, batch: int | str = "batch", **conv: Any) -> onnx.ModelProto:
    """Conv -> Reshape -> Transpose to 5 values a token, patches of 4."""
    settings = {"strides": [4, 4], **conv}
    group = settings.get("group", 1)
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    nodes = [
        helper.make_node("Conv", inputs, ["conv"], name="proj", **settings),
        helper.make_node("Reshape", ["conv", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["y"], perm=[0, 2, 1]),
    ]
    outputs = 6 if group > 1 else 5
    constants = {"w": wave(outputs, channels // group, 4, 4), "b": wave(outputs), "shape": np.array([0, outputs, -1], np.int64)}
    if not bias:
        del constants["b"]
    return graph(nodes, constants, [batch, channels, size, size], [batch, None, outputs])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", ["batch", 3])
def test_equals_the_convolution_in_float64(bias: bool, batch: int | str) -> None:
    model = patch_embed(size=12, bias=bias, batch=batch)
    weights = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    assert patch_embed_matmul.apply(model).changed == 1
    onnx.checker.check_model(model, full_check=True)
    assert count(model)["Conv"] == 0 and [node.name for node in model.graph.node if node.op_type == "MatMul"] == ["proj"]
    x = wave(3, 3, 12, 12)
    expected = np.zeros((3, 9, 5))
    for token in range(9):
        row, column = divmod(token, 3)
        window = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].astype(np.float64)
        expected[:, token] = np.einsum("bcij,ocij->bo", window, weights["w"]) + (weights["b"] if bias else 0)
    assert np.abs(run_model(model, {"x": x})[0] - expected).max() < 1e-5


def test_whole_model_keeps_its_answers() -> None:
    model = tiny.tiny_model()
    assert patch_embed_matmul.apply(model).changed == 1
    x = tiny.images(3)
    assert np.abs(run_model(model, {"pixels": x})[0] - tiny.logits(x)).max() < 1e-5


@pytest.mark.parametrize(
    "change",
    [{"strides": [2, 2]}, {"pads": [1, 1, 1, 1]}, {"dilations": [2, 2]}, {"size": 10}, {"group": 3}, {"auto_pad": "SAME_UPPER"}],
    ids=lambda change: next(iter(change)),
)
def test_leaves_other_convolutions_alone(change: dict[str, Any]) -> None:
    model = patch_embed(**change)
    before = model.SerializeToString()
    assert patch_embed_matmul.apply(model).changed == 0
    assert model.SerializeToString() == before
