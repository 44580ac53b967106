"""Every row beside its baseline, and a study's rows beside the model untouched and the model continued in float.

A reference is a label or one row's whole name. Speed goes against the fastest artifact of that label at the same
batch size, on the same device, in any runtime and precision: what a user would have without the method. Answers
and size go against its fp32 file. A reference of which that row has none is said, never replaced by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitedge.bench.compare import Comparison, Flips, compare_answers, compare_speed, why_not_comparable
from vitedge.bench.records import Measurement
from vitedge.errors import UsageError, closest
from vitedge.report.records import Against, Row, Table


def with_comparisons(table: Table, baseline: str | None = None) -> Table:
    """The table with every row beside its references.

    Args:
        table: As it was read.
        baseline: Label or whole name of a row; None for the study's, and outside of a study the first fp32 row.

    Raises:
        UsageError: No measured row is called that.
        InputError: The answers kept with a row are damaged.
    """
    measured = table.measured
    if baseline is not None:
        _check(baseline, measured)
    default = _default(measured)
    rows = []
    for row in table.rows:
        if row.measurement is None:
            rows.append(row)
            continue
        name = baseline or row.baseline or default
        rows.append(
            replace(
                row,
                baseline=name,
                against_baseline=_against(row, name, measured),
                against_untouched=_against(row, row.untouched, measured) if row.untouched else None,
                against_continued=_against(row, row.continued, measured) if row.continued else None,
            )
        )
    return replace(table, rows=tuple(rows))


def _check(baseline: str, measured: Sequence[Row]) -> None:
    names = list(dict.fromkeys([row.label for row in measured] + [row.name for row in measured]))
    if baseline not in names:
        labels = list(dict.fromkeys(row.label for row in measured))
        raise UsageError(
            f"--baseline {baseline}",
            expected=f"the label or the whole name of a measured row, as {', '.join(labels[:8]) or '(none)'}",
            found=f"'{baseline}'{closest(baseline, names)}",
            fix="use a name from the table",
        )


def _default(measured: Sequence[Row]) -> str:
    """The first fp32 row's name, else the first row's: without a study nobody said which row is the baseline."""
    fp32 = [row for row in measured if row.measurement is not None and row.measurement.precision == "fp32"]
    return next((row.name for row in [*fp32, *measured]), "")


def _against(row: Row, name: str, measured: Sequence[Row]) -> Against:
    """One row beside the reference of that name."""
    own = row.measurement
    assert own is not None
    same_study = [other for other in measured if other.study == row.study] or list(measured)
    named = [other for other in same_study if name in (other.label, other.name)] or [o for o in measured if name in (o.label, o.name)]
    here = [other.measurement for other in named if other.device == row.device and other.measurement is not None]
    if not here:
        where = f"on {row.device}" if named else "at all"
        reason = f"{name} was not measured {where}"
        return Against(
            Comparison("not comparable", baseline=name, reason=reason), Flips("not comparable", baseline=name, reason=reason), None
        )
    plain = _fp32_of(here, own)
    same_batch = [m for m in here if m.batch_size == own.batch_size]
    # A recipe that was measured twice has a reference in each run; only that of its own run can be compared.
    same_batch = [m for m in same_batch if not why_not_comparable(own, m)] or same_batch
    if any(m is own for m in here) and (name == row.name or _is_fastest(own, same_batch)):
        speed = Comparison("baseline", 1.0, 1.0, 1.0, name)
    elif not same_batch:
        speed = Comparison("not comparable", baseline=name, reason=f"{name} was not measured at batch size {own.batch_size}")
    else:
        speed = compare_speed(own, max(same_batch, key=lambda m: m.images_per_s), name)
    # Its own batch sizes share one judging, and are one row of answers.
    flips = Flips("baseline", baseline=name) if plain.sha256 == own.sha256 and _place(plain) == _place(own) else None
    return Against(speed, flips or compare_answers(own, plain, name), own.size_bytes / plain.size_bytes if plain.size_bytes else None)


def _is_fastest(own: Measurement, others: Sequence[Measurement]) -> bool:
    return max(others, key=lambda m: m.images_per_s) is own


def _fp32_of(measurements: Sequence[Measurement], own: Measurement) -> Measurement:
    """The reference for answers and size: its fp32 row in the same runtime, else in ONNX Runtime, else any fp32, else its first."""
    fp32 = [m for m in measurements if m.precision == "fp32" == m.float_precision and not is_quantized(m)] or list(measurements)
    for runtime in (own.runtime, "onnxruntime"):
        for m in fp32:
            if m.runtime == runtime:
                return m
    return fp32[0]


def _place(measurement: Measurement) -> tuple[str, str, str, str]:
    return (measurement.runtime, measurement.provider, measurement.precision, measurement.float_precision)


def is_quantized(measurement: Measurement) -> bool:
    """Whether a quantizer made the file: it ran in integers, or its name says so (packed weights run in float)."""
    return measurement.precision.startswith("int") or any(
        part.startswith("int") and part[3:4].isdigit() for part in measurement.artifact.split(".")
    )
