"""Remove what the exporter writes for its own debugging, so that a file's size is its weights' size.

torch's exporter stores a stack trace, a module path and shape records with every node: 0.6 MB of a
DeiT-Ti. Metadata of the model itself stays (`vitedge.*`, and what other tools keep there, such as
class names), except the exporter's own `pkg.*` keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from vitedge.graph import PassResult

# Without recorded shapes the runtime may fuse differently: rounding, no more.
TOLERANCE = 1e-6
_EXPORTERS_OWN = "pkg."


def apply(model: onnx.ModelProto) -> PassResult:
    """Drop doc strings, node and tensor metadata, and recorded shapes of inner tensors, in place.

    Returns:
        How many entries went, and `bytes_saved` in the notes.
    """
    before = model.ByteSize()
    changed = 0
    for holder in _holders(model):
        for name in ("doc_string", "metadata_props", "value_info"):
            content = getattr(holder, name, None)
            if content:
                changed += 1 if isinstance(content, str) else len(content)
                holder.ClearField(name)
    kept = [prop for prop in model.metadata_props if not prop.key.startswith(_EXPORTERS_OWN)]
    changed += len(model.metadata_props) - len(kept)
    kept = [(prop.key, prop.value) for prop in kept]
    model.ClearField("metadata_props")
    for key, value in kept:
        model.metadata_props.add(key=key, value=value)
    if model.doc_string:
        model.ClearField("doc_string")
        changed += 1
    return PassResult(changed, {"bytes_saved": before - model.ByteSize()})


def _holders(model: onnx.ModelProto) -> Iterator[Any]:
    """Every part of a model but the model itself that can carry metadata, subgraphs included."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield function
        for node in function.node:
            yield from _of_node(node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[Any]:
    yield graph
    yield from graph.input
    yield from graph.output
    yield from graph.initializer
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: onnx.NodeProto) -> Iterator[Any]:
    yield node
    for attribute in node.attribute:
        yield attribute
        if attribute.HasField("g"):
            yield from _of_graph(attribute.g)
        for graph in attribute.graphs:
            yield from _of_graph(graph)
