"""What a bundle's manifest holds, as strict records: a damaged or foreign manifest is refused, not guessed at."""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from vitedge.errors import InputError
from vitedge.preprocess import Preprocessing
from vitedge.schema import Section

MANIFEST = "manifest.json"
LABELS = "labels.txt"
README = "README.txt"
RUNNER = "run.py"
PREPROCESS = "preprocess.py"
EXPECTED: Final = "golden/expected.npy"
SCHEMA_VERSION = 1
MODEL_FILES = {"model.onnx": ("model.onnx",), "model.xml": ("model.xml", "model.bin")}


class FileEntry(Section):
    """One file of the bundle."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ShippedArtifact(Section):
    """The artifact of the build folder that the model is."""

    name: str
    scheme: str
    sha256: str
    parent: str


class Threads(Section):
    """Intra-operator threads: what the profile asks for, and what the figures were measured with."""

    asked: int | None = Field(ge=1)
    measured: int | None = Field(ge=1)


class Isa(Section):
    """The processor the model needs: a family, and of each group at least one instruction set."""

    arch: Literal["x86_64", "aarch64", "any"]
    needed: tuple[tuple[str, ...], ...]
    packaged_on: tuple[str, ...]


class Port(Section):
    """The model's input or output; a name in place of a size is a dynamic dimension."""

    name: str
    shape: tuple[int | str, ...]


class Golden(Section):
    """Pictures, their logits in float32 of shape (pictures, classes), and the tolerance another device must keep.

    Of a file that chooses tokens and rounds, `close` pictures keep `max_abs_err` and all of them `choice_abs_err`; without these
    two, all keep `max_abs_err`.
    """

    source: str
    images: tuple[str, ...] = Field(min_length=1)
    expected: Literal["golden/expected.npy"]
    max_abs_err: float = Field(gt=0, allow_inf_nan=False)
    close: int | None = Field(None, ge=1)
    choice_abs_err: float | None = Field(None, gt=0, allow_inf_nan=False)
    tolerance: str

    @field_validator("images")
    @classmethod
    def _numbered(cls, images: tuple[str, ...]) -> tuple[str, ...]:
        if images != golden_names(len(images)):
            raise ValueError(f"golden images {golden_names(len(images))}")
        return images


class BundleManifest(Section):
    """The whole file."""

    schema_version: Literal[1]
    vitedge: str
    name: str
    recipe: str
    device: str
    artifact: ShippedArtifact
    model: Literal["model.onnx", "model.xml"]
    runtime: Literal["onnxruntime", "openvino"]
    provider: str
    # ONNX Runtime's, with the options they were measured with: the one above, then those that may take what it does not know.
    providers: tuple[tuple[str, dict[str, str]], ...]
    precision: str
    float_precision: Literal["fp32", "bf16", "fp16"]
    threads: Threads
    isa: Isa
    # The line is printed for people to run, so a foreign one must not get through.
    pip: str = Field(pattern=r"^pip install numpy Pillow (onnxruntime|onnxruntime-gpu|openvino)==[0-9][0-9A-Za-z.]*$")
    python: str = Field(pattern=r"^[0-9<>=!~.,* ]+$")  # versions that the engine's package is made for
    tools: dict[str, str]
    preprocessing: dict[str, Any]
    labels: Literal["labels.txt"]
    input: Port
    output: Port
    golden: Golden
    measured: dict[str, Any] | None
    chosen: str
    passed_over: tuple[str, ...]
    remarks: tuple[str, ...]
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _lists_its_files(self) -> BundleManifest:
        wanted = {LABELS, README, RUNNER, PREPROCESS, EXPECTED, *MODEL_FILES[self.model], *self.golden.images}
        if set(self.files) != wanted:
            raise ValueError(f"the files {sorted(wanted)}")
        return self

    @field_validator("preprocessing")
    @classmethod
    def _is_a_contract(cls, fields: dict[str, Any]) -> dict[str, Any]:
        Preprocessing.from_json(json.dumps(fields))
        return fields

    def contract(self) -> Preprocessing:
        """The preprocessing contract."""
        return Preprocessing.from_json(json.dumps(self.preprocessing))

    def to_json(self) -> str:
        """Text of manifest.json, equal for equal manifests."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def golden_names(count: int) -> tuple[str, ...]:
    """Names of the golden pictures, in order."""
    return tuple(f"golden/{index:02d}.png" for index in range(count))


def read_manifest(text: bytes, where: str) -> BundleManifest:
    """Read and validate a bundle's manifest; `where` is the bundle that errors name.

    Raises:
        InputError: Not JSON, of another version, or a field is missing, unknown or wrong.
    """
    try:
        plain = json.loads(text)
        version = plain["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{where}: {MANIFEST}", expected="a bundle's manifest", found=repr(error)[:120], fix="get the bundle again"
        ) from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{where}: {MANIFEST}",
            expected=f"schema_version {SCHEMA_VERSION}",
            found=repr(version)[:40],
            fix="use the vitedge that made the bundle",
        )
    try:
        return BundleManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "files"
        raise InputError(
            f"{where}: {MANIFEST}: {key}",
            expected=first["msg"].removeprefix("Value error, "),
            found=repr(first["input"])[:80],
            fix="get the bundle again",
        ) from error
