"""CIFAR-10 and CIFAR-100 in the official binary records, packed or unpacked; never the pickles.

A record is 1 label byte (CIFAR-10) or 2, coarse and fine (CIFAR-100), then 3,072 bytes: 32 x 32 red,
green, blue planes. Source: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky, 2009).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from vitedge.data.members import Members
from vitedge.data.records import Contents
from vitedge.errors import InputError

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE


@dataclass(frozen=True)
class RecordFiles:
    """File names of one of the two data sets, and where in a record the label is."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    class_names: str
    label_bytes: int

    @property
    def record_bytes(self) -> int:
        """Length of a record."""
        return self.label_bytes + PIXEL_BYTES


CIFAR10 = RecordFiles(tuple(f"data_batch_{n}.bin" for n in range(1, 6)), ("test_batch.bin",), "batches.meta.txt", 1)
CIFAR100 = RecordFiles(("train.bin",), ("test.bin",), "fine_label_names.txt", 2)
RECORD_NAMES = {*CIFAR10.train, *CIFAR10.test, CIFAR10.class_names, *CIFAR100.train, *CIFAR100.test, CIFAR100.class_names}
PICKLE_NAMES = {*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"}
PICKLE_FOLDERS = {"cifar-10-batches-py", "cifar-100-python"}


def read(members: Members, where: str) -> tuple[Contents, Iterator[np.ndarray]]:
    """Read either data set.

    Args:
        members: The archive's or the folder's files, below any folder.
        where: What errors name.

    Returns:
        What the images are, and the images in that order, uint8 NHWC per file.

    Raises:
        InputError: A file is missing, is not a whole number of records, or has a label without a name.
    """
    position_of = {PurePosixPath(name).name: position for position, name in enumerate(members.names)}
    files = CIFAR100 if CIFAR100.train[0] in position_of else CIFAR10
    missing = [name for name in (*files.train, *files.test, files.class_names) if name not in position_of]
    if missing:
        raise InputError(
            where, expected=f"the file {missing[0]}", found=f"{len(position_of)} other files", fix="download or unpack the archive again"
        )
    wanted = (*files.train, *files.test)
    # Read in stored order: stepping back in a compressed tar means reading it from the start.
    in_order = sorted((*wanted, files.class_names), key=position_of.__getitem__)
    blocks = {name: members.read(position_of[name]) for name in in_order}
    names = blocks[files.class_names].decode("utf-8", "replace").split()
    records = {name: _records(blocks[name], files, len(names), f"{where}: {name}") for name in wanted}
    labels = np.concatenate([records[name][:, files.label_bytes - 1] for name in wanted]).astype(np.int64)
    train_size = sum(len(records[name]) for name in files.train)
    parts = {"train": np.arange(train_size), "test": np.arange(train_size, len(labels))}
    return Contents(tuple(names), labels, parts), (_pixels(records[name], files) for name in wanted)


def _records(block: bytes, files: RecordFiles, num_classes: int, where: str) -> np.ndarray:
    if not block or len(block) % files.record_bytes:
        raise InputError(
            where, expected=f"a whole number of records of {files.record_bytes} bytes", found=f"{len(block)} bytes", fix="download it again"
        )
    records = np.frombuffer(block, dtype=np.uint8).reshape(-1, files.record_bytes)
    largest = int(records[:, files.label_bytes - 1].max())
    if largest >= num_classes:
        raise InputError(
            where,
            expected=f"labels below {num_classes}, as {files.class_names} has names",
            found=f"label {largest}",
            fix="download it again",
        )
    return records


def _pixels(records: np.ndarray, files: RecordFiles) -> np.ndarray:
    planes_NCHW = records[:, files.label_bytes :].reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes_NCHW.transpose(0, 2, 3, 1))
