"""Where rows were measured: the device profile and the host, named so that no two places share a name."""

from __future__ import annotations

from collections.abc import Sequence

from vitedge.bench.compare import HOST
from vitedge.report.records import Row

Place = tuple[object, ...]


def place_of(row: Row) -> Place:
    """Equal for rows of one profile on one host, whose speeds belong on one axis."""
    conditions = row.measurement.conditions if row.measurement else {}
    return (row.device, *(conditions.get(name) for name in HOST))


def place_names(rows: Sequence[Row]) -> dict[Place, str]:
    """What each place is called: the profile, `(emulated)` where it is, and the host where one profile was measured on several."""
    measured = [row for row in rows if row.measurement is not None]
    firsts: dict[Place, Row] = {}
    for row in measured:
        firsts.setdefault(place_of(row), row)
    devices = [row.device for row in firsts.values()]
    emulated = {place_of(row) for row in measured if row.measurement and row.measurement.emulated}
    names: dict[Place, str] = {}
    for place, row in firsts.items():
        name = f"{row.device}{' (emulated)' if place in emulated else ''}"
        if devices.count(row.device) > 1:
            name = f"{name} on {_host(row)}"
        names[place] = name if name not in names.values() else f"{name}, host {len(names) + 1}"
    return names


def _host(row: Row) -> str:
    conditions = row.measurement.conditions if row.measurement else {}
    return f"{conditions.get('cpu')}, {conditions.get('cores')} cores"
