"""Finding a data set: the option, then VITEDGE_DATA, then the cache, then download."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from vitedge.data import cifar
from vitedge.data.layout import PARTS, is_image
from vitedge.data.members import ARCHIVE_SUFFIXES, archive_stem, first_names
from vitedge.data.official import OFFICIAL
from vitedge.data.records import Source
from vitedge.errors import InputError, UsageError, closest
from vitedge.locations import cache_dir, data_folder
from vitedge.progress import Progress, silent

_LOOKED_AT = 64  # names that tell what an archive holds; CIFAR's has nine files


def find(name: str, option: str | None = None, download: bool = True, progress: Progress = silent) -> Source:
    """Where a data set is.

    Args:
        name: A recipe's `data.name`: a known name, the name of a file or folder in VITEDGE_DATA, or a path.
        option: The value of `--data`: a name, an archive, or a folder that is a data set or holds the
            data set `name`. Wins over everything else.
        download: Whether a known data set may be downloaded into the cache.
        progress: Told bytes while downloading.

    Raises:
        UsageError: Nothing of that name; the fix says where to put the file and what to call it.
        InputError: What was found cannot be read, or is CIFAR's pickled form.
    """
    try:
        return _find(name, option, download, progress)
    except PermissionError as error:
        where = str(error.filename or option or name)
        raise InputError(where, expected="a place that can be read", found=str(error.strerror), fix="check its permissions") from error


def _find(name: str, option: str | None, download: bool, progress: Progress) -> Source:
    if option is not None:
        path = Path(option).expanduser()
        if path.is_dir() and not _is_dataset(path) and not _looks_like_path(name):
            return _inside(name, path)
        if path.exists() or _looks_like_path(option):
            return _source_at(path)
        name = option
    if _looks_like_path(name):
        return _source_at(Path(name).expanduser())
    for folder in _folders():
        for candidate in candidates(name, folder):
            if candidate.exists():
                return Source(name, candidate, kind_of(candidate))
    if download and name in OFFICIAL:
        from vitedge.data.download import fetch

        path = fetch(OFFICIAL[name], cache_dir() / "data", progress)
        return Source(name, path, kind_of(path))
    raise _not_found(name, may_fetch=not download)


def candidates(name: str, folder: Path) -> list[Path]:
    """What a data set of that name may be called in a folder, the first that exists counts."""
    names = [name, *(f"{name}{suffix}" for suffix in (".tar", ".tar.gz", ".tgz", ".zip"))]
    if name in OFFICIAL:
        names += [OFFICIAL[name].file_name, OFFICIAL[name].folder]
    return [folder / candidate for candidate in names]


def kind_of(path: Path) -> str:
    """What a file or folder holds, from its first names: one of `records.KINDS`.

    Raises:
        InputError: Not an archive, or CIFAR's pickled form.
    """
    if path.is_file() and not path.name.endswith(ARCHIVE_SUFFIXES):
        raise InputError(
            str(path),
            expected=f"a folder or a file ending in {', '.join(ARCHIVE_SUFFIXES)}",
            found=f"'{path.name}'",
            fix="pack the images, or unpack them into a folder",
        )
    names = _top_names(path) if path.is_dir() else [PurePosixPath(name) for name in first_names(path, _LOOKED_AT)]
    for name in names:
        if name.name in cifar.RECORD_NAMES:
            return "cifar_binary"
        if name.name in cifar.PICKLE_NAMES or cifar.PICKLE_FOLDERS & set(name.parts):
            raise InputError(
                str(path),
                expected="CIFAR's binary archive (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz)",
                found="the Python one, whose pickles can run code when read",
                fix=f"get the binary one from {OFFICIAL['cifar10'].url.rpartition('/')[0]}/cifar.html",
            )
    return "image_folder" if path.is_dir() else "archive_folder"


def _folders() -> list[Path]:
    folder = data_folder()
    if folder is not None and not folder.is_dir():
        raise UsageError(
            "VITEDGE_DATA", expected="a folder of data sets", found=f"{folder}, which is none", fix="set it to a folder, or unset it"
        )
    return [*([folder] if folder else []), cache_dir() / "data"]


def _looks_like_path(text: str) -> bool:
    return os.sep in text or text.startswith(("~", ".")) or text.endswith(ARCHIVE_SUFFIXES)


def _source_at(path: Path) -> Source:
    if not path.exists():
        raise UsageError(str(path), expected="a data set: a folder or an archive", found="no such file or folder", fix="check the path")
    archives = sorted(path.glob("*")) if path.is_dir() and not _is_dataset(path) else []
    archives = [child for child in archives if child.name.endswith(ARCHIVE_SUFFIXES)]
    if archives:
        raise UsageError(
            str(path), expected="one data set", found=f"a folder of {len(archives)} archives", fix=f"name one, as {archives[0]}"
        )
    return Source(archive_stem(path.resolve()), path, kind_of(path))


def _inside(name: str, folder: Path) -> Source:
    for candidate in candidates(name, folder):
        if candidate.exists():
            return Source(name, candidate, kind_of(candidate))
    held = _held_in([folder])
    raise UsageError(
        f"--data {folder}",
        expected=f"images as train/<class>/IMAGE, or the data set '{name}' by name",
        found=f"neither{closest(name, held)}",
        fix=f"put {' or '.join(path.name for path in candidates(name, folder)[:3])} there, or name another folder",
    )


def _is_dataset(folder: Path) -> bool:
    """Whether a folder is a data set itself and not a folder of data sets."""
    names = _top_names(folder)
    if any(name.name in cifar.RECORD_NAMES | cifar.PICKLE_NAMES for name in names):
        return True
    if any(name.parts[0] in PARTS for name in names):
        return True
    return any(len(name.parts) == 2 and is_image(str(name)) for name in names)


def _top_names(folder: Path) -> list[PurePosixPath]:
    """Names in a folder and in its folders, two levels, without listing what is below."""
    try:
        names = []
        for child in sorted(folder.iterdir()):
            names.append(PurePosixPath(child.name))
            if child.is_dir() and not child.name.startswith("."):
                with os.scandir(child) as entries:
                    names += [PurePosixPath(child.name, entry.name) for entry, _ in zip(entries, range(_LOOKED_AT), strict=False)]
        return names
    except OSError as error:
        raise InputError(
            str(error.filename), expected="a folder that can be listed", found=str(error.strerror), fix="check its permissions"
        ) from error


def _held_in(folders: list[Path]) -> list[str]:
    inside = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted({archive_stem(path) for path in inside if path.is_dir() or path.name.endswith(ARCHIVE_SUFFIXES)})


def _not_found(name: str, may_fetch: bool) -> UsageError:
    folders = _folders()
    held = sorted({*OFFICIAL, *_held_in(folders)})
    known = OFFICIAL.get(name)
    called = known.file_name if known else f"{name}/ or {name}.tar"
    return UsageError(
        f"data set '{name}'",
        expected=f"a path, or one of {', '.join(held)}",
        found=f"nothing of that name in {' or '.join(str(folder) for folder in folders)}{closest(name, held) if known is None else ''}",
        fix=f"put {called} into {folders[0]} (or set VITEDGE_DATA to its folder), or give --data PATH"
        + (f", or run `vitedge data fetch {name}`" if known and may_fetch else ""),
    )
