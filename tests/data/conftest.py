"""Every test of the data package has a cache of its own and no VITEDGE_DATA."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("VITEDGE_CACHE", str(cache))
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    return cache
