"""The identity of a source's bytes, computed once and remembered by path, size and modification time."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from vitedge import artifact
from vitedge.data.members import FolderMembers
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
    """
    path = path.resolve()
    try:
        status = path.stat()
        stamp = {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        memory = cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
        remembered = _remembered(memory)
        if {key: remembered.get(key) for key in stamp} == stamp:
            return Checksums(remembered["sha256"], remembered["md5"])
        found = _read_through(path)
    except OSError as error:
        raise InputError(
            str(path), expected="a file that can be read", found=str(error.strerror), fix="check the path and its permissions"
        ) from error
    artifact.write_json(memory, {**stamp, "sha256": found.sha256, "md5": found.md5})
    return found


def _remembered(memory: Path) -> dict[str, str]:
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
        status = os.stat(root / name)
        total.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
