"""The layers of an ONNX classifier: its matrix products, LayerNorms and attention maps, by the module they came from.

Exporters name nodes and products as they please (`node_MatMul_12`), but keep the names of biases and of most weights
(`blocks.0.attn.qkv.bias`). Those give a layer its name, and let a quantized file, whose nodes are others, be laid beside its parent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx

from vitedge.graph._index import Index, attribute
from vitedge.inspect.sources import Tap

INTEGER = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm")
PRODUCTS = ("MatMul", "Gemm", "Conv", "FusedMatMul", "MatMulNBits", "MatMulBnb4", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", *INTEGER)
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_BETWEEN_SCORES_AND_SOFTMAX = (*MOVES, "Mul", "Div", "Add", "Where", "Cast", "QuantizeLinear", "DequantizeLinear")
_BETWEEN_SOFTMAX_AND_VALUES = (*MOVES, "Cast", "Dropout", "QuantizeLinear", "DequantizeLinear")
_MODULE = re.compile(r"(.+?)[._](?:weight|bias)(?:_.*)?")
_STEPS = 12  # of a walk, so that a graph with a loop in it ends


@dataclass(frozen=True)
class Stage:
    """A tensor that holds a product's result, perhaps with its bias, perhaps in another layout."""

    node: str
    tensor: str


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution.

    Attributes:
        layer: The module it came from, where a weight or bias tells it; else the node's name.
        node, op_type: In the file.
        stages: Where its float result can be read, in order: the product, its bias added, moved about.
        biased: Index of the first stage that has the bias in it.
        constants: Weights and bias it reads, quantized or not.
        in_file: `Q/DQ` | `weights only` | `activations only` | `dynamic` | `integer` | `4-bit weights` ... | `no`.
    """

    layer: str
    node: str
    op_type: str
    stages: tuple[Stage, ...]
    biased: int
    constants: tuple[str, ...]
    in_file: str


@dataclass(frozen=True)
class Layers:
    """What was found in one file, each in the order it runs; `attentions` are softmax outputs that a product reads."""

    products: tuple[Product, ...]
    norms: tuple[Tap, ...]
    attentions: tuple[Tap, ...]


def name_nodes(model: onnx.ModelProto) -> None:
    """Give nodes without a name one, in place: type and position, as quantizing does."""
    for position, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{position}"


def find_layers(model: onnx.ModelProto) -> Layers:
    """Read the top level of a graph whose nodes have names."""
    index = Index(model.graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    norms, attentions, block = [], [], ""
    named: dict[str, str] = {}  # products of attention, which have no weights to be named after
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            layer = module_of([_origin(index, constants, name) for name in node.input[1:]]) or node.name
            block = layer.rpartition(".")[0]
            norms.append(Tap(layer, node.name, node.input[0]))
        elif node.op_type == "Softmax":
            reader = _forward(index, node.output[0], _BETWEEN_SOFTMAX_AND_VALUES)
            if reader is None:
                continue  # of a classifier, not of attention
            layer = f"{block}.attn" if block else node.name
            attentions.append(Tap(layer, node.name, node.output[0]))
            named[reader.name] = f"{layer}.values"
            writer = _backward(index, constants, node.input[0], _BETWEEN_SCORES_AND_SOFTMAX)
            if writer is not None:
                named[writer.name] = f"{layer}.scores"
    products = [_product(node, index, constants, named) for node in model.graph.node if node.op_type in PRODUCTS]
    return Layers(tuple(products), tuple(norms), tuple(attentions))


def module_of(names: list[str]) -> str:
    """The module that weights or biases of these names belong to: `a.b` of `a.b.bias_rank3`; empty where none tells."""
    for name in names:
        found = _MODULE.fullmatch(name)
        if found:
            return found.group(1)
    return ""


def _product(node: onnx.NodeProto, index: Index, constants: set[str], named: dict[str, str]) -> Product:
    stages, biased, bias = _stages(node, index, constants)
    candidates = [_origin(index, constants, name) for name in node.input]
    layer = named.get(node.name) or module_of([*candidates, bias]) or node.name
    own = tuple(name for name in dict.fromkeys(candidates[:3]) if name)
    return Product(layer, node.name, node.op_type, tuple(stages), biased, own, _in_file(node, index, constants))


def _stages(node: onnx.NodeProto, index: Index, constants: set[str]) -> tuple[list[Stage], int, str]:
    """Where the result can be read, from which of them on with its bias, and that bias's name where it is added by a node of its own."""
    has_bias = node.op_type in ("Gemm", "Conv") and len(node.input) > 2 and bool(node.input[2])
    stages, biased, bias = [Stage(node.name, node.output[0])], 0, ""
    is_integer = node.op_type in INTEGER
    for _ in range(_STEPS):
        tensor = stages[-1].tensor
        readers = index.consumers.get(tensor, [])
        if tensor in index.outputs or len(readers) != 1:
            break
        reader = readers[0]
        stage = Stage(reader.name, reader.output[0])
        if is_integer and reader.op_type in ("Cast", "Mul", "DequantizeLinear"):
            is_integer = reader.op_type == "Cast"  # the scale makes it the result
            stages = [stage]
        elif reader.op_type in MOVES and reader.input[0] == tensor:
            stages.append(stage)
        elif reader.op_type == "Add" and not has_bias and not bias:
            bias = next((_origin(index, constants, name) for name in reader.input if name != tensor), "")
            if not bias:
                break
            stages.append(stage)
            biased = len(stages) - 1
        else:
            break
    return stages, biased, bias


