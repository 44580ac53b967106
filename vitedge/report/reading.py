"""Reads whatever holds measurements into one table: build folders, the JSON of a bench, studies, and folders of those.

A study's `results.json`: `schema_version`, `study`, `baseline` (a label), `budget`, and `rows`, each with
`label`, `recipe`, `device`, `measurements` (as `vitedge bench --json` has them) or `failure`, and where the study
has them `paper`, `untouched`, `continued`, `budget`, `notes` and `build` (the build folder, from the study's).
One file that cannot be read is one line, and the others are read all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vitedge.artifact import MANIFEST, read_json
from vitedge.bench.records import SCHEMA_VERSION, Measurement
from vitedge.errors import InputError, UsageError
from vitedge.report.checking import what_is_wrong
from vitedge.report.json_file import REPORT
from vitedge.report.naming import named_apart
from vitedge.report.records import Row, Table

RESULTS, ONLY = "results.json", "results.only.json"  # of a study, whole or of the rows that --only named
SEARCHED = "search.json"
DEEPEST = 3  # folders below the one that was named


@dataclass
class _Found:
    """What was read so far."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)


def read(paths: Sequence[Path], pictures: Path | None = None) -> Table:
    """The measurements in these places.

    Args:
        paths: Build folders, JSON of `vitedge bench`, `results.json` of studies or their folders, and folders of those.
        pictures: Folder of pictures to show beside those found.

    Raises:
        InputError: Nothing could be read; says why for the first file.
        UsageError: Nothing that was named holds a measurement.
    """
    found = _Found()
    for path in dict.fromkeys(paths):
        _read_one(path, found)
    rows = named_apart(_once(found.rows))
    if not rows and found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise InputError("report", expected="measurements", found=f"{found.problems[0]}{more}", fix="mend or leave out the file")
    if not rows:
        raise UsageError(
            ", ".join(str(path) for path in paths),
            expected="measurements: a build folder, the JSON of a bench, or a study",
            found="none",
            fix="run `vitedge bench` or `vitedge study` first",
        )
    labels = list(dict.fromkeys(row.label for row in rows))
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    title = " and ".join(dict.fromkeys(found.titles)) or f"{', '.join(labels[:3])}{more}"
    return Table(title, tuple(rows), tuple(found.problems), tuple(found.left_out), pictures)


def _read_one(path: Path, found: _Found) -> None:
    """A file, a build folder, a study's folder, or a folder of those."""
    if path.is_file():
        _read_file(path, found, named=True)
    elif known := _known(path):
        _read_file(known, found, named=True)
    elif (path / SEARCHED).is_file():
        before = len(found.rows)
        _read_inside(path, found, DEEPEST)
        if len(found.rows) == before:
            text = "a search, whose trials were timed in runs of their own; measure its builds in one run"
            found.problems.append(f"{path}: {text}: vitedge bench {path / 'trials'}/*")
    elif (path / MANIFEST).is_file():
        found.problems.append(f"{path}: built and not measured; run `vitedge bench {path}`")
    else:
        _read_inside(path, found, DEEPEST)


def _read_inside(folder: Path, found: _Found, deepest: int) -> None:
    """The builds and studies in a folder, its own JSON files, and what is in its folders: `build/` keeps studies in one of their own."""
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        if known := _known(child):
            _read_file(known, found, named=True)
        elif deepest > 1 and not (child / MANIFEST).is_file() and not child.is_symlink():
            _read_inside(child, found, deepest - 1)
    for file in sorted(folder.glob("*.json")):
        _read_file(file, found, named=False)


def _known(folder: Path) -> Path | None:
    """The file that a build or study keeps its measurements in, None where the folder is neither or was not measured."""
    return next((folder / name for name in (RESULTS, ONLY, REPORT) if (folder / name).is_file()), None)


def _read_file(path: Path, found: _Found, named: bool) -> None:
    """One JSON file; in a folder that was named, one that is no result is left out and said so."""
    try:
        content = read_json(path)
        if not isinstance(content, dict) or not ("study" in content or isinstance(content.get("measurements"), list)):
            text = "no measurements of vitedge"
            (found.problems if named else found.left_out).append(f"{path}: {text}")
            return
        if content.get("schema_version") != SCHEMA_VERSION:
            found.problems.append(f"{path}: expected schema_version {SCHEMA_VERSION}, found {content.get('schema_version')!r}")
            return
        found.rows += _study_rows(content, path, found) if "study" in content else _bench_rows(content, path, found)
    except InputError as error:
        found.problems.append(str(error))


