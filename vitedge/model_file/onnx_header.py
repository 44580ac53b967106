"""The header of an ONNX file: inputs, outputs, operators, metadata, and the files its weights are in.

Format: https://github.com/onnx/onnx/blob/main/docs/IR.md and ExternalData.md beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from vitedge.errors import InputError
from vitedge.model_file.parts import Header, check_ends, companion, image_input
from vitedge.preprocess import LABELS_KEY, METADATA_KEY

_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger"}
_NIBBLES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def read(path: Path) -> Header:
    """Read and check one file, without loading weights that are kept outside it.

    Raises:
        InputError: Not ONNX, damaged, its weights missing or outside its folder, or not a classifier of images.
    """
    model = _parse(path)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    check_ends(path, [value.name for value in inputs], {value.name: _rank(value) for value in graph.output})
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return Header(
        files=(path, *_external_files(path, model)),
        scheme=_scheme(model),
        input=image_input(path, inputs[0].name, _dtype(inputs[0]), _shape(inputs[0])),
        preprocessing=metadata.get(METADATA_KEY),
        labels=metadata.get(LABELS_KEY),
        notes={"opset": _opset(model), "producer": f"{model.producer_name} {model.producer_version}".strip()},
    )


def _parse(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        found = f"a file that cannot be read as one ({error})"
        raise InputError(str(path), expected="an ONNX model", found=found, fix="export it again") from error
    # Protobuf reads many a file that is something else, an empty one too, as a message without fields.
    if not model.graph.node or not model.opset_import:
        raise InputError(str(path), expected="an ONNX model", found="a file without a graph or an opset", fix="export it again")
    return model


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _rank(value: onnx.ValueInfoProto) -> int | None:
    return len(value.type.tensor_type.shape.dim) if value.type.tensor_type.HasField("shape") else None


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)


def _dtype(value: onnx.ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value"))
    kind = value.type.tensor_type.elem_type
    return "float32" if kind == onnx.TensorProto.FLOAT else str(onnx.TensorProto.DataType.Name(kind)).lower()


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and the ones inside its If and Loop nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for inner in attribute.graphs:
                    yield from _graphs(inner)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that may be kept outside: weights, and constants of nodes."""
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.TENSORS:
                yield from attribute.tensors


def _external_files(path: Path, model: onnx.ModelProto) -> tuple[Path, ...]:
    """The files beside it that hold its weights, each checked to be there, whole, and inside the folder."""
    needed: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        try:
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        except ValueError as error:
            raise InputError(str(path), expected="numbers for where its weights lie", found=str(error), fix="export it again") from error
        name = entries.get("location", "")
        needed[name] = max(end, needed.get(name, 0))
    return tuple(companion(path, name, size) for name, size in sorted(needed.items()))


def _scheme(model: onnx.ModelProto) -> str:
    operators = {node.op_type for node in _nodes(model)}
    bits = {
        attribute.i for node in _nodes(model) if node.op_type == "MatMulNBits" for attribute in node.attribute if attribute.name == "bits"
    }
    types = [(tensor.data_type, _elements(tensor)) for tensor in _tensors(model)]
    if 4 in bits or ("DequantizeLinear" in operators and any(kind in _NIBBLES for kind, _ in types)):
        return "int4" if "QuantizeLinear" in operators or operators & _DYNAMIC else "int4_weights"
    if operators & _DYNAMIC:
        return "int8_dynamic"
    if "QuantizeLinear" in operators or any(name.startswith("QLinear") or name == "QGemm" for name in operators):
        return "int8_static"
    if bits or "DequantizeLinear" in operators:
        return "int8_weights"
    halves = sum(count for kind, count in types if kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16))
    wholes = sum(count for kind, count in types if kind == onnx.TensorProto.FLOAT)
    return "fp16" if halves > wholes else "fp32"


def _elements(tensor: onnx.TensorProto) -> int:
    count = 1
    for side in tensor.dims:
        count *= side
    return count
