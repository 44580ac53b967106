"""Put a checkpoint into the zoo, as fp16: `python -m vitedge.models.embed build/deit_tiny_32_scratch/checkpoint.safetensors`."""

from __future__ import annotations

import sys
from pathlib import Path

from vitedge.models.build import load_checkpoint, save_checkpoint
from vitedge.models.weights import BUILTIN


def embed(checkpoint: Path, target: Path = BUILTIN) -> Path:
    """Store a vitedge checkpoint in half precision, header and all; returns where."""
    model, meta = load_checkpoint(checkpoint)
    save_checkpoint(target, model, meta, half=True)
    return target


if __name__ == "__main__":
    sys.stderr.write(f"wrote {embed(Path(sys.argv[1]))}\n")
