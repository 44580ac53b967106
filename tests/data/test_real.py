"""The JPEG copy of CIFAR-10, where VITEDGE_DATA has it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.made import CIFAR10_CLASSES
from vitedge.data import find, load
from vitedge.data.describe import describe
from vitedge.data.identity import check

REAL = Path(os.environ.get("VITEDGE_DATA", "")) / "cifar10.tar"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="VITEDGE_DATA has no cifar10.tar")
def test_copy_is_recognized_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITEDGE_DATA", str(REAL.parent))
    source = find("cifar10", download=False)
    dataset = load(source)
    assert check(source) == "sha256 of a known copy" and dataset.label == "CIFAR-10 (JPEG q75 copy)"
    assert dataset.classes == CIFAR10_CLASSES and dataset.test is not None and dataset.train.images.uniform
    assert [np.bincount(part.labels).tolist() for part in (dataset.train, dataset.validation, dataset.test)] == [
        [4500] * 10,
        [500] * 10,
        [1000] * 10,
    ]
    # CIFAR-10's published statistics, which JPEG hardly moves
    assert np.allclose(describe(dataset).mean, (0.4914, 0.4822, 0.4465), atol=0.01)
    assert np.allclose(describe(dataset).std, (0.2470, 0.2435, 0.2616), atol=0.01)
