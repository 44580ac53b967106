"""The zip of a bundle: the same files give the same bytes, and nothing in a zip from elsewhere is trusted.

Members are stored, not deflated. Weights hardly shrink, deflate's bytes differ between zlib builds, and a
stored zip cannot unpack to more than its own size: one that claims to is refused before it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from vitedge.artifact import saying_where
from vitedge.errors import InputError
from vitedge.package.contents import MANIFEST, BundleManifest, FileEntry, read_manifest

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold
MAX_MANIFEST_BYTES = 1 << 20
ENCRYPTED = 0x1
UNREADABLE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, struct.error)


def write_zip(path: Path, folder: Path, names: list[str]) -> None:
    """Write files of a folder as a zip whose bytes depend on names and contents alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as bundle:
        for name in sorted(names):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3  # Unix, wherever this runs
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = (folder / name).stat().st_size  # lets zipfile decide on 64-bit sizes
            with (folder / name).open("rb") as source, bundle.open(info, "w") as member:
                shutil.copyfileobj(source, member, 1 << 20)


def entry_of(path: Path) -> FileEntry:
    """Size and sha256 of one file."""
    content = path.read_bytes()
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _refuse(path: Path, member: str, expected: str, found: str) -> InputError:
    return InputError(
        f"{path}: {member}" if member else str(path), expected=expected, found=found, fix="get the bundle again from where it was packaged"
    )


@contextlib.contextmanager
def _reading(path: Path, member: str = "") -> Iterator[None]:
    """Turn what zipfile raises about damage into one line.

    Raises:
        InputError: The zip, or the member, cannot be read.
    """
    try:
        yield
    except UNREADABLE as error:
        raise _refuse(path, member, "a bundle written by `vitedge package`", str(error) or type(error).__name__) from error
    except OSError as error:
        raise _refuse(path, member, "a readable bundle", str(error.strerror or error)) from error


def _check_name(path: Path, name: str) -> None:
    """Refuse names that would not stay inside the folder they are unpacked in."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise _refuse(path, repr(name), "a relative name without '..', backslash or drive", "one that could climb out")


def _check_member(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse what is not a plain stored file, going by the zip's directory alone."""
    _check_name(path, info.orig_filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise _refuse(path, info.filename, "a plain file", "a link" if kind == stat.S_IFLNK else "a special file")
    if info.flag_bits & ENCRYPTED:
        raise _refuse(path, info.filename, "a member without a password", "an encrypted one")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _refuse(
            path,
            info.filename,
            "a stored member, as vitedge writes them",
            f"one of {info.compress_size} bytes that unpacks to {info.file_size}",
        )


def _check_directory(path: Path, bundle: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members by name, after every check that needs no member to be read."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in bundle.infolist():
        _check_member(path, info)
        if info.filename in members:
            raise _refuse(path, info.filename, "every name once", "the name twice")
        members[info.filename] = info
    if MANIFEST not in members:
        raise _refuse(path, MANIFEST, "a manifest", "none")
    declared = sum(info.file_size for info in members.values())
    if declared > path.stat().st_size:
        raise _refuse(path, "", f"members of {path.stat().st_size} bytes at most, the size of the zip", f"{declared} bytes declared")
    if members[MANIFEST].file_size > MAX_MANIFEST_BYTES:
        raise _refuse(path, MANIFEST, f"{MAX_MANIFEST_BYTES} bytes at most", f"{members[MANIFEST].file_size}")
    return members


def _unpack_member(path: Path, bundle: zipfile.ZipFile, info: zipfile.ZipInfo, entry: FileEntry, target: Path) -> None:
    """Write one member out, stopping at its declared size, and compare its hash."""
    digest, size = hashlib.sha256(), 0
    with _reading(path, info.filename), bundle.open(info) as source:
        with saying_where(target), target.open("xb") as sink:
            while block := source.read(1 << 20):
                size += len(block)
                if size > entry.size:
                    raise _refuse(path, info.filename, f"{entry.size} bytes", "more")
                digest.update(block)
                sink.write(block)
    if size != entry.size or digest.hexdigest() != entry.sha256:
        raise _refuse(path, info.filename, f"sha256 {entry.sha256[:12]}...", f"{digest.hexdigest()[:12]}...: the file was changed")


def unpack(path: Path, folder: Path) -> BundleManifest:
    """Check a bundle's zip and unpack it into an empty folder.

    Nothing is written before the names, kinds and sizes of all members have been checked.

    Raises:
        InputError: Not a zip; a member missing, unknown, twice, encrypted, compressed, a link, oversize,
            changed, or with a name that climbs out; the manifest damaged or of another version.
    """
    with contextlib.ExitStack() as stack:
        with _reading(path):
            bundle = stack.enter_context(zipfile.ZipFile(path))
        members = _check_directory(path, bundle)
        with _reading(path, MANIFEST), bundle.open(members[MANIFEST]) as stream:
            text = stream.read(MAX_MANIFEST_BYTES + 1)
        manifest = read_manifest(text, str(path))
        found = set(members) - {MANIFEST}
        for kind, names in (("missing", set(manifest.files) - found), ("unknown", found - set(manifest.files))):
            if names:
                raise _refuse(path, sorted(names)[0], "exactly the files the manifest lists", f"{kind}: {', '.join(sorted(names))}")
        for name, entry in manifest.files.items():
            if members[name].file_size != entry.size:
                raise _refuse(path, name, f"{entry.size} bytes, as the manifest says", f"{members[name].file_size}")
        (folder / "golden").mkdir()
        (folder / MANIFEST).write_bytes(text)
        for name, entry in sorted(manifest.files.items()):
            _unpack_member(path, bundle, members[name], entry, folder / name)
        return manifest
