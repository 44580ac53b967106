"""What a measurement's types do not say: figures that can be divided and drawn, and conditions of the shape that reports read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from vitedge.bench.answers import unpack
from vitedge.bench.records import Measurement
from vitedge.errors import InputError

SHAPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("versions", "environment", "inherited"), (dict,)),
    **dict.fromkeys(("mismatches", "load_average", "gpus"), (list,)),
}


def what_is_wrong(measurement: Measurement) -> str:
    """Why a report cannot show the measurement; empty where it can."""
    m = measurement
    if not m.rounds:
        return "rounds: none"
    rates = [m.images_per_s, m.iterations_per_s, *(one.get("iterations_per_s") for one in m.rounds)]
    for name, values in (("rates", rates), ("samples_ms", (sample for samples in m.samples_ms for sample in samples))):
        if not _all_positive(values):
            return f"{name}: expected finite numbers above 0"
    if m.size_bytes < 1:
        return f"size_bytes: expected 1 or more, found {m.size_bytes}"
    for name, types in SHAPES.items():
        value = m.conditions.get(name)
        if value is not None and not isinstance(value, types):
            return f"conditions.{name}: expected a {types[0].__name__}, found {type(value).__name__}"
    load = m.conditions.get("load_average") or []
    if not all(_is_number(value) for value in load):
        return "conditions.load_average: expected numbers"
    return _wrong_answers(m)


def _wrong_answers(measurement: Measurement) -> str:
    if measurement.answers is None:
        return ""
    try:
        unpack(measurement.answers, "answers")
    except InputError as error:
        return f"answers: {error.found}"
    return ""


def _all_positive(values: Iterable[Any]) -> bool:
    return all(_is_number(value) and value > 0 for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