def _in_file(node: onnx.NodeProto, index: Index, constants: set[str]) -> str:
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):
        return f"{attribute(node, 'bits', 4)}-bit weights"
    if node.op_type in INTEGER:
        writer = index.producer.get(node.input[0])
        return "dynamic" if writer is not None and writer.op_type == "DynamicQuantizeLinear" else "integer"
    sides = [_is_dequantized(index, name) for name in node.input[:2]]
    if all(sides):
        return "Q/DQ"
    if not any(sides):
        return "no"
    quantized = node.input[sides.index(True)]
    return "weights only" if _origin(index, constants, quantized) else "activations only"


def _is_dequantized(index: Index, tensor: str) -> bool:
    for _ in range(_STEPS):
        writer = index.producer.get(tensor)
        if writer is None or writer.op_type not in (*MOVES, "DequantizeLinear"):
            return False
        if writer.op_type == "DequantizeLinear":
            return True
        tensor = writer.input[0]
    return False


def _origin(index: Index, constants: set[str], tensor: str) -> str:
    """The constant a tensor is made of, seen through dequantizing and moving; empty where it is computed from the input."""
    for _ in range(_STEPS):
        if tensor in constants:
            return tensor
        writer = index.producer.get(tensor)
        if writer is None or writer.op_type not in (*MOVES, "DequantizeLinear", "QuantizeLinear", "Cast") or not writer.input:
            return ""
        tensor = writer.input[0]
    return ""


def _forward(index: Index, tensor: str, through: tuple[str, ...]) -> onnx.NodeProto | None:
    """The product that reads a tensor, directly or through nodes of some types."""
    for _ in range(_STEPS):
        readers = index.consumers.get(tensor, [])
        product = next((reader for reader in readers if reader.op_type in PRODUCTS), None)
        if product is not None:
            return product
        onward = next((reader for reader in readers if reader.op_type in through), None)
        if onward is None:
            return None
        tensor = onward.output[0]
    return None


def _backward(index: Index, constants: set[str], tensor: str, through: tuple[str, ...]) -> onnx.NodeProto | None:
    """The product that makes a tensor, directly or through nodes of some types."""
    for _ in range(_STEPS):
        writer = index.producer.get(tensor)
        if writer is None or writer.op_type in PRODUCTS:
            return writer
        if writer.op_type not in through:
            return None
        tensor = next((name for name in writer.input if name and not _origin(index, constants, name)), "")
    return None
