"""Training curves out of the `metrics.jsonl` of build folders, thinned to what a plot can show."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
MANY = 250  # points of a curve that a plot can show
ALL = 12_000  # of all curves of one plot, which a page carries
FEWEST = 20
DIGITS = 5  # of a value: more than a plot can show


@dataclass(frozen=True)
class Curve:
    """One metric of one build.

    Attributes:
        build: Name of the build folder.
        steps: Optimizer steps over all stages of the training.
        values: As many.
        of: How many there were before thinning.
    """

    build: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    of: int


def read_curves(builds: Sequence[Path], metric: str) -> tuple[list[Curve], list[str]]:
    """The curves of a metric, and a line for each file that is damaged.

    Args:
        builds: Build folders; those without a training have no curve.
        metric: `loss`, `validation_top1` ...
    """
    most = min(MANY, max(FEWEST, ALL // max(1, len(builds))))
    curves: list[Curve] = []
    problems: list[str] = []
    for build in builds:
        path = build / METRICS
        if not path.is_file():
            continue
        try:
            lines = _read(path)
        except (OSError, ValueError) as error:
            problems.append(f"{path}: damaged ({error})")
            continue
        points = _points(lines, metric)
        if points:
            # The last point is the training's result, so it is always among those kept.
            kept = points[:: -(-len(points) // most)]
            kept += [] if kept[-1] is points[-1] else [points[-1]]
            values = tuple(float(f"{value:.{DIGITS}g}") for _, value in kept)
            curves.append(Curve(build.name, tuple(step for step, _ in kept), values, len(points)))
    return curves, problems


def _read(path: Path) -> list[dict[str, Any]]:
    rows = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
            if not (isinstance(line, dict) and isinstance(line.get("stage"), int) and isinstance(line.get("step"), int)):
                raise ValueError("no object with a stage and a step")
            lines.append(line)
        except ValueError as error:
            if number < len(rows):  # the last row ends in no newline: it is empty, or was cut off by a kill
                raise ValueError(f"line {number}: {error}") from error
    return lines


def _points(lines: Sequence[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """Step over all stages and value, stage after stage."""
    points: list[tuple[int, float]] = []
    first = 0
    for stage in sorted({line["stage"] for line in lines}):
        own = [line for line in lines if line["stage"] == stage]
        points += [(first + line["step"], float(line[metric])) for line in own if _is_number(line.get(metric))]
        first += max(line["step"] for line in own)
    return points


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
