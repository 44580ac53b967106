"""Activation ranges kept beside a checkpoint, so that its static int8 file is built without any images.

A range belongs to the input of one product with a constant weight. It is found again by that weight's
bytes, not by a tensor's name or a node's place: both change with the exporter's version, and a weight
that differs is another model, whose activations have other ranges. Nothing is guessed: a graph whose
products are not exactly those of the file is refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper
from pydantic import Field, ValidationError, model_validator

from vitedge import plugins
from vitedge.artifact import read_json, write_text
from vitedge.errors import InputError
from vitedge.recipe import Recipe, Scheme
from vitedge.schema import Section

Ranges = dict[str, tuple[float, float]]
# Settings of a scheme that decide which ranges there are and how they are read; the others, and the
# device's rules (type, 7 bits or 8), concern what is made of them afterwards.
_DECIDING = ("method", "percentile", "op_types", "attention", "exclude")
_REINSTALL = "reinstall vitedge, or write both files again with `python -m vitedge.models.embed`"


class ProductRange(Section):
    """The range of the activation that one product reads."""

    tensor: str = Field(description="the activation's name when it was measured; for people")
    op: str = Field(description="the product's operator then; for people")
    weight: tuple[int, int] = Field(description="shape of the weight, inputs first")
    weight_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the weight in that shape, little-endian float32")
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_a_range(self) -> ProductRange:
        if self.low > self.high:
            raise ValueError(f"low {self.low} above high {self.high}")
        return self


class Calibration(Section):
    """The images that ranges were read from, as an artifact's notes give them."""

    images: int = Field(ge=1)
    seed: int
    data: str = Field(description="what results call the data set")
    split: Literal["train"]


class StoredRanges(Section):
    """The whole file."""

    schema_version: Literal[1] = 1
    checkpoint_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the checkpoint these belong to")
    made_with: dict[str, Any] = Field(description="what `asked` says of the recipe they were measured by")
    calibration: Calibration
    data_sha256: str = Field(description="identity of the data set's bytes")
    tools: dict[str, str] = Field(description="versions that measured them")
    ranges: tuple[ProductRange, ...] = Field(min_length=1)

    def differences(self, recipe: Recipe, config: Scheme) -> list[str]:
        """`name: stored, asked` for everything a recipe asks that these ranges are not."""
        wanted = asked(recipe, config)
        return [f"{name}: {self.made_with.get(name)}, {wanted[name]}" for name in wanted if self.made_with.get(name) != wanted[name]]

    def notes(self) -> dict[str, Any]:
        """What an artifact's notes say of its calibration."""
        return {"stored": True, **self.calibration.model_dump(mode="json")}

    def match(self, model: onnx.ModelProto, chosen: list[str], where: str) -> Ranges:
        """The range of every activation that a quantizer needs.

        Args:
            model: The float model after the quantizer's graph passes.
            chosen: Names of the nodes to quantize.
            where: What errors name.

        Returns:
            Tensor name to its lowest and highest value, float32 exactly.

        Raises:
            InputError: The model's products are not those of these ranges.
        """
        left: dict[str, list[ProductRange]] = {}
        for stored in self.ranges:
            left.setdefault(stored.weight_sha256, []).append(stored)
        found: Ranges = {}
        for node, weight_KN in _products(model, chosen, where):
            candidates = left.get(_sha256(weight_KN))
            # Equal weights are taken in the graph's order.
            entry = candidates.pop(0) if candidates else None
            if entry is None or found.get(node.input[0], (entry.low, entry.high)) != (entry.low, entry.high):
                what = "no stored range has its weight" if entry is None else f"two stored ranges for '{node.input[0]}'"
                raise _foreign(where, f"{node.op_type} '{node.name}' of weight {weight_KN.shape}: {what}")
            found[node.input[0]] = (entry.low, entry.high)
        unused = [entry.tensor for entries in left.values() for entry in entries]
        if unused:
            raise _foreign(where, f"no product for {len(unused)} of {len(self.ranges)} ranges, such as that of '{unused[0]}'")
        return found


def asked(recipe: Recipe, config: Scheme) -> dict[str, Any]:
    """What a recipe says that decides activation ranges, as plain data: images, how they are read, and which."""
    scheme, calibration = config.model_dump(mode="json"), recipe.quantize.calibration
    return {
        "data": recipe.data.name,
        "images": calibration.images,
        "seed": calibration.seed,
        "preprocessing": json.loads(recipe.contract().to_json()),
        **{name: scheme[name] for name in _DECIDING},
    }


