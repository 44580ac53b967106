from __future__ import annotations

from pathlib import Path

import pytest

from tests.package.building import make_build, write_profile
from vitedge.device import load_device
from vitedge.package.bundle import package


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data set is at hand, whatever this machine has."""
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return make_build(tmp_path / "tiny")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "board.yaml")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle, made once; tests copy it."""
    root = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VITEDGE_DATA", raising=False)
        patch.setenv("VITEDGE_CACHE", str(root / "cache"))
        device = load_device(str(write_profile(root / "board.yaml")))
        return package(make_build(root / "tiny"), device, root / "good.zip").path
