"""Which class and which part every file of an image folder belongs to, read off the names alone.

train/<class>/*  test/<class>/*  val|valid|validation/<class>/*       or       <class>/*
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from vitedge.data.records import Contents
from vitedge.data.splits import split_off_by_name
from vitedge.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PARTS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
TEST_SHARE = 0.2  # of a folder without splits
TEST_SEED = 0  # not the one of validation: a test image must stay one whichever validation split is drawn
_EXPECTED = "train/<class>/IMAGE and test/<class>/IMAGE, or <class>/IMAGE"


def is_image(name: str) -> bool:
    """Whether a file's name says it is an image, and not a hidden file or what macOS puts into zips."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(path)


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def lay_out(names: list[str], folders: list[str], where: str) -> tuple[list[int], Contents]:
    """Sort files into classes and parts.

    Args:
        names: Relative posix names of all files, in stored order.
        folders: Relative posix names of the folders the source lists, to notice empty classes.
        where: What errors name.

    Returns:
        Positions in `names` of the images, and what those images are; positions in the contents count
        these images. Classes are sorted by name, images of a part by class and name. Where the names
        tell no splits, about a fifth of each class is chosen for test by the names alone.

    Raises:
        InputError: No images, an image outside a class folder, an empty class folder, a class of
            another split that train lacks, fewer than two classes, or several data sets in one.
    """
    kept = [position for position, name in enumerate(names) if is_image(name)]
    if not kept:
        raise InputError(
            where, expected=f"images as {_EXPECTED}", found="no images", fix=f"use files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    paths = [PurePosixPath(names[position]).parts for position in kept]
    directories = [path.parts for path in map(PurePosixPath, folders) if not _is_hidden(path)]
    if _has_top_folder(paths):
        directories = [path[1:] for path in directories if path[0] == paths[0][0]]
        paths = [path[1:] for path in paths]
    paths = [(_part(path, 3), *path[1:]) for path in paths]
    directories = [(_part(path, 2), *path[1:]) for path in directories if path]
    has_splits = any(path[0] in PARTS for path in paths)
    if not has_splits:
        _refuse_several_sets(paths, where)
        paths, directories = [("all", *path) for path in paths], [("all", *path) for path in directories]
    known = PARTS if has_splits else {"all": "all"}
    left_out = Counter("/".join(path[:1]) for path in paths if path[0] not in known)
    used = [position for position, path in enumerate(paths) if path[0] in known]
    kept, paths = [kept[position] for position in used], [paths[position] for position in used]
    for path in paths:
        if len(path) < 3:
            raise InputError(
                f"{where}: {'/'.join(path).removeprefix('all/')}",
                expected=_EXPECTED,
                found="an image in no class folder",
                fix="move it into a folder named after its class",
            )
    _refuse_empty_classes(paths, [path for path in directories if path and path[0] in known], where)
    contents = _contents(paths, known, where)
    notes = [f"{count} images under {folder}/ were left out" for folder, count in sorted(left_out.items())]
    others = len(names) - len(kept) - sum(left_out.values())
    notes += [f"{others} files that are not images were left out"] if others else []
    return kept, replace(contents, notes=tuple(notes))


def _part(path: tuple[str, ...], deep: int) -> str:
    """The first folder, in small letters where it is a split that is written otherwise: `Train/<class>/` is one, `Train/1.png` a class."""
    small = path[0].lower()
    return small if small in PARTS and len(path) >= deep else path[0]


def _has_top_folder(paths: list[tuple[str, ...]]) -> bool:
    """Whether one folder that is neither a split nor a class holds everything."""
    tops = {path[0] for path in paths}
    return len(tops) == 1 and not tops & set(PARTS) and all(len(path) > 2 for path in paths)


def _refuse_several_sets(paths: list[tuple[str, ...]], where: str) -> None:
    inner = sorted({path[0] for path in paths if len(path) > 3 and path[1] == "train"})
    if inner:
        raise InputError(
            where, expected="one data set", found=f"several, in {', '.join(inner)}", fix=f"name one of them: {where}/{inner[0]}"
        )


def _refuse_empty_classes(paths: list[tuple[str, ...]], directories: list[tuple[str, ...]], where: str) -> None:
    filled = {path[:2] for path in paths}
    for directory in directories:
        if len(directory) == 2 and directory not in filled:
            name = "/".join(directory).removeprefix("all/")
            raise InputError(
                f"{where}: {name}", expected="at least one image in each class folder", found="none", fix="add images or remove the folder"
            )


def _contents(paths: list[tuple[str, ...]], known: dict[str, str], where: str) -> Contents:
    parts = {part: [p for p, path in enumerate(paths) if known[path[0]] == part] for part in ("train", "validation", "test", "all")}
    first = "all" if "all" in known else "train"
    if not parts[first]:
        raise InputError(where, expected="train/<class>/IMAGE", found="no images under train/", fix="name the training folder train/")
    classes = sorted({paths[position][1] for position in parts[first]})
    for part in ("validation", "test"):
        unknown = sorted({paths[position][1] for position in parts[part]} - set(classes))
        if unknown:
            raise InputError(
                f"{where}: {part}/{unknown[0]}",
                expected="only classes that train has",
                found=f"{', '.join(unknown[:5])}",
                fix="add them to train/ or remove them",
            )
    if len(classes) < 2:
        raise InputError(where, expected="at least two classes", found=f"one: {classes[0]}", fix="put each class into a folder of its own")
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[path[1]] for path in paths], dtype=np.int64)
    ordered = {
        part: np.array(sorted(positions, key=lambda position: paths[position][1:]), dtype=np.int64)
        for part, positions in parts.items()
        if positions
    }
    if first == "all":
        everything = ordered["all"]
        chosen = split_off_by_name(["/".join(paths[p][1:]) for p in everything], labels[everything], TEST_SHARE, TEST_SEED)
        ordered = {part: everything[positions] for part, positions in zip(("train", "test"), chosen, strict=True)}
    return Contents(tuple(classes), labels, ordered, test_is_made=first == "all")
