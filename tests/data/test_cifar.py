"""CIFAR's binary records, against images written byte by byte."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.made import CIFAR10_CLASSES, cifar10_members, cifar100_members, tar_of
from vitedge.data import find, load
from vitedge.errors import InputError


def stacked(dataset_part) -> np.ndarray:  # type: ignore[no-untyped-def]
    return dataset_part.images[np.arange(len(dataset_part.images))]


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_records_are_read_exactly(tmp_path: Path, packed: bool) -> None:
    members, images = cifar10_members()
    path = tar_of(tmp_path / "cifar-10-binary.tar.gz", members)
    if not packed:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, filter="data")
        path = tmp_path / "cifar-10-batches-bin"
    source = find("cifar10", str(path))
    dataset = load(source, validation=0.2)
    assert source.kind == "cifar_binary" and dataset.classes == CIFAR10_CLASSES
    assert dataset.test is not None
    assert np.array_equal(stacked(dataset.test), images[50:])
    assert dataset.test.labels.tolist() == [(5 + i) % 10 for i in range(10)]
    # train and validation together are the five batch files, each image with its own label
    labels = np.array([(batch + i) % 10 for batch in range(5) for i in range(10)])
    by_pixels = {image.tobytes(): int(label) for image, label in zip(images[:50], labels, strict=True)}
    for part in (dataset.train, dataset.validation):
        for image, label in zip(part.images, part.labels, strict=True):
            assert by_pixels.pop(image.tobytes()) == label
    assert not by_pixels and np.bincount(dataset.validation.labels).tolist() == [1] * 10


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    members, images = cifar100_members()
    dataset = load(find("cifar100", str(tar_of(tmp_path / "cifar-100-binary.tar.gz", members))))
    assert dataset.classes == tuple(f"kind_{n}" for n in range(100))
    assert dataset.test is not None and dataset.test.labels.tolist() == list(range(100))
    assert np.array_equal(stacked(dataset.test), images[200:])
    assert len(dataset.train.labels) == len(dataset.validation.labels) == 100


def test_a_copy_that_is_not_the_published_bytes_is_not_called_cifar10(tmp_path: Path) -> None:
    members, _ = cifar10_members()
    assert load(find("cifar10", str(tar_of(tmp_path / "cifar-10-binary.tar.gz", members)))).label == "cifar-10-binary"


@pytest.mark.parametrize("change", ["short", "long", "empty", "label", "missing_batch", "missing_names"])
def test_bad_records_are_refused(tmp_path: Path, change: str) -> None:
    members, _ = cifar10_members()
    name = "cifar-10-batches-bin/data_batch_3.bin"
    changed = {
        "short": members[name][:-1],
        "long": members[name] + b"x",
        "empty": b"",
        "label": b"\x0a" + members[name][1:],
    }
    text = {
        "label": "labels below 10, .* found label 10",
        "missing_batch": "the file data_batch_3.bin",
        "missing_names": "the file batches.meta.txt",
    }
    if change in changed:
        members[name] = changed[change]
    else:
        del members[name if change == "missing_batch" else "cifar-10-batches-bin/batches.meta.txt"]
    source = find("cifar10", str(tar_of(tmp_path / "x.tar.gz", members)))
    with pytest.raises(InputError, match=text.get(change, "data_batch_3.bin: expected a whole number of records of 3073 bytes")):
        load(source)


@pytest.mark.parametrize("names", [["cifar-10-batches-py/data_batch_4", "cifar-10-batches-py/readme.html"], ["cifar-100-python/train"]])
def test_pickled_form_is_refused_and_never_read(tmp_path: Path, names: list[str]) -> None:
    path = tar_of(tmp_path / "cifar-10-python.tar.gz", dict.fromkeys(names, b"\x80\x04."))
    with pytest.raises(InputError, match=r"binary archive \(cifar-10-binary.tar.gz .* pickles can run code"):
        find("cifar10", str(path))