def _bench_rows(content: dict[str, Any], path: Path, found: _Found) -> list[Row]:
    """Rows of a bench, those that failed too; what a device never offered is part of the bench's own table alone."""
    build = path.parent if path.name == REPORT and (path.parent / MANIFEST).is_file() else None
    rows = []
    for index, plain in enumerate(content["measurements"]):
        measurement = _measurement(plain, f"{path}: measurements.{index}", found)
        if measurement is not None:
            label = measurement.recipe or measurement.artifact
            rows.append(Row(label, measurement.recipe, _device(measurement), str(path), measurement, build=build))
    skipped = content.get("skipped")
    for plain in skipped if isinstance(skipped, list) else []:
        if isinstance(plain, dict) and plain.get("failed"):
            rows.append(Row(str(plain.get("artifact")), "", "", str(path), failure=str(plain.get("reason")), build=build))
    return rows


def _study_rows(content: dict[str, Any], path: Path, found: _Found) -> list[Row]:
    study = str(content["study"])
    found.titles.append(study)
    listed = content.get("rows")
    if not isinstance(listed, list) or not all(isinstance(plain, dict) for plain in listed):
        raise InputError(str(path), expected="a study's `rows`", found="none", fix="run `vitedge study` again")
    rows = []
    for index, plain in enumerate(listed):
        label = str(plain.get("label") or plain.get("recipe") or f"row {index + 1}")
        paper = plain["paper"] if isinstance(plain.get("paper"), dict) else {}
        row = Row(
            label,
            str(plain.get("recipe") or ""),
            str(plain.get("device") or ""),
            str(path),
            failure=str(plain.get("failure") or ""),
            study=study,
            paper={str(name): float(value) for name, value in paper.items() if isinstance(value, (int, float))},
            method_seconds=_method_seconds(plain.get("notes")),
            budget=str(plain.get("budget") or content.get("budget") or ""),
            baseline=str(plain.get("baseline") or content.get("baseline") or ""),
            untouched=str(plain.get("untouched") or ""),
            continued=str(plain.get("continued") or ""),
            build=path.parent / str(plain["build"]) if plain.get("build") else None,
        )
        where = f"{path}: rows.{index}.measurements"
        listed_here = plain.get("measurements") or []
        if not isinstance(listed_here, list):
            raise InputError(where, expected="a list", found=type(listed_here).__name__, fix="run `vitedge study` again")
        measurements = [_measurement(one, f"{where}.{n}", found) for n, one in enumerate(listed_here)]
        measured = [one for one in measurements if one is not None]
        rows += [replace(row, measurement=one, device=_device(one), failure="") for one in measured]
        if not measured:
            rows.append(row if row.failure else replace(row, failure="not measured yet"))
    return rows


def _method_seconds(notes: Any) -> float | None:
    """What the techniques of a row's recipe took by their own notes, s."""
    steps = notes.get("steps") if isinstance(notes, dict) else None
    told = [
        (name, said.get("seconds"))
        for step in steps or []
        if isinstance(step, dict)
        for name, said in step.items()
        if isinstance(said, dict)
    ]
    seconds = [float(value) for name, value in told if name != "train" and isinstance(value, (int, float))]
    return sum(seconds) if seconds else None


def _measurement(plain: Any, where: str, found: _Found) -> Measurement | None:
    """One measurement, or a line in `problems`."""
    try:
        measurement = Measurement.from_plain(plain)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        found.problems.append(f"{where}{f'.{path}' if path else ''}: no measurement of vitedge: {first['msg']}")
        return None
    wrong = what_is_wrong(measurement)
    if wrong:
        found.problems.append(f"{where}: a damaged measurement: {wrong}")
    return None if wrong else measurement


def _device(measurement: Measurement) -> str:
    return str(measurement.conditions.get("device") or "unknown")


def _once(rows: Sequence[Row]) -> list[Row]:
    """Every measurement once: a study's build folders may be named beside it. Two rows of a study may share one."""
    in_studies = {_identity(row) for row in rows if row.study}
    kept: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.measurement is None:
            kept.setdefault((row.label, row.device, row.study, row.failure), row)
        elif row.study or _identity(row) not in in_studies:
            kept.setdefault((*_identity(row), row.label, row.study), row)
    return list(kept.values())


def _identity(row: Row) -> tuple[object, ...]:
    m = row.measurement
    if m is None:
        return ()
    return (m.sha256, m.runtime, m.provider, m.precision, m.float_precision, m.batch_size, row.device, m.conditions.get("date"))
