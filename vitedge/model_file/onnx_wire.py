"""The name of an ONNX file's batch dimension, read off the protobuf wire in microseconds.

A session's load time and memory are measured, so a runtime must not parse a file's weights into objects of
its own just to learn one name. Only the lengths of the other fields are read, and they are jumped over.
Wire format: https://protobuf.dev/programming-guides/encoding/; field numbers: onnx/onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

Buffer = memoryview
_GRAPH, _INPUT, _TYPE, _TENSOR_TYPE, _SHAPE, _DIM, _DIM_PARAM = 7, 11, 2, 1, 2, 1, 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
IMAGE_RANK = 4


def batch_symbol(path: Path) -> str:
    """Name of the first dimension of the first input of rank 4; empty where it is fixed or nameless, or the file is damaged.

    What is wrong with a damaged file is the engine's to say.
    """
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return ""
        with content, memoryview(content) as whole:
            try:
                return _first_symbol(whole)
            except (IndexError, ValueError):
                return ""


def _first_symbol(model: Buffer) -> str:
    for graph in _messages(model, _GRAPH):
        for value in _messages(graph, _INPUT):
            dims = [
                dim
                for kind in _messages(value, _TYPE)
                for tensor in _messages(kind, _TENSOR_TYPE)
                for shape in _messages(tensor, _SHAPE)
                for dim in _messages(shape, _DIM)
            ]
            if len(dims) == IMAGE_RANK:
                return next((bytes(name).decode() for name in _messages(dims[0], _DIM_PARAM)), "")
    return ""


def _messages(buffer: Buffer, wanted: int) -> Iterator[Buffer]:
    """The length-delimited fields of one number in a message.

    Raises:
        IndexError: The message is cut short.
        ValueError: A wire type that ONNX does not use.
    """
    position = 0
    while position < len(buffer):
        key, position = _varint(buffer, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            _, position = _varint(buffer, position)
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        elif wire == _LENGTH:
            length, position = _varint(buffer, position)
            if position + length > len(buffer):
                raise IndexError("a field longer than its message")
            if number == wanted:
                yield buffer[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {wire}")


def _varint(buffer: Buffer, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7
