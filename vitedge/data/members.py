"""The files of a folder, tar or zip behind one small interface; nothing is ever unpacked to disk.

Names that climb out, absolute names and links are refused although reading them here would do no
harm: an archive that carries them was not made to hold images.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
import threading
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from vitedge.errors import InputError

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
LARGEST_MEMBER = 1 << 29  # bytes; a bigger one is no photograph, and reading it could exhaust memory
_UNREADABLE = (OSError, EOFError, zlib.error, RuntimeError, NotImplementedError, tarfile.TarError, zipfile.BadZipFile)


class Members(Protocol):
    """Files by position, in stored order.

    Attributes:
        names: Relative posix names of the files.
        folders: Relative posix names of the folders that the source lists.
        random_access: Whether reading out of stored order is cheap.
    """

    names: list[str]
    folders: list[str]
    random_access: bool

    def read(self, position: int) -> bytes:
        """The bytes of one file; may be called from several threads.

        Raises:
            InputError: The file cannot be read.
        """


def archive_stem(path: Path) -> str:
    """The file's or folder's name without an archive's suffix."""
    for suffix in ARCHIVE_SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name


def open_members(path: Path) -> Members:
    """List a folder or an archive.

    Raises:
        InputError: Not readable, damaged, or with names that are refused.
    """
    if path.is_dir():
        return FolderMembers(path)
    return ZipMembers(path) if path.name.endswith(".zip") else TarMembers(path)


def first_names(path: Path, count: int) -> list[str]:
    """Names of the first `count` files, without listing the rest of a tar.

    Raises:
        InputError: Not readable or not an archive.
    """
    if path.is_dir() or path.name.endswith(".zip"):
        return open_members(path).names[:count]
    with _damage_explained(path), tarfile.open(path) as tar:
        names: list[str] = []
        for member in tar:
            if member.isfile():
                names.append(member.name)
            if len(names) == count:
                break
        return names


class FolderMembers:
    """The files below a folder; links to files and folders are followed, hidden ones are left out."""

    random_access = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names: list[str] = []
        self.folders: list[str] = []
        seen: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(root, followlinks=True, onerror=_cannot_list):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                raise InputError(folder, expected="each folder once", found="a link to a folder read before", fix="remove the link")
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            relative = Path(folder).relative_to(root)
            self.folders += [(relative / name).as_posix() for name in folders]
            self.names += [(relative / name).as_posix() for name in sorted(files) if not name.startswith(".")]

    def read(self, position: int) -> bytes:
        """See `Members.read`."""
        path = self._root / self.names[position]
        with _damage_explained(path):
            return path.read_bytes()


class TarMembers:
    """The files of a tar, plain or compressed, read in place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with _damage_explained(path):
            self._tar = tarfile.open(path)  # noqa: SIM115 - stays open to read members later
            weakref.finalize(self, self._tar.close)
            members = self._tar.getmembers()
            self._check_end(members)
        for member in members:
            if not member.isdir():
                kind = "" if member.isfile() else "a link or special file"
                _check_member(path, member.name, member.size, kind)
        self._files = [member for member in members if member.isfile()]
        self.names = _unique(path, [_plain(member.name) for member in self._files])
        self.folders = [_plain(member.name) for member in members if member.isdir()]
        # A compressed stream can only be read forward: stepping back means reading it from the start.
        self.random_access = not path.name.endswith(("gz", "bz2", "xz"))

    def _check_end(self, members: list[tarfile.TarInfo]) -> None:
        """tarfile takes an archive cut between two members for a whole one; the end marker tells them apart."""
        stream = self._tar.fileobj
        if not members or stream is None:
            return
        last = members[-1]
        stream.seek(last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("no end marker")

    def read(self, position: int) -> bytes:
        """See `Members.read`."""
        with _damage_explained(self._path, self.names[position]), self._lock:
            stream = self._tar.extractfile(self._files[position])
            return stream.read() if stream else b""


class ZipMembers:
    """The files of a zip, read in place."""

    random_access = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with _damage_explained(path):
            self._zip = zipfile.ZipFile(path)
            weakref.finalize(self, self._zip.close)
        infos = self._zip.infolist()
        for info in infos:
            _check_member(path, info.filename, info.file_size, "a link" if stat.S_ISLNK(info.external_attr >> 16) else "")
        self._files = [info for info in infos if not info.is_dir()]
        self.names = _unique(path, [_plain(info.filename) for info in self._files])
        self.folders = [_plain(info.filename) for info in infos if info.is_dir()]

    def read(self, position: int) -> bytes:
        """See `Members.read`."""
        with _damage_explained(self._path, self.names[position]), self._lock:
            return self._zip.read(self._files[position])


def _plain(name: str) -> str:
    return PurePosixPath(name).as_posix()


def _unique(path: Path, names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"{path}: {twice}", expected="each name once", found="it is stored twice", fix="pack the archive again")
    return names


def _check_member(path: Path, name: str, size: int, kind: str) -> None:
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/") or "\\" in name:
        kind = "a name that leads out of the archive"
    elif size > LARGEST_MEMBER:
        kind = f"{size} bytes"
    if kind:
        raise InputError(
            f"{path}: {name}",
            expected="plain files and folders below the archive's top",
            found=kind,
            fix="pack the images again, without links and with relative names",
        )


def _cannot_list(error: OSError) -> None:
    raise InputError(
        str(error.filename), expected="a folder that can be listed", found=str(error.strerror), fix="check its permissions"
    ) from error


@contextlib.contextmanager
def _damage_explained(path: Path, member: str = "") -> Iterator[None]:
    """Turn what the archive modules raise into one line that names the file, and the member where there is one."""
    try:
        yield
    except PermissionError as error:
        raise InputError(str(path), expected="a file that can be read", found=str(error.strerror), fix="check its permissions") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: {member}" if member else str(path),
            expected="a whole .tar, .tar.gz or .zip archive" if path.name.endswith(ARCHIVE_SUFFIXES) else "a readable file",
            found=str(error) or type(error).__name__,
            fix="copy or download it again",
        ) from error
