"""What a data set is once read: splits of images and labels, and views that pick images by index.

Shapes: N images, H height, W width, C channels (always 3, RGB).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

KINDS = ("cifar_binary", "image_folder", "archive_folder")


@dataclass(frozen=True)
class Source:
    """Where a data set is, before anything of it is read.

    Attributes:
        name: What the user calls it: `cifar10`, or the file's or folder's name.
        path: The archive or the folder.
        kind: `cifar_binary` (the official binary records, packed or unpacked), `image_folder`, or
            `archive_folder` (an image folder inside .tar, .tar.gz or .zip).
    """

    name: str
    path: Path
    kind: str


class Store(Protocol):
    """All images of a data set by position, each uint8 HWC RGB of its own size."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> np.ndarray: ...


class Images(Sequence[np.ndarray]):
    """Images picked from a store by index, without copying the store.

    `images[3]` is one uint8 HWC image, a read-only view where the store is an array. `images[2:5]` is
    another view. `images[np.array([4, 1])]` is a new, writable array NHWC where all images have one
    size (`uniform`), and a list of HWC images elsewhere.

    Args:
        store: An array NHWC uint8, or a `Store` of images of many sizes.
        index: Positions in the store, int64 (N,); all of them in order where not given.
    """

    def __init__(self, store: np.ndarray | Store, index: np.ndarray | None = None) -> None:
        self._store = store
        self._index = np.arange(len(store)) if index is None else np.asarray(index, dtype=np.int64)

    @property
    def uniform(self) -> bool:
        """Whether all images have one size and lie in one array, so that an index array gives NHWC."""
        return isinstance(self._store, np.ndarray)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, key: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, key: slice) -> Images: ...
    @overload
    def __getitem__(self, key: np.ndarray) -> Any: ...
    def __getitem__(self, key: int | slice | np.ndarray) -> Any:
        if isinstance(key, slice):
            return Images(self._store, self._index[key])
        picked = self._index[key]
        if picked.ndim == 0:
            return self._store[int(picked)]
        if isinstance(self._store, np.ndarray):
            return self._store[picked]
        return [self._store[int(position)] for position in picked]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._store[int(position)] for position in self._index)


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: Each uint8 HWC RGB; what `load` gives is an `Images`.
        labels: int64 (N,), positions in the data set's `classes`.
    """

    images: Sequence[np.ndarray]
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A data set read and split. Train, validation and test share no image.

    Attributes:
        name: What the user calls it.
        label: What results call it: `CIFAR-10` only for the official bytes.
        classes: Class names; a label is a position in them.
        digest: Identity of the bytes it was read from, hex.
        train: What training and calibration take.
        validation: What tuning and choosing between models take.
        test: For the final figure only, or None where there is none.
        notes: What a reader of results must know: splits made here, files left out.
    """

    name: str
    label: str
    classes: tuple[str, ...]
    digest: str
    train: Split
    validation: Split
    test: Split | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What the images of a source are, by position in it, before any splitting.

    Attributes:
        classes: Class names.
        labels: int64 (N,).
        parts: Positions of each part's images in an order that does not depend on how they are packed:
            `train` and perhaps `validation` and `test`.
        notes: As in `Dataset`.
        test_is_made: Whether the source has no splits, and its test images were chosen by name.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    parts: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()
    test_is_made: bool = False


@dataclass(frozen=True)
class Decoded:
    """Every image of a source by position, and what they are."""

    store: np.ndarray | Store
    contents: Contents
