"""Names and shapes of a model's input and output, read from the file itself so that no engine renames them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from vitedge.artifact import Artifact
from vitedge.errors import InputError
from vitedge.package.contents import Port


def read_ports(artifact: Artifact) -> tuple[Port, Port]:
    """The one input and one output of an ONNX file or OpenVINO IR; a dynamic dimension is given as its name.

    Raises:
        InputError: More or fewer than one of either, or the file cannot be read.
    """
    try:
        inputs, outputs = (_onnx_ports if artifact.format == "onnx" else _openvino_ports)(artifact.path)
    except (OSError, ValueError, KeyError, AttributeError, ElementTree.ParseError) as error:
        raise InputError(
            str(artifact.path), expected=f"a model in {artifact.format} format", found=str(error)[:120], fix="export it again"
        ) from error
    if len(inputs) != 1 or len(outputs) != 1:
        found = f"{len(inputs)} inputs and {len(outputs)} outputs"
        raise InputError(str(artifact.path), expected="one input and one output", found=found, fix="package a classifier")
    return inputs[0], outputs[0]


def _onnx_ports(path: Path) -> tuple[list[Port], list[Port]]:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}

    def port(value: onnx.ValueInfoProto) -> Port:
        sizes = value.type.tensor_type.shape.dim
        return Port(
            name=value.name, shape=tuple(size.dim_value if size.HasField("dim_value") else size.dim_param or "batch" for size in sizes)
        )

    return [port(value) for value in graph.input if value.name not in weights], [port(value) for value in graph.output]


def _openvino_ports(path: Path) -> tuple[list[Port], list[Port]]:
    root = ElementTree.parse(path).getroot()
    layers = {layer.attrib["id"]: layer for layer in root.iter("layer")}
    feeds = {edge.attrib["to-layer"]: (edge.attrib["from-layer"], edge.attrib["from-port"]) for edge in root.iter("edge")}

    def port(layer_id: str, port_id: str | None, fallback: str) -> Port:
        ports = [p for p in layers[layer_id].iterfind("output/port") if port_id in (None, p.attrib["id"])]
        sizes = tuple(int(d.text or -1) for d in ports[0].iterfind("dim"))
        name = ports[0].attrib.get("names", fallback).split(",")[0]
        return Port(name=name, shape=tuple("batch" if size < 0 else size for size in sizes))

    inputs = [port(key, None, layer.attrib["name"]) for key, layer in layers.items() if layer.attrib["type"] == "Parameter"]
    outputs = [port(*feeds[key], layer.attrib["name"]) for key, layer in layers.items() if layer.attrib["type"] == "Result"]
    return inputs, outputs
