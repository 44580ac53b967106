"""The state a training run resumes from: written whole, read without pickle code, refused where stale.

Random numbers need no state: each step seeds its own from (seed, step).
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from vitedge.artifact import writing


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state whole or not at all, and onto the disk before it gets its name."""
    content = io.BytesIO()
    torch.save(state, content)
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def load_state(path: Path, key: str) -> dict[str, Any] | None:
    """The state of a run with this key, or None where there is none, it is of another run, or it is damaged.

    Starting anew is right in each of these cases: a state is only ever a way to save time.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file cut off by a power failure raises any of a dozen types
        return None
    return state if isinstance(state, dict) and state.get("key") == key else None
