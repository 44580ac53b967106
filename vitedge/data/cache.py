"""Decoded images kept on disk, so that 60,000 of them are decoded once and mapped into memory after.

One folder per source, named by its digest: `pixels.u8` (all images one after another, RGB rows),
`shapes.npy` (N, 2), `labels.npy`, one file of positions per part, and `meta.json`, which also says how
long `pixels.u8` must be. The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitedge import artifact
from vitedge.data.records import Contents, Decoded
from vitedge.errors import InputError, OutputError
from vitedge.locations import cache_dir
from vitedge.progress import Progress

LAYOUT_VERSION = 2  # raised when the files or their meaning change: older ones are decoded again
LARGEST = 4 << 30  # bytes of decoded pixels; a larger data set is decoded on access


class Ragged:
    """Images of many sizes in one flat array.

    Args:
        flat: uint8, all images' values one after another.
        shapes: Height and width, int64 (N, 2).
    """

    def __init__(self, flat: np.ndarray, shapes: np.ndarray) -> None:
        self._flat, self._shapes = flat, shapes
        self._ends = np.cumsum(3 * shapes[:, 0] * shapes[:, 1])

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, position: int) -> np.ndarray:
        height, width = (int(side) for side in self._shapes[position])
        end = int(self._ends[position])
        return self._flat[end - 3 * height * width : end].reshape(height, width, 3)


def folder_of(identity: str) -> Path:
    """Where the decoded images of a source with this digest are kept."""
    return cache_dir() / "decoded" / identity


def opened(identity: str) -> Decoded | None:
    """The decoded images of a source, mapped and not read, or None where there are none that can be used."""
    folder = folder_of(identity)
    try:
        meta = artifact.read_json(folder / "meta.json")
        if meta["version"] != LAYOUT_VERSION or (folder / "pixels.u8").stat().st_size != meta["bytes"]:
            return None
        labels, shapes = _load(folder / "labels.npy"), _load(folder / "shapes.npy")
        parts = {part: _load(folder / f"{part}.npy") for part in meta["parts"]}
    except (InputError, OSError, KeyError, ValueError):
        return None  # absent or damaged: decoding again is the mending
    flat = np.asarray(np.memmap(folder / "pixels.u8", dtype=np.uint8, mode="r"))
    contents = Contents(tuple(meta["classes"]), labels, parts, tuple(meta["notes"]), meta["test_is_made"])
    if len(shapes) and (shapes == shapes[0]).all():
        return Decoded(flat.reshape(-1, *shapes[0], 3), contents)
    return Decoded(Ragged(flat, shapes), contents)


def _load(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, allow_pickle=False)
    return array


def keep(identity: str, contents: Contents, batches: Iterable[Sequence[np.ndarray] | np.ndarray]) -> Decoded:
    """Write a source's images and open them again.

    Args:
        identity: The source's digest.
        contents: What the images are, by position.
        batches: The images in that order, uint8 HWC each, some at a time.

    Raises:
        OutputError: The cache cannot be written.
    """
    folder = folder_of(identity)
    with saying_cache(), artifact.writing(folder) as temporary:
        temporary.mkdir()
        shapes, size = [], 0
        with (temporary / "pixels.u8").open("wb") as stream:
            for batch in batches:
                for image in batch:
                    shapes.append(image.shape[:2])
                    size += stream.write(np.ascontiguousarray(image).data)
        arrays = {"labels": contents.labels, "shapes": np.array(shapes, dtype=np.int64), **contents.parts}
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        meta: dict[str, Any] = {"version": LAYOUT_VERSION, "bytes": size, "classes": contents.classes, "parts": list(contents.parts)}
        artifact.write_json(temporary / "meta.json", {**meta, "notes": contents.notes, "test_is_made": contents.test_is_made})
    decoded = opened(identity)
    if decoded is None:
        raise OutputError(str(folder), expected="the images just decoded", found="files that do not read back", fix="check the disk")
    return decoded


@contextlib.contextmanager
def locked(identity: str, progress: Progress) -> Iterator[None]:
    """Hold the right to decode one source, so that two processes do not both do it.

    Raises:
        OutputError: The cache cannot be written.
    """
    from filelock import FileLock, Timeout

    folder = folder_of(identity)
    with saying_cache(), artifact.saying_where(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(0, 1, "waiting for another process that decodes the same images")
            lock.acquire()
    try:
        # Whoever held the lock before and was killed left a part folder nobody else can be using.
        for remains in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(remains, ignore_errors=True)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def saying_cache() -> Iterator[None]:
    """Around writing in the cache: it is moved by its variable, not by -o, and the error says so.

    Raises:
        OutputError: The cache cannot be written.
    """
    try:
        yield
    except OutputError as error:
        raise OutputError(
            error.where, expected=error.expected, found=error.found, fix="free space there, or set VITEDGE_CACHE to another folder"
        ) from error
