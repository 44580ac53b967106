"""The lock of a build folder, for workers that wait for each other; `vitedge export -o` takes the same one and refuses to wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from vitedge.artifact import saying_where


@contextlib.contextmanager
def held(root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a build folder, made if it is not there; waits for whoever has it. A process that was killed has let go of it.

    To be taken before the host (`bench.host_lock`): who waits for a folder must not keep others from timing.

    Raises:
        OutputError: The folder cannot be written.
    """
    from filelock import FileLock, Timeout

    with saying_where(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process builds in {root}; waiting for it to end")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
