"""Which rows of a table do not belong beside the others, and why: other host, emulated, unstable, other images, tools or threads.

A row is held against the first row of its baseline; what differs is a warning on the row. Nothing is
left out for it: a table may well show two hosts, as long as it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vitedge.bench.compare import HOST, run_of
from vitedge.bench.records import Measurement
from vitedge.report.against import rows_named
from vitedge.report.cells import assigned
from vitedge.report.records import Against, Row, Table

MOST_NAMES = 3
# Beginnings of reasons in `vitedge.bench.compare`, and of the warnings here that say the same.
SAID = {
    "another host": ("another host",),
    "another run": ("another run",),
    "other images": ("other images", "images of another content"),
    "top-1 of this row": ("top-1 not measured",),
}


def with_warnings(table: Table) -> Table:
    """The table with every row's warnings; its comparisons must be there already."""
    measured = table.measured
    rows = [row if row.measurement is None else replace(row, warnings=tuple(_warn(row, _reference(row, measured)))) for row in table.rows]
    return replace(table, rows=tuple(rows))


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Each warning once, with the names of the rows it is about; `all rows` where it is about every one."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for text in row.warnings:
            found.setdefault(text, []).append(_name(row))
    count = sum(row.measurement is not None for row in rows)
    return [(text, names if len(names) < count or count == 1 else ["all rows"]) for text, names in found.items()]


