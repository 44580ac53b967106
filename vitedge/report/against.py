"""Every row beside its baseline, and a study's rows beside the model untouched and the model continued in float.

A reference is a label or one row's whole name. Speed goes against the fastest artifact of that label at the same
batch size, on the same device, in any runtime and precision: what a user would have without the method. Answers
and size go against its fp32 file. Both are kept with the comparison by name. A reference that the row's device has
none of is said, never replaced by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitedge.bench.compare import Comparison, Flips, compare_answers, compare_speed, run_of, why_not_comparable
from vitedge.bench.records import Measurement
from vitedge.errors import UsageError, closest
from vitedge.report.records import Against, Row, Table


def with_comparisons(table: Table, baseline: str | None = None) -> Table:
    """The table with every row beside its references.

    Args:
        table: As it was read.
        baseline: Label or whole name of a row; None for the study's, and outside of a study each device's first fp32 row.

    Raises:
        UsageError: No measured row is called that.
        InputError: The answers kept with a row are damaged.
    """
    measured = table.measured
    if baseline is not None:
        _check(baseline, measured)
    rows = []
    for row in table.rows:
        if row.measurement is None:
            rows.append(row)
            continue
        name = baseline or row.baseline or _default(row, measured)
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


def _default(row: Row, measured: Sequence[Row]) -> str:
    """The name of the first fp32 row of the same device, of ONNX Runtime if there is one: without a study nobody said which it is."""
    here = [other for other in measured if other.device == row.device]
    return min(here, key=lambda other: (not _is_plain(other), not _runs_in(other, "onnxruntime"))).name


def rows_named(name: str, row: Row, measured: Sequence[Row]) -> list[Row]:
    """What a row's reference of that name or label may be: in its own study, else wherever there is one."""
    named = [other for other in measured if name in (other.label, other.name)]
    return [other for other in named if other.study == row.study] or named


def _against(row: Row, name: str, measured: Sequence[Row]) -> Against:
    """One row beside the reference of that name."""
    own = row.measurement
    assert own is not None
    named = rows_named(name, row, measured)
    here = [other for other in named if other.device == row.device]
    if not here:
        where = f"on {row.device}" if named else "at all"
        reason = f"{name} was not measured {where}"
        return Against(Comparison("not comparable", baseline=name, reason=reason), Flips("not comparable", baseline=name, reason=reason))
    plain = min(here, key=lambda other: _unlike_plain(other, own))
    fastest = _fastest(here, own)
    if fastest is None:
        speed = Comparison("not comparable", baseline=name, reason=f"{name} was not measured at batch size {own.batch_size}")
    elif fastest is row or (name == row.name and not why_not_comparable(own, _of(fastest))):
        speed = Comparison("baseline", 1.0, 1.0, 1.0, name)
    else:
        speed = compare_speed(own, _of(fastest), name)
    other = _of(plain)
    # Its own batch sizes share one judging, and are one row of answers.
    flips = Flips("baseline", baseline=name) if other.sha256 == own.sha256 and _place(other) == _place(own) else None
    size_ratio = own.size_bytes / other.size_bytes if other.size_bytes else None
    return Against(speed, flips or compare_answers(own, other, name), size_ratio, fastest, plain)


def _fastest(here: Sequence[Row], own: Measurement) -> Row | None:
    """The fastest of a reference's rows at the same batch size, of the same run where it was measured in several; None without any."""
    same_batch = [other for other in here if _of(other).batch_size == own.batch_size]
    same_batch = [other for other in same_batch if not why_not_comparable(own, _of(other))] or same_batch
    return max(same_batch, key=lambda other: _of(other).images_per_s, default=None)


def _unlike_plain(row: Row, own: Measurement) -> tuple[bool, ...]:
    """Smallest for the row that answers and size are best held against: fp32, judged on the same images, of the same run and runtime."""
    m = _of(row)
    images = (own.answers or {}).get("images")
    return (
        not _is_plain(row),
        images is not None and (m.answers or {}).get("images") != images,
        m.top1 is None,
        run_of(m.conditions) != run_of(own.conditions),
        m.runtime != own.runtime,
        m.runtime != "onnxruntime",
    )


def _of(row: Row) -> Measurement:
    assert row.measurement is not None
    return row.measurement


def _is_plain(row: Row) -> bool:
    m = _of(row)
    return m.precision == "fp32" == m.float_precision and not is_quantized(m)


def _runs_in(row: Row, runtime: str) -> bool:
    return _of(row).runtime == runtime


def _place(measurement: Measurement) -> tuple[str, str, str, str]:
    return (measurement.runtime, measurement.provider, measurement.precision, measurement.float_precision)


def is_quantized(measurement: Measurement) -> bool:
    """Whether a quantizer made the file: it ran in integers, or its name says so (packed weights run in float)."""
    return measurement.precision.startswith("int") or any(
        part.startswith("int") and part[3:4].isdigit() for part in measurement.artifact.split(".")
    )