def in_place_of_images(
    name: str, config: Scheme, recipe: Recipe, path: Path | None, checkpoint_sha256: str
) -> tuple[StoredRanges | None, str]:
    """Stored ranges that a scheme takes where there are no calibration images, or None and why.

    Args:
        name: `library.scheme`.
        config: Its settings.
        recipe: The recipe that is built.
        path: The ranges beside the recipe's weights, None where its weights have none.
        checkpoint_sha256: Of those weights.

    Raises:
        InputError: The file is damaged, or belongs to another checkpoint.
    """
    library, _, scheme = name.partition(".")
    if path is None or scheme not in plugins.load("quantize", library).TAKES_RANGES:
        return None, ""
    if recipe.steps:
        return None, "the stored ranges are of the embedded weights, which the recipe's steps change"
    stored = load(path, checkpoint_sha256)
    differences = stored.differences(recipe, config)
    return (None, f"stored ranges differ from what the recipe asks: {'; '.join(differences)}") if differences else (stored, "")


def describe(model: onnx.ModelProto, chosen: list[str], ranges: Ranges) -> list[dict[str, Any]]:
    """The ranges of products with a constant weight as plain data, in the graph's order; what `ProductRange` reads."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [node.name for node in model.graph.node if node.name in chosen and node.op_type != "Conv" and node.input[1] in matrices]
    return [
        {
            "tensor": node.input[0],
            "op": node.op_type,
            "weight": list(weight_KN.shape),
            "weight_sha256": _sha256(weight_KN),
            # The fewest digits that read back as the same float32.
            "low": float(str(np.float32(ranges[node.input[0]][0]))),
            "high": float(str(np.float32(ranges[node.input[0]][1]))),
        }
        for node, weight_KN in _products(model, products, "")
    ]


def write(path: Path, stored: StoredRanges) -> None:
    """Write the file whole or not at all, one range a line."""
    plain = stored.model_dump(mode="json")
    lines = ",\n    ".join(json.dumps(entry) for entry in plain.pop("ranges"))
    head = json.dumps(plain, indent=2).removesuffix("\n}")
    write_text(path, f'{head},\n  "ranges": [\n    {lines}\n  ]\n}}\n')


def load(path: Path, checkpoint_sha256: str) -> StoredRanges:
    """Read the file.

    Args:
        path: The file.
        checkpoint_sha256: Of the checkpoint that it lies beside.

    Raises:
        InputError: Missing, damaged, of another version, or of another checkpoint.
    """
    try:
        stored = StoredRanges.model_validate(read_json(path))
    except InputError as error:
        raise InputError(str(path), expected="activation ranges in JSON", found=error.found, fix=_REINSTALL) from error
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(str(part) for part in first['loc']) or 'the file'}: {first['msg']}"
        raise InputError(str(path), expected="activation ranges of version 1", found=found, fix=_REINSTALL) from error
    if stored.checkpoint_sha256 != checkpoint_sha256:
        raise InputError(
            str(path),
            expected=f"ranges of the checkpoint beside it, {checkpoint_sha256[:12]}",
            found=f"those of {stored.checkpoint_sha256[:12]}",
            fix=_REINSTALL,
        )
    return stored


def _products(model: onnx.ModelProto, chosen: list[str], where: str) -> list[tuple[onnx.NodeProto, np.ndarray]]:
    """The chosen nodes in the graph's order, each with its weight (inputs, outputs).

    Raises:
        InputError: One of them is a convolution or a product of two activations, for which nothing is stored.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    names, found = set(chosen), []
    for node in model.graph.node:
        if node.name not in names:
            continue
        tensor = constants.get(node.input[1])
        if node.op_type not in ("MatMul", "Gemm") or tensor is None or len(tensor.dims) != 2:
            raise _foreign(where, f"{node.op_type} '{node.name}', which is no product with a constant matrix")
        weight = numpy_helper.to_array(tensor)
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        found.append((node, weight.T if transposed else weight))
    return found


def _sha256(weight_KN: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(weight_KN, dtype="<f4").tobytes()).hexdigest()


def _foreign(where: str, found: str) -> InputError:
    return InputError(
        where,
        expected="the products whose activation ranges are stored with the embedded checkpoint",
        found=found,
        fix="calibrate on images instead: give --data, or set VITEDGE_DATA",
    )
