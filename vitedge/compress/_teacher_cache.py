"""A teacher's logits on disk, so that each augmented view of an image is judged once, in this run and the next.

One `.npy` file for one teacher, data set and augmentation, named by the digest of all of them: float16
(views, images, classes), mapped into memory. It is created whole, filled with NaN; a row without NaN is
an answer. So a killed run leaves at most rows that are computed again, and processes of one host may share it.
Shapes: V views, N images of the train split, B images of a batch, C classes.
"""

from __future__ import annotations

import io
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from vitedge.artifact import saying_where, writing
from vitedge.data.cache import saying_cache
from vitedge.locations import cache_dir

_DTYPE = np.dtype("<f2")
_BLOCK = 1 << 20  # values written at a time


class LogitCache:
    """Logits of one teacher for every view of every train image.

    Attributes:
        notes: For the manifest: `path`, `remade` (why an existing file was not used, or None) and the number of
            `rows_reused` and `rows_computed`, which go on counting.
    """

    def __init__(self, logits_VNC: np.ndarray, path: Path, remade: str | None) -> None:
        self._logits_VNC = logits_VNC
        self.notes: dict[str, Any] = {"path": str(path), "remade": remade, "rows_reused": 0, "rows_computed": 0}

    def read(self, view: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A copy of the rows float16 (B, C), and which of them are complete, bool (B,)."""
        logits_BC = np.array(self._logits_VNC[view, indices])
        known_B = ~np.isnan(logits_BC).any(axis=1)
        self.notes["rows_reused"] += int(known_B.sum())
        return logits_BC, known_B

    def write(self, view: int, indices: np.ndarray, logits_BC: np.ndarray) -> None:
        """Keep rows float16 (B, C)."""
        self._logits_VNC[view, indices] = logits_BC
        self.notes["rows_computed"] += len(indices)


def open_cache(digest: str, shape: tuple[int, int, int]) -> LogitCache:
    """The cache file of this digest, made where there is none; one of another shape or type, or cut short, is made again.

    Args:
        digest: Identity of the teacher and of all that decides what it sees.
        shape: Views, images, classes.

    Raises:
        OutputError: The disk is full, or the cache folder cannot be written.
    """
    from filelock import FileLock

    path = cache_dir() / "teacher_logits" / f"{digest}.npy"
    header = _header(shape)
    with saying_cache(), saying_where(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            wrong = _what_is_wrong(path, header, shape)
            if wrong is not None:
                # Whoever held the lock before and was killed left a part folder nobody else can be using.
                for remains in path.parent.glob(f".{path.name}.*.part"):
                    shutil.rmtree(remains, ignore_errors=True)
                _create(path, header, shape)
            logits_VNC = np.memmap(path, dtype=_DTYPE, mode="r+", offset=len(header), shape=shape)
    return LogitCache(logits_VNC, path, wrong or None)


def _header(shape: tuple[int, int, int]) -> bytes:
    """The bytes an .npy file of this shape starts with."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": _DTYPE.str, "fortran_order": False, "shape": shape})
    return content.getvalue()


def _what_is_wrong(path: Path, header: bytes, shape: tuple[int, int, int]) -> str | None:
    """Why the file cannot be used; empty where there is none, None where it can."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        found = file.read(len(header))
    if found != header:
        return f"it was not float16 of shape {shape}"
    expected, size = len(header) + math.prod(shape) * _DTYPE.itemsize, path.stat().st_size
    return None if size == expected else f"it had {size} bytes, not {expected}"


def _create(path: Path, header: bytes, shape: tuple[int, int, int]) -> None:
    """Write the file full of NaN, every byte of it: a hole in the file, or one the disk has no room for, would kill the run later."""
    count = math.prod(shape)
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for start in range(0, count, _BLOCK):
            file.write(np.full(min(_BLOCK, count - start), np.nan, _DTYPE).tobytes())
        file.flush()
        # On the disk before it gets its name: blocks lost in a power failure read as zeros, which look like logits.
        os.fsync(file.fileno())
