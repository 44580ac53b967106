"""What the readers of the formats share: the record they fill, and the checks on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitedge.errors import InputError

IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class InputSpec:
    """What a model takes: one float32 batch of images.

    Attributes:
        name: Of the input in the file.
        shape: Rank 4; None where a dimension is free.
        layout: `NCHW` or `NHWC`.
    """

    name: str
    shape: tuple[int | None, ...]
    layout: str

    @property
    def batch_size(self) -> int | None:
        """The fixed batch, None where it is free."""
        return self.shape[0]

    @property
    def height_width(self) -> tuple[int | None, int | None]:
        """Of the images, pixels; None where free."""
        return (self.shape[2], self.shape[3]) if self.layout == "NCHW" else (self.shape[1], self.shape[2])


@dataclass(frozen=True)
class Header:
    """What a reader found in a file.

    Attributes:
        files: The file and whatever it needs beside it.
        scheme: `fp32`, `fp16`, `int8_dynamic`, `int8_static`, `int8_weights`, `int4_weights` or `int4`: guessed from the operators and
            from the types of the weights, since a file does not say. What really runs in which type is the session's to tell.
        input: What the model takes.
        preprocessing: The contract's JSON, None where the file carries none.
        labels: JSON list of class names, None where the file carries none.
        notes: What else the file says of itself.
    """

    files: tuple[Path, ...]
    scheme: str
    input: InputSpec
    preprocessing: str | None
    labels: str | None
    notes: dict[str, Any]


def image_input(where: Path, name: str, dtype: str, shape: tuple[int | None, ...]) -> InputSpec:
    """The input of a model, if it takes images.

    A free channel dimension counts as three: Hugging Face's exporters leave all four dimensions free.

    Raises:
        InputError: Not float32, not of rank 4, or not of three channels.
    """
    if dtype == "float32" and len(shape) == 4:
        if shape[1] == IMAGE_CHANNELS or (shape[1] is None and shape[3] != IMAGE_CHANNELS):
            return InputSpec(name, shape, "NCHW")
        if shape[3] == IMAGE_CHANNELS:
            return InputSpec(name, shape, "NHWC")
    raise InputError(
        str(where),
        expected="one float32 input of rank 4 with 3 channels (batch, 3, height, width)",
        found=f"input '{name}' of {dtype}, rank {len(shape)}: {show(shape)}",
        fix="export the model so that it takes a batch of images",
    )


def check_ends(where: Path, inputs: list[str], outputs: dict[str, int | None]) -> None:
    """Refuse a model that does not take one thing and answer one row per image.

    Args:
        where: The model file.
        inputs: Names.
        outputs: Name to rank; None where the file does not say, which the engine will.

    Raises:
        InputError: Not one input, or not one output of rank 2.
    """
    if len(inputs) == 1 and len(outputs) == 1 and next(iter(outputs.values())) in (2, None):
        return
    ranks = [f"'{name}' of rank {'unknown' if rank is None else rank}" for name, rank in outputs.items()]
    raise InputError(
        str(where),
        expected="one image input and one output of rank 2 (batch, classes)",
        found=f"{len(inputs)} inputs ({', '.join(inputs[:4]) or 'none'}) and {len(outputs)} outputs ({', '.join(ranks[:4]) or 'none'})",
        fix="export the model so that it takes a batch of images and answers logits",
    )


def companion(where: Path, name: str, size: int) -> Path:
    """The file of weights that a model needs beside it.

    Args:
        where: The model file.
        name: As written in it.
        size: Bytes it must have at least.

    Raises:
        InputError: It is outside the model's folder, missing, or too short.
    """
    folder = where.parent.resolve()
    path = (folder / name).resolve()
    if not name or Path(name).is_absolute() or not path.is_relative_to(folder):
        raise InputError(
            str(where), expected="its weights inside the folder it is in", found=f"'{name}', which lies outside", fix="do not use this file"
        )
    if not path.is_file():
        raise InputError(
            str(where), expected=f"its weights in '{name}' beside it", found="no such file", fix="copy that file there, or export again"
        )
    if path.stat().st_size < size:
        raise InputError(
            str(where),
            expected=f"at least {size} bytes of weights in '{name}'",
            found=f"{path.stat().st_size} bytes",
            fix="copy the whole file, or export again",
        )
    return where.parent / name


def show(shape: tuple[int | None, ...]) -> str:
    """`free x 3 x 8 x 8`."""
    return " x ".join("free" if side is None else str(side) for side in shape) or "a scalar"
