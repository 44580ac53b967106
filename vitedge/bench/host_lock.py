"""One host, one clock: building may go side by side, but nothing is built while somebody times, and nobody times beside another.

Builders of a study or a search hold one lock file of the host shared, whoever times holds it alone. Without it a second
worker would train on the cores that the first one is timing, and every figure would be of half a machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from vitedge.artifact import saying_where

Kind = Literal["build", "timing"]
LOCK_NAME = "vitedge-host.lock"
_WAITS = {
    "build": "something is being timed on this host; waiting for it to end before building",
    "timing": "something is being built or timed on this host; waiting for it to end before timing",
}
_MODES = {"build": fcntl.LOCK_SH, "timing": fcntl.LOCK_EX}
# What this thread holds: the open file and the kind.
_held: ContextVar[tuple[int, Kind] | None] = ContextVar("held", default=None)


@contextlib.contextmanager
def working(kind: Kind, on_wait: Callable[[str], None], folder: Path | None = None) -> Iterator[None]:
    """Hold the host while working; a killed process lets go of it.

    A builder that times in between, as a technique that cuts to a time does, holds the host alone for as long: it gives up its share
    while it waits, so that two such builders do not wait for each other. Within timing everything is allowed.

    Args:
        kind: `build` beside other builders, `timing` alone.
        on_wait: Told once, in a line, when somebody else has to end first.
        folder: Where the lock is; the temporary folder, which processes of a host share.

    Raises:
        OutputError: The lock file belongs to somebody else and cannot be opened.
    """
    outer = _held.get()
    if outer is not None and outer[1] in (kind, "timing"):
        yield
        return
    path = (folder or Path(tempfile.gettempdir())) / LOCK_NAME
    if outer is None:
        with saying_where(path):
            file = _open(path)
    else:
        file = outer[0]
    try:
        _take(file, kind, on_wait, path)
        token = _held.set((file, kind))
        try:
            yield
        finally:
            _held.reset(token)
    finally:
        if outer is None:
            os.close(file)
        else:
            _take(file, outer[1], on_wait, path)


def held_files() -> tuple[int, ...]:
    """What a process that is started for the work at hand must inherit: the lock then lasts as long as it lives.

    Who times may be killed while its worker is at it; the next one must not time beside that.
    """
    held = _held.get()
    return () if held is None else (held[0],)


def _take(file: int, kind: Kind, on_wait: Callable[[str], None], path: Path) -> None:
    """Lock the file in the place of what it is locked with; the kernel lets go of that first."""
    try:
        fcntl.flock(file, _MODES[kind] | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait(f"{_WAITS[kind]} (lock {path})")
        fcntl.flock(file, _MODES[kind])


def _open(path: Path) -> int:
    """The file to lock, which is never written: another user's can be read, but not made again in a shared folder."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
