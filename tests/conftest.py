"""What every test gets: a cache of its own, no data or weights from the environment unless it asks, and a small made data set."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitedge.runtimes._openvino_import import import_quietly

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip that says so."""
    return _folder("VITEDGE_DATA_FOR_TESTS", "VITEDGE_DATA")


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """The folder of real weights, or a skip that says so."""
    return _folder("VITEDGE_WEIGHTS_FOR_TESTS", "VITEDGE_WEIGHTS")


def _folder(kept: str, variable: str) -> Path:
    if kept not in os.environ:
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[kept])


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's cache, data and weights must not decide what a test sees; real ones are asked for by fixture."""
    for variable in ("VITEDGE_DATA", "VITEDGE_WEIGHTS"):
        if variable in os.environ:
            os.environ[f"{variable}_FOR_TESTS"] = os.environ.pop(variable)
    os.environ["VITEDGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    # The host's lock lies there: tests that bench in one worker need not wait for those that build in another, no figure of theirs is kept.
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("temporary"))
    tempfile.tempdir = None
    # Before any test imports it plainly: a plain import reports over the network and writes into the home folder.
    with contextlib.suppress(ImportError):
        import_quietly("openvino")


@pytest.fixture(scope="session", autouse=True)
def _profile_here() -> Iterator[Callable[[str, str], str]]:
    """ONNX Runtime's profiler in this process: one of its own for each file costs the suite minutes. A bench's workers start theirs."""
    from vitedge.runtimes import onnxruntime

    elsewhere = onnxruntime._profile_elsewhere

    def profile_here(request: str, folder: str) -> str:
        try:
            onnxruntime.profile(request, folder)
        except Exception as error:
            return str(error)
        return ""

    patch = pytest.MonkeyPatch()
    patch.setattr(onnxruntime, "_profile_elsewhere", profile_here)
    yield elsewhere
    patch.undo()


@pytest.fixture
def profiled_elsewhere(_profile_here: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is outside of tests."""
    from vitedge.runtimes import onnxruntime

    monkeypatch.setattr(onnxruntime, "_profile_elsewhere", _profile_here)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled image folder of three colours that any model learns: 40 train and 12 test images a class, 16 px."""
    root = tmp_path_factory.mktemp("data") / "colours"
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for channel, name in enumerate(reversed(CLASSES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 90, size=(16, 16, 3), dtype=np.uint8)
                pixels[:, :, channel] += 120
                Image.fromarray(pixels).save(folder / f"{index:04}.png")
    return root
