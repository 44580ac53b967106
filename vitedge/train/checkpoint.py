"""The state a training run resumes from: written whole, read without pickle code, refused where stale.

Random numbers need no state: each step seeds its own from (seed, step).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from vitedge.artifact import writing


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state whole or not at all, and onto the disk before it gets its name."""
    content = io.BytesIO()
    torch.save(state, content)
    with writing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_state(path: Path, key: str) -> tuple[dict[str, Any] | None, str]:
    """The state of a run with this key, or None; and what to tell people about it.

    A state that is damaged, or of another run (another recipe, data, version of torch), is moved aside as `<name>.old`.

    Raises:
        OSError: The file is there and cannot be read.
    """
    if not path.is_file():
        return None, ""
    content = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:  # a file cut off by a power failure raises any of a dozen types
        state = None
    if isinstance(state, dict) and state.get("key") == key:
        return state, f"resumed at step {state['step']}"
    why = "of other inputs" if isinstance(state, dict) else "damaged"
    aside = path.with_name(f"{path.name}.old")
    path.replace(aside)
    return None, f"starts anew: the saved state was {why}, and is now {aside.name}"
