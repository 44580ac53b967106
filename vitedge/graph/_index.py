"""Looking things up in an ONNX graph: constants, producers, consumers; and replacing nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


class Index:
    """Lookups over the top level of a graph, true until the graph is changed.

    Attributes:
        producer: Tensor name to the node that makes it.
        consumers: Tensor name to the nodes that read it, once per read.
        outputs: Names of the graph's outputs, which no pass may drop.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        inputs = {value.name for value in graph.input}
        # An initializer that is also an input may be overridden by the caller: it is no constant.
        self._initializers = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}
        self.producer = {name: node for node in graph.node for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer or a Constant node, None where the tensor is computed."""
        if name in self._initializers:
            return np.asarray(numpy_helper.to_array(self._initializers[name]))
        node = self.producer.get(name)
        if node is None or node.op_type != "Constant":
            return None
        value = onnx.helper.get_attribute_value(node.attribute[0])
        return np.asarray(numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value)

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one element, else None."""
        tensor = self._initializers.get(name)
        if tensor is not None and int(np.prod(tensor.dims)) != 1:
            return None
        value = self.constant(name)
        return float(value.reshape(())) if value is not None and value.size == 1 and value.dtype.kind in "fiu" else None

    def only_consumer(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor, if it is of that type and the tensor is no output of the graph."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == op_type and name not in self.outputs else None


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute, or the default."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def replace_nodes(graph: onnx.GraphProto, replacements: dict[str, list[onnx.NodeProto]]) -> None:
    """Put nodes where others stood, in place; order is kept.

    Args:
        graph: Changed in place; nodes held from before are no longer part of it.
        replacements: First output of each node that goes, to the nodes that take its place (none: it is dropped).
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.extend(replacements.get(node.output[0], [node]))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(copies)


def constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes into initializers, in place."""
    index = Index(graph)
    values = {node.output[0]: index.constant(node.output[0]) for node in graph.node if node.op_type == "Constant"}
    known = {name: value for name, value in values.items() if value is not None and value.dtype.kind in "fiub"}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in known.items())
    replace_nodes(graph, {name: [] for name in known})


def drop_unused_initializers(graph: onnx.GraphProto) -> int:
    """Remove initializers that nothing reads; returns how many went."""
    used = {value.name for value in graph.output} | _read_by(graph)
    unused = [index for index, tensor in enumerate(graph.initializer) if tensor.name not in used]
    for index in reversed(unused):
        del graph.initializer[index]
    return len(unused)


def _read_by(graph: onnx.GraphProto) -> set[str]:
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
        for attr in node.attribute:
            for inner in [attr.g] if attr.HasField("g") else list(attr.graphs):
                names |= _read_by(inner)
    return names
