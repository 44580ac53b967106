"""Measurements as JSON: what `--json` prints, and the `report.json` of a build folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitedge.artifact import read_json, write_text
from vitedge.bench.records import SCHEMA_VERSION, Measurement, Skipped, key_of
from vitedge.errors import InputError

REPORT = "report.json"
# A raw line break is never inside a JSON string, so this cannot touch text.
_NUMBERS = re.compile(r"\[\n\s*((?:[-+.\deE]+,\n\s*)*[-+.\deE]+)\n\s*\]")


def to_plain(measurements: Sequence[Measurement], skipped: Sequence[Skipped]) -> dict[str, Any]:
    """The whole result as plain data."""
    return {
        "schema_version": SCHEMA_VERSION,
        "measurements": [measurement.to_plain() for measurement in measurements],
        "skipped": [asdict(one) for one in skipped],
    }


def read_report(folder: Path) -> list[dict[str, Any]]:
    """The measurements of a build folder as plain data; empty where nothing was measured.

    Raises:
        InputError: The report is damaged or of another version.
    """
    path = folder / REPORT
    if not path.exists():
        return []
    content = read_json(path)
    if (
        not isinstance(content, dict)
        or content.get("schema_version") != SCHEMA_VERSION
        or not isinstance(content.get("measurements"), list)
    ):
        raise InputError(
            str(path),
            expected=f"a report of schema_version {SCHEMA_VERSION}",
            found="something else",
            fix="remove it and run `vitedge bench` again",
        )
    measurements: list[dict[str, Any]] = content["measurements"]
    return measurements


def merge_report(folder: Path, measurements: Sequence[Measurement]) -> Path:
    """Add measurements to a build folder's report; the newest of an artifact, runtime, provider, precision, batch size and device stays.

    A figure that was not taken this time (`--no-top1`) is not carried over from the older measurement:
    it may be of another file.

    Raises:
        InputError: The report that is there is damaged.
        OutputError: It cannot be written.
    """
    merged = {key_of(plain): plain for plain in read_report(folder)}
    merged.update({measurement.key: measurement.to_plain() for measurement in measurements})
    path = folder / REPORT
    write_text(path, dump({"schema_version": SCHEMA_VERSION, "measurements": [merged[key] for key in sorted(merged)]}))
    return path


def dump(content: Any) -> str:
    """Indented JSON with every list of numbers on one line: samples are many."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    return _NUMBERS.sub(lambda match: "[" + re.sub(r"\n\s*", " ", match.group(1)) + "]", text) + "\n"
