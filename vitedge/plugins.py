"""The folder is the registry: a technique, graph pass, quantizer or runtime is one file, found by its name.

A plugin module must import quickly and without its heavy library (torch, an engine): schemas are
validated, and help is printed, on machines that have none of them. `tests/contracts` holds every
plugin to that.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from vitedge.errors import UsageError, closest

KINDS = ("compress", "graph", "quantize", "runtimes")


def names(kind: str) -> list[str]:
    """Names of all plugins of a kind, sorted; files starting with `_` are not plugins."""
    package = importlib.import_module(f"vitedge.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """Import one plugin.

    Raises:
        UsageError: No plugin of that kind has that name.
    """
    known = names(kind)
    if name not in known:
        raise UsageError(
            f"{kind} '{name}'",
            expected=f"one of {', '.join(known) or '(none)'}",
            found=f"'{name}'{closest(name, known)}",
            fix="use a name from that list",
        )
    return importlib.import_module(f"vitedge.{kind}.{name}")
