"""Where things are kept: the cache, and the folders of data sets and weights named by the environment."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`VITEDGE_CACHE`, else the platform's user cache; not created here."""
    import platformdirs

    return Path(os.environ.get("VITEDGE_CACHE") or platformdirs.user_cache_dir("vitedge"))


def data_folder() -> Path | None:
    """`VITEDGE_DATA`: a folder of data sets by name, or None."""
    return _folder("VITEDGE_DATA")


def weights_folder() -> Path | None:
    """`VITEDGE_WEIGHTS`: a folder of weights by timm name, or None."""
    return _folder("VITEDGE_WEIGHTS")


def _folder(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None
