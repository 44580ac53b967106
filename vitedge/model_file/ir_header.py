"""The header of an OpenVINO IR: an .xml file that describes the graph, and a .bin file of weights beside it.

Format: https://docs.openvino.ai/2026/documentation/openvino-ir-format.html. Document type declarations are
refused: no IR has one, and entities declared there can make a parser expand a small file without end.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

from vitedge.errors import InputError
from vitedge.model_file.parts import Header, check_ends, companion, image_input

# Where `openvino.Model.set_rt_info(value, [...])` keeps what is stored with the model.
PREPROCESSING_INFO = ("vitedge", "preprocessing")
LABELS_INFO = ("vitedge", "labels")


class _Builder(ElementTree.TreeBuilder):
    """Builds the tree; stops at a document type declaration."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("a document type declaration")


def read(path: Path) -> Header:
    """Read and check one file.

    Raises:
        InputError: Not an IR, its weights missing or cut short, or not a classifier of images.
    """
    net = _parse(path)
    layers = list(net.iterfind("layers/layer"))
    parameters = [layer for layer in layers if layer.get("type") == "Parameter"]
    results = [layer for layer in layers if layer.get("type") == "Result"]
    check_ends(path, [str(p.get("name")) for p in parameters], {str(r.get("name")): _rank(r) for r in results})
    name, (dtype, shape) = str(parameters[0].get("name")), _type_and_shape(path, parameters[0])
    constants = _constants(path, layers)
    weights = companion(path, path.with_suffix(".bin").name, max((end for _, _, end in constants), default=0))
    return Header(
        files=(path, weights),
        scheme=_scheme(layers, constants),
        input=image_input(path, name, "float32" if dtype == "f32" else dtype, shape),
        preprocessing=_rt_info(net, PREPROCESSING_INFO),
        labels=_rt_info(net, LABELS_INFO),
        notes={"ir_version": net.get("version")},
    )


def _parse(path: Path) -> ElementTree.Element:
    try:
        net = ElementTree.parse(path, parser=ElementTree.XMLParser(target=_Builder())).getroot()
        if net is None or net.tag != "net" or net.find("layers") is None:
            raise ValueError("no <net> with <layers>")
    except (ElementTree.ParseError, ValueError, OSError, LookupError) as error:
        raise InputError(str(path), expected="an OpenVINO IR", found=f"a file that is none ({error})", fix="export it again") from error
    return net


def _rank(layer: ElementTree.Element) -> int | None:
    port = layer.find("input/port")
    return len(port.findall("dim")) if port is not None else None


def _type_and_shape(path: Path, layer: ElementTree.Element) -> tuple[str, tuple[int | None, ...]]:
    """Element type and shape of a Parameter; `?` and intervals such as `1..8` are free."""
    data = layer.find("data")
    sides = [side.strip() for side in (data.get("shape", "") if data is not None else "").split(",") if side.strip()]
    dtype = data.get("element_type", "") if data is not None else ""
    return dtype, tuple(int(side) if side.isdigit() else None for side in sides)


def _constants(path: Path, layers: list[ElementTree.Element]) -> list[tuple[str, int, int]]:
    """Element type, number of elements and end in the .bin of every constant."""
    found = []
    for layer in layers:
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        try:
            sides = [int(side) for side in data.get("shape", "").split(",") if side.strip()]
            found.append((data.get("element_type", ""), math.prod(sides), int(data.get("offset", "")) + int(data.get("size", ""))))
        except ValueError as error:
            raise InputError(
                str(path),
                expected="numbers for where its weights lie",
                found=f"layer '{layer.get('name')}': {error}",
                fix="export it again",
            ) from error
    return found


def _scheme(layers: list[ElementTree.Element], constants: list[tuple[str, int, int]]) -> str:
    counts: dict[str, int] = {}
    for kind, elements, _ in constants:
        counts[kind] = counts.get(kind, 0) + elements
    floats = {kind: counts.get(kind, 0) for kind in ("f32", "f16", "bf16")}
    rounds_activations = any(layer.get("type") == "FakeQuantize" for layer in layers)
    if sum(counts.get(kind, 0) for kind in ("i4", "u4", "nf4")) > sum(floats.values()):
        return "int4" if rounds_activations else "int4_weights"
    if rounds_activations:
        return "int8_static"
    if sum(counts.get(kind, 0) for kind in ("i8", "u8")) > sum(floats.values()):
        return "int8_weights"
    return "fp16" if floats["f16"] + floats["bf16"] > floats["f32"] else "fp32"


def _rt_info(net: ElementTree.Element, path: tuple[str, ...]) -> str | None:
    entry = net.find("/".join(("rt_info", *path)))
    return entry.get("value") if entry is not None else None
