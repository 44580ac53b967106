from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper

from tests import tiny
from tests.graph.made import graph
from vitedge import plugins
from vitedge.errors import GateError, UsageError
from vitedge.graph import PassResult
from vitedge.graph._run import chooses, max_abs_err, run_passes


def test_reports_the_error_of_each_pass() -> None:
    model = tiny.tiny_model()
    names = ["strip_metadata", "reorder_gelu", "patch_embed_matmul", "broadcast_bias", "fix_batch"]
    results = run_passes(model, names, {"pixels": tiny.images(1)})
    assert [result.changed for result in results][2:4] == [1, 3]
    assert all(0 <= float(str(result.notes["max_abs_err"])) < 1e-5 for result in results)


@pytest.mark.parametrize("damage", ["answers", "structure"])
def test_names_the_pass_that_broke_the_model(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(model: onnx.ModelProto) -> PassResult:
        if damage == "structure":
            del model.graph.node[0]
            return PassResult(1)
        weight = next(t for t in model.graph.initializer if t.name == "head_bias")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + np.float32(0.01), weight.name))
        return PassResult(1)

    real = plugins.load
    broken = SimpleNamespace(apply=apply, TOLERANCE=1e-5)
    monkeypatch.setattr(plugins, "load", lambda kind, name: broken if name == "broken" else real(kind, name))
    with pytest.raises(GateError, match="graph pass 'broken' after strip_metadata") as error:
        run_passes(tiny.tiny_model(), ["strip_metadata", "broken"], {"pixels": tiny.images(1)})
    assert error.value.exit_code == 3
    assert ("1.0" in error.value.found) == (damage == "answers")


def test_an_unknown_pass_is_a_usage_error_and_changes_nothing() -> None:
    model = tiny.tiny_model()
    before = model.SerializeToString()
    with pytest.raises(UsageError, match="did you mean 'strip_metadata'"):
        run_passes(model, ["strip_metadat"], {"pixels": tiny.images(1)})
    assert model.SerializeToString() == before


def test_the_largest_error_sees_shapes_and_what_is_not_finite() -> None:
    a = [np.zeros((2, 2), np.float32)]
    assert max_abs_err(a, [np.full((2, 2), 0.25, np.float32)]) == 0.25
    assert max_abs_err(a, [np.zeros(4, np.float32)]) == float("inf")
    assert max_abs_err(a, [np.full((2, 2), np.nan, np.float32)]) == float("inf")


@pytest.mark.parametrize(("far", "fails"), [(0.5, False), (4.0, True)])
def test_a_graph_that_chooses_may_choose_otherwise(far: float, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that moves a score by its last bit chooses another value: it is held to a tenth of the answers, and to no less."""
    last_bit = np.float32(2.0**-22)
    nodes = [
        helper.make_node("Add", ["x", "before"], ["scores"]),
        helper.make_node("TopK", ["scores", "one"], ["best", "where"], axis=1),
        helper.make_node("Add", ["x", "payload"], ["values"]),
        helper.make_node("GatherElements", ["values", "where"], ["y"], axis=1),
    ]
    constants = {
        "before": np.array([last_bit, 0, 0, 0], np.float32),
        "one": np.array([1], np.int64),
        "payload": np.array([10, 10 + far, 10, 10], np.float32),
    }
    model = graph(nodes, constants, [1, 4], [1, 1])

    def apply(model: onnx.ModelProto) -> PassResult:
        tensor = next(t for t in model.graph.initializer if t.name == "before")
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([0, last_bit, 0, 0], np.float32), "before"))
        return PassResult(1)

    assert chooses(model) and not chooses(tiny.tiny_model())
    real = plugins.load
    moving = SimpleNamespace(apply=apply, TOLERANCE=1e-5)
    monkeypatch.setattr(plugins, "load", lambda kind, name: moving if name == "moving" else real(kind, name))
    feeds = {"x": np.ones((1, 4), np.float32)}
    if fails:
        with pytest.raises(GateError, match=r"outputs that moved by 4\.00e\+00, more than 1\.1e\+00"):
            run_passes(model, ["moving"], feeds)
    else:
        (result,) = run_passes(model, ["moving"], feeds)
        assert result.notes["max_abs_err"] == 0.5
        with pytest.raises(GateError):
            run_passes(graph(nodes, constants, [1, 4], [1, 1]), ["moving"], feeds, 1e-5)


def test_a_threshold_is_no_choice() -> None:
    """The values of TopK move as little as what they are values of; Scatterbrain goes by no more."""
    top = helper.make_node("TopK", ["x", "two"], ["y", "where"], axis=1)
    assert not chooses(graph([top], {"two": np.array([2], np.int64)}, [1, 4], [1, 2]))