def whom(names: Sequence[str]) -> str:
    """The rows a warning is about, in a line: the first of them, and how many more; the rows themselves carry it too."""
    shown = ", ".join(names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more rows"


def _name(row: Row) -> str:
    return row.name if row.measurement is None else f"{row.name}, batch {row.measurement.batch_size}"


def _reference(row: Row, measured: Sequence[Row]) -> Measurement | None:
    """The first row of the baseline, of the row's own study and device if there is one."""
    named = rows_named(row.baseline, row, measured)
    nearest = [other for other in named if other.device == row.device] or named or list(measured)
    return nearest[0].measurement


def _warn(row: Row, reference: Measurement | None) -> list[str]:
    own = row.measurement
    if own is None or reference is None:
        return []
    found = [f"made with less work than the full study: {row.budget}"] if row.budget else []
    if own.unstable:
        found.append(f"unstable: {own.unstable}")
    if own.emulated:
        found.append(_emulated(own.conditions))
    if own.top1_reason:
        found.append(f"top-1 not measured: {own.top1_reason}")
    if own is not reference:
        found += _differences(own, reference)
    found += _shaky_references(row)
    found += _not_compared(row, found)
    load, cores = own.conditions.get("load_average"), own.conditions.get("cores")
    if load and cores and load[0] > cores / 2:
        found.append(f"the host was busy before it was timed (load {load[0]:.2f} on {cores} cores)")
    return found


def _sides(row: Row) -> list[Against]:
    return [side for side in (row.against_baseline, row.against_untouched, row.against_continued) if side is not None]


def _shaky_references(row: Row) -> list[str]:
    """What its speed is compared with and did not settle: the ratio is no better than both."""
    references = [side.fastest for side in _sides(row) if side.fastest and side.fastest.measurement is not row.measurement]
    shaky = dict.fromkeys(other.name for other in references if other.measurement is not None and other.measurement.unstable)
    return [f"compared with an unstable figure: {name}" for name in shaky]


def _not_compared(row: Row, found: Sequence[str]) -> list[str]:
    """Why a ratio or a change is missing, where no other warning says so."""
    reasons = dict.fromkeys(said.reason for side in _sides(row) for said in (side.speed, side.flips) if said.reason)
    return [f"not compared: {reason}" for reason in reasons if not _is_said(reason, found)]


def _is_said(reason: str, found: Sequence[str]) -> bool:
    meant = next((warnings for beginning, warnings in SAID.items() if reason.startswith(beginning)), ())
    return any(text.startswith(warning) for text in found for warning in meant)


def _emulated(conditions: dict[str, Any]) -> str:
    reasons = [*conditions.get("mismatches", []), *(f"{name}={value}" for name, value in conditions.get("environment", {}).items())]
    return f"emulated: device {conditions.get('device')} is not the host it ran on ({'; '.join(reasons) or 'no reason kept'})"


def _differences(own: Measurement, reference: Measurement) -> list[str]:
    """What was not as for the baseline."""
    here, there = own.conditions, reference.conditions
    found = []
    if any(here.get(name) != there.get(name) for name in HOST):
        found.append(f"another host than the baseline's: {_host(here)}, not {_host(there)}")
    elif run_of(here) != run_of(there):
        found.append(f"another run than the baseline's: {here.get('date')}, not {there.get('date')}")
    if own.top1 is not None and reference.top1 is not None and _images(own, reference):
        found.append(_images(own, reference))
    if here.get("threads") != there.get("threads"):
        found.append(f"other threads than the baseline's: {here.get('threads')}, not {there.get('threads')}")
    for name, what in (("inherited", "engine variables"), ("gpus", "GPUs")):
        # Measurements of earlier versions do not say.
        if name in here and name in there and here[name] != there[name]:
            found.append(f"other {what} than the baseline's: {_listed(here[name])}, not {_listed(there[name])}")
    if here.get("commit") != there.get("commit"):
        found.append(f"another commit than the baseline's: {here.get('commit')}, not {there.get('commit')}")
    versions, others = here.get("versions", {}), there.get("versions", {})
    names = [name for name in sorted({*versions, *others}) if versions.get(name) != others.get(name)]
    if names:
        differing = [f"{name} {versions.get(name)}, not {others.get(name)}" for name in names]
        found.append(f"other versions than the baseline's: {'; '.join(differing)}")
    return found


def _images(own: Measurement, reference: Measurement) -> str:
    """Empty where both were judged on the same images, as far as is known."""
    if own.top1_images != reference.top1_images:
        return f"other images than the baseline's: {own.top1_images}, not {reference.top1_images}"
    known = own.answers is not None and reference.answers is not None
    if known and (own.answers or {}).get("images") != (reference.answers or {}).get("images"):
        return f"images of another content than the baseline's, though both are called {own.top1_images}"
    return ""


def _listed(values: dict[str, str] | list[str]) -> str:
    """Variables with their values, or names."""
    return (assigned(values) if isinstance(values, dict) else ", ".join(values)) or "none"


def _host(conditions: dict[str, Any]) -> str:
    return f"{conditions.get('cpu')}, {conditions.get('cores')} cores, {conditions.get('memory_mib')} MiB"


def conditions_of(rows: Sequence[Row]) -> list[list[str]]:
    """The conditions of each run and device, as lines; a latency without them is not a result."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.measurement is None:
            continue
        lines = _lines(row.measurement)
        found.setdefault("\n".join(lines), lines)
    return list(found.values())


def _lines(measurement: Measurement) -> list[str]:
    c = measurement.conditions
    versions = ", ".join(f"{name} {version}" for name, version in c.get("versions", {}).items())
    load = c.get("load_average") or [float("nan")]
    emulated = " (EMULATED)" if measurement.emulated else ""
    gpus, inherited = ", ".join(c.get("gpus") or []), assigned(c.get("inherited") or {})
    return [
        f"device {c.get('device')}{emulated}: {c.get('cpu')}, {c.get('threads')} threads of {c.get('cores')} usable cores, "
        f"{c.get('memory_mib')} MiB, {c.get('os')}, {f'{gpus}, ' if gpus else ''}governor {c.get('governor') or 'unknown'}, "
        f"load {load[0]:.2f} before{f'; inherited {inherited}' if inherited else ''}",
        f"{c.get('rounds')} rounds in turns, each a new process, at least {c.get('seconds')} s and {c.get('iterations')} inferences after "
        "warm-up; ratios paired over rounds, 95 % bootstrap interval (`vs fp32`: Student's t); `same` is a difference inside it",
        f"{versions}; vitedge commit {c.get('commit')}; seed {c.get('seed')}; {c.get('date')}",
    ]
