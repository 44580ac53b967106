"""One host, one clock: building may go side by side, but nothing is built while somebody times.

Builders hold one lock file of the host shared, a timing process holds it alone. Without it a study's second worker
would train on the cores that the first one is timing, and every figure would be of half a machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from vitedge.artifact import saying_where

LOCK_NAME = "vitedge-host.lock"
_WAITS = {
    "build": "something is being timed on this host; waiting for it to end before building",
    "timing": "something is being built or timed on this host; waiting for it to end before timing",
}


@contextlib.contextmanager
def working(kind: Literal["build", "timing"], on_wait: Callable[[str], None], folder: Path | None = None) -> Iterator[None]:
    """Hold the host while working; a killed process lets go of it. Not to be nested: a builder would wait for itself.

    Args:
        kind: `build` beside other builders, `timing` alone.
        on_wait: Told once, in a line, when somebody else has to end first.
        folder: Where the lock is; the temporary folder, which processes of a host share.

    Raises:
        OutputError: The lock file belongs to somebody else and cannot be opened.
    """
    path = (folder or Path(tempfile.gettempdir())) / LOCK_NAME
    mode = fcntl.LOCK_EX if kind == "timing" else fcntl.LOCK_SH
    with saying_where(path):
        file = _open(path)
    try:
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait(f"{_WAITS[kind]} (lock {path})")
            fcntl.flock(file, mode)
        yield
    finally:
        os.close(file)


def _open(path: Path) -> int:
    """The file to lock, which is never written: another user's can be read, but not made again in a shared folder."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
