from __future__ import annotations

import onnx
from onnx import helper

from tests.graph.made import graph, wave
from tests.tiny import tiny_model
from vitedge.graph import strip_metadata


def test_removes_what_the_exporter_adds_and_keeps_the_models_own() -> None:
    model = tiny_model()
    clean = model.ByteSize()
    for node in model.graph.node:
        node.doc_string = "a stack trace"
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File ...")
    model.graph.initializer[0].doc_string = "a parameter"
    model.graph.value_info.append(helper.make_tensor_value_info("tokens", 1, ["batch", 4, 16]))
    model.graph.input[0].doc_string = "pixels"
    model.metadata_props.add(key="pkg.torch.export.graph_signature", value="...")
    model.metadata_props.add(key="names", value="other tools keep class names here")
    model.doc_string = "exported"
    dirty = model.ByteSize()

    result = strip_metadata.apply(model)

    nodes = len(model.graph.node)
    assert result.changed == 2 * nodes + 5
    assert result.notes["bytes_saved"] == dirty - model.ByteSize()
    kept = {entry.key for entry in model.metadata_props}
    assert kept == {"vitedge.preprocessing", "vitedge.labels", "names"}
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert not model.graph.value_info and not model.doc_string
    assert clean < model.ByteSize() < clean + 60  # only the entry `names` is more


def test_reaches_into_branches() -> None:
    inner = helper.make_node("Identity", ["x"], ["z"], name="inner")
    inner.doc_string = "a stack trace"
    branch = helper.make_graph([inner], "branch", [], [helper.make_tensor_value_info("z", 1, [2])])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    model = graph([node], {"yes": wave(1) > -1}, [2], [2])
    model.graph.initializer[0].dims[:] = []
    assert strip_metadata.apply(model).changed == 2
    assert not any(attribute.g.node[0].doc_string for attribute in model.graph.node[0].attribute)
    onnx.checker.check_model(model)
