"""How figures are written in every format that people read: few digits, an interval beside each, and `same` inside the noise."""

from __future__ import annotations

from collections.abc import Mapping

from vitedge.bench.compare import Comparison, Flips
from vitedge.bench.records import Difference, Measurement, Verdict

NONE = "-"
MIB = 2**20


def short(value: float | None) -> str:
    """Three digits or so: `612`, `81.4`, `3.02`, `0.062`."""
    if value is None:
        return NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def points(value: float) -> str:
    """Percentage points with two digits; never `-0.00`."""
    return f"{value:.2f}".replace("-0.00", "0.00")


def signed(value: float) -> str:
    """A change in points with its sign: `+0.12`, `-1.30`, `0.00`."""
    text = points(value)
    return text if text.startswith("-") or text == "0.00" else f"+{text}"


def ratio(value: float | None) -> str:
    """`x1.31`."""
    return NONE if value is None else f"x{value:.2f}"


def interval(low: float | None, high: float | None, sign: bool = False) -> str:
    """`1.20 to 1.41`; empty where there is none."""
    if low is None or high is None:
        return ""
    write = signed if sign else points
    return f"{write(low)} to {write(high)}"


def speed(said: Comparison | Verdict | None) -> tuple[str, str]:
    """`faster x1.31` and its interval; `same` says that the interval covers 1."""
    if said is None or said.ratio is None:
        return (NONE if said is None or said.relation == "unknown" else said.relation), ""
    if said.relation == "baseline":
        return "baseline", ""
    word = "?" if said.relation == "unknown" else said.relation
    return f"{word} {ratio(said.ratio)}", interval(said.low, said.high)


def change(said: Flips | None) -> tuple[str, str]:
    """`worse -1.30` and its interval; `same` says that the interval covers 0."""
    if said is None:
        return NONE, ""
    if said.change is None:
        return said.relation, ""
    return f"{said.relation} {signed(said.change)}", interval(said.low, said.high, sign=True)


def drop(found: Difference | None) -> tuple[str, str]:
    """Points below the fp32 file of the same recipe, and the interval; `same` says that it covers 0."""
    if found is None:
        return NONE, ""
    return f"{'same ' if found.low <= 0 <= found.high else ''}{points(found.points)}", interval(found.low, found.high)


def top1(measurement: Measurement) -> tuple[str, str]:
    """Percent, and its interval with one digit."""
    if measurement.top1 is None or measurement.top1_interval is None:
        return NONE, ""
    low, high = measurement.top1_interval
    return f"{measurement.top1:.2f}", f"{low:.1f} to {high:.1f}"


def p_value(p: float | None) -> str:
    """`0.21`, `0.003`, or `< 0.001`."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def rate(measurement: Measurement) -> str:
    """Images per second; `!` marks one that did not settle."""
    return f"{short(measurement.images_per_s)}{'!' if measurement.unstable else ''}"


def mib(measurement: Measurement) -> str:
    """Size on disk, MiB."""
    return short(measurement.size_bytes / MIB)


def assigned(variables: Mapping[str, str]) -> str:
    """`NAME=value` of each, as a shell would have them."""
    return " ".join(f"{name}={value}" for name, value in variables.items())
