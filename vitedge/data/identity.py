"""The identity of a source's bytes, computed once and remembered by path, size and modification time."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitedge import artifact
from vitedge.data.cache import saying_cache
from vitedge.data.members import FolderMembers
from vitedge.data.official import COPIES, OFFICIAL
from vitedge.data.records import Source
from vitedge.errors import InputError
from vitedge.locations import cache_dir


@dataclass(frozen=True)
class Checksums:
    """Of one file, hex; md5 because the CIFAR page publishes nothing better."""

    sha256: str
    md5: str


def digest(source: Source) -> str:
    """Identity of a source's bytes, hex.

    For a file its sha256; for a folder a sha256 over names, sizes and modification times, since
    reading a million images to learn that nothing changed would take longer than using them.

    Raises:
        InputError: Not readable.
    """
    return _digest_folder(source.path) if source.path.is_dir() else checksums(source.path).sha256


def checksums(path: Path) -> Checksums:
    """Checksums of a file, from the cache where path, size and modification time are those of last time.

    Raises:
        InputError: Not readable.
        OutputError: The cache cannot be written.
    """
    path = path.resolve()
    status = _status(path)
    stamp = {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    memory = cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    remembered = _remembered(memory)
    if {key: remembered.get(key) for key in stamp} == stamp:
        return Checksums(str(remembered["sha256"]), str(remembered["md5"]))
    try:
        found = _read_through(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    with saying_cache():
        artifact.write_json(memory, {**stamp, "sha256": found.sha256, "md5": found.md5})
    return found


def check(source: Source) -> str:
    """Compare a file that bears a published archive's name with the published checksum.

    Returns:
        What the bytes are known by, in words.

    Raises:
        InputError: The name is an official one and the bytes are not.
    """
    if source.path.is_dir():
        return "a folder: there is no checksum to compare"
    found = checksums(source.path)
    for official in OFFICIAL.values():
        if found.md5 == official.md5:
            return "md5 as published"
        if source.path.name == official.file_name:
            raise InputError(
                str(source.path),
                expected=f"md5 {official.md5}",
                found=f"md5 {found.md5}",
                fix="remove the file and fetch it again, or rename it",
            )
    return "sha256 of a known copy" if found.sha256 in COPIES else "no published checksum for this file"


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        content = artifact.read_json(memory)
    except InputError:
        return {}  # never seen, or a damaged note: reading the file again tells
    return content if isinstance(content, dict) and {"sha256", "md5"} <= set(content) else {}


def _read_through(path: Path) -> Checksums:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
            md5.update(block)
    return Checksums(sha256.hexdigest(), md5.hexdigest())


def _digest_folder(root: Path) -> str:
    members = FolderMembers(root)
    total = hashlib.sha256()
    for name in sorted(members.folders):
        total.update(f"{name}/\0".encode("utf-8", "surrogateescape"))
    for name in sorted(members.names):
        status = _status(f"{root}/{name}")
        total.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _status(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116 - a Path for each of 60,000 files takes longer than the calls
    except OSError as error:
        raise _unreadable(Path(path), error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        str(path), expected="a file that can be read", found=str(error.strerror), fix="check it and its permissions, or remove it"
    )
