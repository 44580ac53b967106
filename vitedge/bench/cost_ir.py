"""The same count as `cost`, read off an OpenVINO IR's XML; the shapes are stated there."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

from vitedge.bench.cost import Cost, matmul_macs
from vitedge.errors import InputError

_WEIGHT_TYPES = {"f64", "f32", "f16", "bf16", "i8", "u8", "i4", "u4", "nf4"}
_INTEGER_WEIGHTS = {"i8", "u8", "i4", "u4", "nf4"}


def count_ir(path: Path) -> Cost:
    """Count an IR.

    A free batch is written -1 and counted as 1 where it is the first dimension; a free dimension
    anywhere else leaves the multiply-accumulates uncounted.

    Raises:
        InputError: Not an IR, or XML that declares entities.
    """
    content = path.read_bytes()
    # Entities can expand without bound; no IR has any.
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise InputError(str(path), expected="an OpenVINO IR", found="XML with a document type", fix="convert the model again")
    try:
        net = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise InputError(str(path), expected="an OpenVINO IR", found=f"broken XML ({error})", fix="convert the model again") from error
    params = _Graph(net).count_params()
    macs = 0
    for layer in net.iterfind("layers/layer"):
        counted = _layer_macs(layer)
        if counted is None:
            return Cost(params, None, f"a dimension at {layer.get('type')} '{layer.get('name')}' is free")
        macs += counted
    return Cost(params, macs)


def _dims(port: ElementTree.Element) -> tuple[int, ...]:
    return tuple(int(dim.text or "0") for dim in port.iterfind("dim"))


def _closed(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape with a free first dimension taken as 1; None where another is free."""
    closed = tuple(1 if index == 0 and dim == -1 else dim for index, dim in enumerate(shape))
    return None if -1 in closed else closed


def _layer_macs(layer: ElementTree.Element) -> int | None:
    kind = layer.get("type")
    if kind not in ("MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention"):
        return 0
    inputs = [_closed(_dims(port)) for port in layer.iterfind("input/port")]
    outputs = [_closed(_dims(port)) for port in layer.iterfind("output/port")]
    known = [shape for shape in (*inputs, *outputs) if shape is not None]
    if len(known) < len(inputs) + len(outputs):
        return None
    if kind == "MatMul":
        data = layer.find("data")
        left, right = known[:2]
        if data is not None and data.get("transpose_a") == "true":
            left = (*left[:-2], left[-1], left[-2])
        if data is not None and data.get("transpose_b") == "true":
            right = (*right[:-2], right[-1], right[-2])
        return matmul_macs(left, right)
    if kind == "ScaledDotProductAttention":
        query, key, value = known[:3]
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    # Weight (out, in, *kernel), with the groups in front where there are any.
    weight = known[1]
    return math.prod(known[-1]) * math.prod(weight[1:] if kind == "Convolution" else weight[2:])


class _Graph:
    """Layers with their edges, both ways."""

    def __init__(self, net: ElementTree.Element) -> None:
        self.layers = {layer.get("id", ""): layer for layer in net.iterfind("layers/layer")}
        self.first_source: dict[str, str] = {}
        self.users: dict[str, list[tuple[str, int]]] = {}
        for edge in net.iterfind("edges/edge"):
            source, target, port = edge.get("from-layer", ""), edge.get("to-layer", ""), int(edge.get("to-port", "0"))
            if port == 0:
                self.first_source[target] = source
            self.users.setdefault(source, []).append((target, port))

    def kind(self, layer_id: str) -> str:
        return self.layers[layer_id].get("type", "")

    def element_type(self, layer_id: str) -> str:
        """Of a constant; empty for another layer."""
        data = self.layers[layer_id].find("data")
        return data.get("element_type", "") if self.kind(layer_id) == "Const" and data is not None else ""

    def is_unpacking(self, layer_id: str) -> bool:
        """Whether a layer turns integer weights into floats: Convert, then Subtract, then Multiply."""
        if self.element_type(layer_id) in _INTEGER_WEIGHTS:
            return True
        return self.kind(layer_id) in ("Convert", "Subtract", "Multiply") and self.is_unpacking_input(layer_id)

    def is_unpacking_input(self, layer_id: str) -> bool:
        """Whether a layer's first input carries integer weights."""
        return layer_id in self.first_source and self.is_unpacking(self.first_source[layer_id])

    def is_range(self, constant: str) -> bool:
        """Whether a constant is a limit of FakeQuantize, or the scale or zero point of packed weights."""
        for user, port in self.users.get(constant, []):
            kind = self.kind(user)
            if kind == "Convert" and self.is_range(user):
                return True
            if port > 0 and (kind == "FakeQuantize" or (kind in ("Subtract", "Multiply") and self.is_unpacking_input(user))):
                return True
        return False

    def count_params(self) -> int:
        """Elements of all constants that are weights."""
        total = 0
        for layer_id in self.layers:
            data = self.layers[layer_id].find("data")
            if data is None or self.element_type(layer_id) not in _WEIGHT_TYPES:
                continue
            size = math.prod(int(dim) for dim in (data.get("shape") or "").split(",") if dim.strip())
            if size > 1 and not self.is_range(layer_id):
                total += size
        return total
