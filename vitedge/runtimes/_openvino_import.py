"""Imports OpenVINO and NNCF without their telemetry.

`import openvino` reports itself to a server and writes a client id into the home folder, unless the package
`openvino_telemetry` cannot be imported: then OpenVINO and NNCF use stubs of their own
(openvino/tools/ovc/telemetry_utils.py, nncf/telemetry/wrapper.py). So it is hidden while they are imported.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

_TELEMETRY = "openvino_telemetry"


def import_quietly(name: str) -> ModuleType:
    """Import a package of OpenVINO's family with its telemetry off.

    Raises:
        ImportError: It is not installed, or does not load here.
    """
    with _telemetry_hidden():
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
