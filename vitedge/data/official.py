"""The data sets vitedge knows by name: where they are published, what they are called, how to recognize their bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Official:
    """A data set that can be downloaded.

    Attributes:
        name: What recipes call it.
        label: What results call it when the bytes are the published ones.
        file_name: The published archive.
        folder: The folder inside it.
        md5: Of the archive, from the page it is published on.
        url: Where it is published.
    """

    name: str
    label: str
    file_name: str
    folder: str
    md5: str
    url: str


_PAGE = "https://www.cs.toronto.edu/~kriz/"
OFFICIAL = {
    "cifar10": Official(
        "cifar10",
        "CIFAR-10",
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        "c32a1d4ab5d03f1284b67883e8d87530",
        f"{_PAGE}cifar-10-binary.tar.gz",
    ),
    "cifar100": Official(
        "cifar100",
        "CIFAR-100",
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        "03b5dce01913d631647c71ecec9e9cb8",
        f"{_PAGE}cifar-100-binary.tar.gz",
    ),
}

# Other forms of a known data set, by the sha256 of the file. Top-1 on them is not that of the original
# pixels (JPEG at quality 75 costs a model up to 12 points), so results must not say `CIFAR-10`.
COPIES = {"f9eee054bd63580f8affb1498c90229cb865f7a2bfcbd13f4b163ceadfaa6b54": "CIFAR-10 (JPEG q75 copy)"}


def label_of(sha256: str, md5: str) -> str | None:
    """What results call a file with these checksums, or None where it is not known."""
    for official in OFFICIAL.values():
        if md5 == official.md5:
            return official.label
    return COPIES.get(sha256)
