"""Imports OpenVINO and NNCF without their telemetry.

`import openvino` reports itself to a server and writes a client id into the home folder, unless the package
`openvino_telemetry` cannot be imported: then OpenVINO and NNCF use stubs of their own
(openvino/tools/ovc/telemetry_utils.py, nncf/telemetry/wrapper.py). So it is hidden while they are imported.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

_TELEMETRY = "openvino_telemetry"


def import_quietly(name: str) -> ModuleType:
    """Import a package of OpenVINO's family with telemetry and its import-time chatter off.

    Raises:
        ImportError: It is not installed, or does not load here.
    """
    with _telemetry_hidden(), _torch_extension_quiet():
        return importlib.import_module(name)


@contextlib.contextmanager
def _telemetry_hidden() -> Iterator[None]:
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's own way to say that a module is not there
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]
        if before is not None:
            sys.modules[_TELEMETRY] = before


@contextlib.contextmanager
def _torch_extension_quiet() -> Iterator[None]:
    """NNCF imports torch where there is one, and torch logs that a CUDA toolkit without a GPU is of no use."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
