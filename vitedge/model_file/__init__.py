"""Opens any model file as an artifact: ONNX, OpenVINO IR or a vitedge checkpoint; checks it before an engine does.

An engine that is given the wrong file answers with a page of its own internals, or worse, with numbers.
Files vitedge did not make are welcome: what is asked of them is one batch of images in, one row of logits
per image out. Weights are measured and hashed, not loaded; no engine and no torch is needed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitedge.artifact import Artifact, hash_files
from vitedge.errors import InputError, UsageError
from vitedge.model_file.parts import Header, InputSpec
from vitedge.preprocess import LABELS_KEY, METADATA_KEY, Preprocessing

if TYPE_CHECKING:
    import onnx

__all__ = ["FORMATS", "Header", "InputSpec", "input_spec", "open_artifact", "read_header", "write_contract"]
FORMATS = {".onnx": "onnx", ".xml": "openvino", ".safetensors": "checkpoint"}


def open_artifact(path: Path | str) -> Artifact:
    """Any model file, or a folder with one OpenVINO model, as an artifact.

    Raises:
        UsageError: There is no such file.
        InputError: It is not a model, a part of it is missing or outside its folder, it does not take one
            float32 batch of images and answer one row of logits for each, or its contract is damaged.
    """
    path = _model_path(Path(path))
    header = read_header(path)
    preprocessing = _contract(path, header.preprocessing)
    return Artifact(
        name=path.parent.name if path.name == "model.xml" and path.parent.name.startswith("openvino.") else path.name,
        format=FORMATS[path.suffix],
        scheme=header.scheme,
        files=header.files,
        sha256=hash_files(header.files),
        size_bytes=sum(file.stat().st_size for file in header.files),
        preprocessing=preprocessing,
        labels=_labels(path, header.labels),
        notes=header.notes,
    )


def input_spec(artifact: Artifact) -> InputSpec:
    """Name, shape and layout of a model's input, read from its file; free sides are those of its contract.

    Raises:
        InputError: As `open_artifact`.
    """
    spec = read_header(artifact.path).input
    contract = artifact.contract()
    if contract is None:
        return spec
    sides = {"NCHW": (2, 3), "NHWC": (1, 2)}[spec.layout]
    return replace(spec, shape=tuple(contract.size if side is None and axis in sides else side for axis, side in enumerate(spec.shape)))


def read_header(path: Path) -> Header:
    """What a model file says of itself.

    Raises:
        InputError: As `open_artifact`.
    """
    kind = FORMATS.get(path.suffix)
    if kind == "onnx":
        from vitedge.model_file import onnx_header

        return onnx_header.read(path)
    if kind == "openvino":
        from vitedge.model_file import ir_header

        return ir_header.read(path)
    if kind == "checkpoint":
        from vitedge.model_file import checkpoint_header

        return checkpoint_header.read(path)
    raise InputError(
        str(path), expected=f"a model file ({', '.join(FORMATS)})", found=f"the suffix '{path.suffix}'", fix="name a model file"
    )


def write_contract(model: onnx.ModelProto, preprocessing: Preprocessing, labels: tuple[str, ...]) -> None:
    """Store the preprocessing contract and the class names in a model's metadata, in place of any that are there."""
    wanted = {METADATA_KEY: preprocessing.to_json(), LABELS_KEY: json.dumps(list(labels))}
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key not in wanted}
    del model.metadata_props[:]
    for key, value in {**kept, **wanted}.items():
        model.metadata_props.add(key=key, value=value)


def _model_path(path: Path) -> Path:
    """The file to open; for a folder, the one OpenVINO model in it."""
    if path.is_dir():
        models = sorted(path.glob("*.xml"))
        if len(models) == 1:
            return models[0]
        found = f"a folder with {len(models)} of them"
        raise UsageError(str(path), expected="a model file, or a folder with one OpenVINO .xml", found=found, fix="name the model file")
    if not path.is_file():
        raise UsageError(str(path), expected="a model file", found="no such file", fix="check the path")
    return path


def _contract(path: Path, text: str | None) -> str | None:
    """The contract in its canonical form."""
    if text is None:
        return None
    try:
        return Preprocessing.from_json(text).to_json()
    except ValueError as error:
        raise InputError(str(path), expected="a preprocessing contract in its metadata", found=str(error), fix="export it again") from error


def _labels(path: Path, text: str | None) -> tuple[str, ...]:
    try:
        labels = json.loads(text) if text is not None else []
    except ValueError:
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InputError(str(path), expected="a JSON list of class names in its metadata", found=repr(text)[:80], fix="export it again")
    return tuple(labels)
