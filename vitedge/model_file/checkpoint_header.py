"""The header of a vitedge checkpoint: a safetensors file that says how to build its model again.

Format: https://github.com/huggingface/safetensors#format: eight bytes of length, little-endian, then that
much JSON, then the tensors. Read here without the safetensors package, which the torch side brings.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from vitedge.errors import InputError
from vitedge.model_file.parts import Header, InputSpec

METADATA_ENTRY = "vitedge"
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def read(path: Path) -> Header:
    """Read and check one file.

    Raises:
        InputError: Not a safetensors file, cut short, or not one that vitedge wrote.
    """
    entries = _entries(path)
    described = entries.get("__metadata__", {})
    try:
        meta = json.loads(described[METADATA_ENTRY])
        size, preprocessing, labels = int(meta["img_size"]), str(meta["preprocessing"]), json.dumps(list(meta["labels"]))
        # Float weights are loaded as float32 whatever they are stored as; a quantizing technique says what it made.
        schemes = ["fp32", *(made["scheme"] for _, made in meta.get("structure", ()) if "scheme" in made)]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            str(path),
            expected="a checkpoint written by vitedge, with its header",
            found="a safetensors file without it",
            fix="give the file as `weights:` of a recipe instead",
        ) from error
    return Header(
        files=(path,),
        scheme=schemes[-1],
        input=InputSpec("pixels", (None, 3, size, size), "NCHW"),
        preprocessing=preprocessing,
        labels=labels,
        notes={name: meta.get(name) for name in ("arch", "img_size", "patch_size", "num_classes")},
    )


def _entries(path: Path) -> dict[str, Any]:
    """The JSON header, checked against the length of the file."""
    found = "a file that is none"
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
        text = file.read(length) if length <= LARGEST_HEADER else b""
    try:
        entries = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) == path.stat().st_size:
            return dict(entries)
        found = f"{path.stat().st_size} bytes where its header speaks of {8 + length + max(ends, default=0)}"
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        found = f"a file that is none ({error})"
    raise InputError(str(path), expected="a safetensors file", found=found, fix="copy or train it again")
