"""Which layers a quantized file has that could be left in float, and by which name its library excludes each.

A layer is one matrix product or convolution. It is known by its node's name in the fp32 ONNX file, whatever the
library calls it: OpenVINO splits Gemm and Conv from their bias, and takes scores and softmax into one attention node.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx

from vitedge.artifact import Artifact
from vitedge.graph._index import Index, attribute, constants_to_initializers
from vitedge.inspect.onnx_layers import find_layers as find_products

PRODUCTS = ("MatMul", "Gemm", "Conv")
_MOVES = ("Reshape", "Transpose", "Cast", "Squeeze", "Unsqueeze")
# Of an IR: what only moves or scales a value, what multiplies, and how a Const of integers calls its type.
_IR_MOVES = ("Convert", "Multiply", "Subtract", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "VariadicSplit")
_IR_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention")
_IR_INTEGERS = ("i8", "u8", "i4", "u4", "nf4")


@dataclass(frozen=True)
class Layer:
    """One product that may stay in float.

    Attributes:
        name: Of its node in the fp32 file.
        module: It came from, as `vitedge inspect` names it: `blocks.0.mlp.fc2`, `blocks.0.attn.scores`; else the node's name.
        op: That node's operator.
        exclude: Pattern that the library finds exactly this layer by.
        rounded: Name of the node whose inputs quantization rounds: the layer's own, or for an attention node of
            OpenVINO's that of the scores.
        weight_sha256: As in `quantize._ranges.ProductRange`; empty where both inputs are computed.
    """

    name: str
    module: str
    op: str
    exclude: str
    rounded: str
    weight_sha256: str = ""


def open_float(source: Artifact) -> onnx.ModelProto:
    """The fp32 model, with constants where products are looked for and a name for every node, as quantizers give them."""
    model = onnx.load(source.path)
    constants_to_initializers(model.graph)
    for position, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{position}"
    return model


def find_layers(model: onnx.ModelProto, built: Artifact, config: Any) -> list[Layer]:
    """The layers that a file holds in fewer bits, in the graph's order.

    Args:
        model: What `open_float` gives.
        built: The file made of it with these settings.
        config: The scheme's settings; layers that its `exclude` names are the user's, not the guard's.
    """
    op_types = getattr(config, "op_types", PRODUCTS)
    index, found = Index(model.graph), []
    modules = {product.node: product.layer for product in find_products(model).products}
    rename = _openvino_names(built, index) if built.format == "openvino" else _onnx_names(built)
    for node in model.graph.node:
        # Conv stands apart: as a patch embedding it is turned into the MatMul that it is.
        if node.op_type not in PRODUCTS or (node.op_type not in op_types and node.op_type != "Conv"):
            continue
        named = rename(node)
        if named is None or any(fnmatch.fnmatchcase(named[0], pattern) for pattern in config.exclude):
            continue
        matrix_KN = weight_matrix(index, node)
        if matrix_KN is None and index.constant(node.input[1]) is not None:
            continue  # a stack of constant matrices, which no scheme rounds per output
        sha = "" if matrix_KN is None else hashlib.sha256(np.ascontiguousarray(matrix_KN, "<f4").tobytes()).hexdigest()
        found.append(Layer(node.name, modules[node.name], node.op_type, glob.escape(named[0]), named[1], sha))
    return found


def weight_matrix(index: Index, node: onnx.NodeProto) -> np.ndarray | None:
    """A product's constant weight as a matrix (inputs, outputs); None where it has none, or one of more dimensions."""
    weight = index.constant(node.input[1])
    if weight is None:
        return None
    if node.op_type == "Conv":
        return np.asarray(weight.reshape(len(weight), -1).T)
    if weight.ndim != 2:
        return None
    return np.asarray(weight.T if attribute(node, "transB", 0) else weight)


def _onnx_names(built: Artifact) -> Any:
    """Names of a node in an ONNX file: None where the file still computes it in float."""
    graph = onnx.load(built.path).graph
    index = Index(graph)
    floats = {node.name for node in graph.node if node.op_type in PRODUCTS and not _reads_integers(index, node)}

    def names(node: onnx.NodeProto) -> tuple[str, str] | None:
        # ONNX Runtime's dynamic quantizer writes a Gemm as a MatMul and an Add.
        return None if node.name in floats or f"{node.name}_MatMul" in floats else (node.name, node.name)

    return names


def _reads_integers(index: Index, node: onnx.NodeProto) -> bool:
    """Whether an input was dequantized, seen through what only moves it."""
    for name in node.input[:2]:
        producer = index.producer.get(name)
        while producer is not None and producer.op_type in _MOVES:
            producer = index.producer.get(producer.input[0])
        if producer is not None and producer.op_type == "DequantizeLinear":
            return True
    return False


def _openvino_names(built: Artifact, source: Index) -> Any:
    """Names of a node in an IR: the product's own, its product without bias, or its attention node; None where it computes in float."""
    kinds = _integer_products(ElementTree.parse(built.path).getroot())

    def names(node: onnx.NodeProto) -> tuple[str, str] | None:
        for name in (f"{node.name}/WithoutBiases", node.name):
            if kinds.get(name, "ScaledDotProductAttention") != "ScaledDotProductAttention":
                return name, node.name
        scores = _scores_behind(source, node) if node.name in kinds else None
        return (node.name, scores) if scores else None

    return names


def _integer_products(ir: ElementTree.Element) -> dict[str, str]:
    """Name and type of the products of an IR that read a rounded value or integer weights."""
    layers = {layer.get("id", ""): layer for layer in ir.iter("layer")}
    inputs: dict[str, list[tuple[int, str]]] = {}
    for edge in ir.iter("edge"):
        inputs.setdefault(edge.get("to-layer", ""), []).append((int(edge.get("to-port", 0)), edge.get("from-layer", "")))

    def reads_integers(identity: str) -> bool:
        while layers[identity].get("type") in _IR_MOVES:
            identity = min(inputs[identity])[1]
        data = layers[identity].find("data")
        stored = data.get("element_type", "") if data is not None else ""
        return layers[identity].get("type") == "FakeQuantize" or stored in _IR_INTEGERS

    return {
        layer.get("name", ""): layer.get("type", "")
        for identity, layer in layers.items()
        if layer.get("type") in _IR_PRODUCTS and any(reads_integers(producer) for _, producer in sorted(inputs[identity])[:2])
    }


def _scores_behind(index: Index, node: onnx.NodeProto) -> str | None:
    """Name of the product of queries and keys whose softmax a product of two activations takes."""
    producer = index.producer.get(node.input[0])
    while producer is not None and producer.op_type != "MatMul":
        producer = index.producer.get(producer.input[0]) if producer.input else None
    return producer.name if producer is not None else None
