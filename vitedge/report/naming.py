"""Rows of one name are taken for one model, so that those that are not are given names of their own before anything is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vitedge.report.records import Row

Origin = tuple[str, str]  # a study's name and the file it was read from


def named_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of studies by their study where several have a label, those of builds by their folder where their files differ."""
    return _builds_apart(_studies_apart(rows))


def _builds_apart(rows: Sequence[Row]) -> list[Row]:
    files: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        if row.measurement is not None and not row.study:
            files.setdefault(row.label, {}).setdefault(row.measurement.artifact, set()).add(row.measurement.sha256)
    clashing = {label for label, hashes in files.items() if any(len(each) > 1 for each in hashes.values())}
    places = {label: shortest_apart([_place(row) for row in rows if row.label == label and not row.study]) for label in clashing}
    return [row if row.study or row.label not in clashing else _labelled(row, places[row.label][_place(row)]) for row in rows]


def _place(row: Row) -> Path:
    return Path(row.source).with_suffix("") if row.build is None else row.build


def _labelled(row: Row, place: str) -> Row:
    return row if place == row.label else replace(row, label=f"{row.label} ({place})")


def shortest_apart(paths: Sequence[Path]) -> dict[Path, str]:
    """For each path as many of its last parts as tell all of them apart, or the whole path."""
    different = list(dict.fromkeys(paths))
    longest = max((len(path.parts) for path in different), default=0)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in different]
        if len(set(names)) == len(names):
            return dict(zip(different, names, strict=True))
    return {path: str(path) for path in different}


def _studies_apart(rows: Sequence[Row]) -> list[Row]:
    """Studies of one name are called by their folders too, and labels that several studies have by their study."""
    origins = list(dict.fromkeys((row.study, row.source) for row in rows if row.study))
    names = _origin_names(origins)
    having: dict[str, set[Origin]] = {}
    for row in rows:
        if row.study:
            having.setdefault(row.label, set()).add((row.study, row.source))
    clashing = {label for label, found in having.items() if len(found) > 1}

    def label_in(name: str, label: str) -> str:
        return f"{label} ({name})" if label in clashing else label

    made = []
    for row in rows:
        if row.study:
            name = names[row.study, row.source]
            row = replace(
                row,
                study=name,
                label=label_in(name, row.label),
                baseline=label_in(name, row.baseline),
                untouched=label_in(name, row.untouched),
                continued=label_in(name, row.continued),
            )
        made.append(row)
    return made


def _origin_names(origins: Sequence[Origin]) -> dict[Origin, str]:
    studies = [study for study, _ in origins]
    made = {}
    for study, source in origins:
        folders = shortest_apart([Path(other).parent for one, other in origins if one == study])
        made[study, source] = study if studies.count(study) == 1 else f"{study}, {folders[Path(source).parent]}"
    return made
