"""Which measured artifact is shipped: the fastest on the device inside the recipe's limits, and why.

Pure decisions over the rows of `report.json`; nothing is opened or run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitedge.device import Budgets
from vitedge.errors import GateError, InputError, UsageError
from vitedge.recipe import Limits

BUNDLE_RUNTIMES = ("onnxruntime", "openvino")  # those the travelling runner can open


@dataclass(frozen=True)
class Measured:
    """One row of the report, as far as the choice needs it.

    Attributes:
        artifact: Name in the build folder.
        runtime, provider, precision, float_precision: What really ran.
        iterations_per_s: At batch 1.
        top1: Percent, None where it was not measured.
        top1_drop: Points below fp32 on the same images, None where it is not known.
        top1_agreement: Percent of images classified as fp32 does, None where it was not measured.
        sha256: Of the artifact when it was measured.
        plain: The whole row.
    """

    artifact: str
    runtime: str
    provider: str
    precision: str
    float_precision: str
    iterations_per_s: float
    top1: float | None
    top1_drop: float | None
    top1_agreement: float | None
    sha256: str
    plain: Mapping[str, Any]

    @property
    def label(self) -> str:
        """`artifact (runtime precision)`."""
        mixed = f"+{self.float_precision}" if self.precision not in (self.float_precision, "") and self.float_precision != "fp32" else ""
        return f"{self.artifact} ({self.runtime} {self.precision}{mixed})"


@dataclass(frozen=True)
class Choice:
    """What is shipped.

    Attributes:
        row: The measurement that won.
        why: One line.
        passed_over: One line for each faster row that was not taken.
    """

    row: Measured
    why: str
    passed_over: tuple[str, ...]


def read_rows(report: Any, device: str, where: str) -> list[Measured]:
    """Rows of a report that were measured at batch 1 on a device profile and gave a figure.

    Raises:
        InputError: The report is damaged or of another version.
    """
    try:
        if report["schema_version"] != 1:
            raise ValueError(f"schema_version {report['schema_version']}")
        plain = [row for row in report["measurements"] if row["conditions"]["device"] == device and row["batch_size"] == 1]
        return [_row(row) for row in plain if row.get("iterations_per_s")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(where, expected="a report of version 1", found=repr(error), fix="measure again with `vitedge bench`") from error


def _row(row: Mapping[str, Any]) -> Measured:
    drop = row.get("top1_drop")
    points = float(drop["points"]) if drop else None
    # The fp32 row that drops are measured from has none of its own; its agreement is with itself. A file of packed weights
    # multiplies in fp32 too, and is not that row.
    is_float = row["precision"] == "fp32" and not any(kind.endswith("_weights") for kind in row.get("node_counts") or {})
    if points is None and row.get("top1") is not None and is_float and row.get("top1_agreement") in (None, 100.0):
        points = 0.0
    return Measured(
        artifact=str(row["artifact"]),
        runtime=str(row["runtime"]),
        provider=str(row["provider"]),
        precision=str(row["precision"]),
        float_precision=str(row.get("float_precision") or ("fp32" if row["precision"].startswith("int") else row["precision"])),
        iterations_per_s=float(row["iterations_per_s"]),
        top1=row.get("top1"),
        top1_drop=points,
        top1_agreement=row.get("top1_agreement"),
        sha256=str(row["sha256"]),
        plain=row,
    )


def why_not(row: Measured, limits: Limits, budgets: Budgets, has_top1: bool) -> str:
    """What keeps a row from being shipped, empty where nothing does.

    Args:
        row: The measurement.
        limits: The recipe's.
        budgets: The device's.
        has_top1: Whether any row of the device has a measured top-1: then one without is not taken.
    """
    if row.runtime not in BUNDLE_RUNTIMES:
        return f"a bundle runs {' or '.join(BUNDLE_RUNTIMES)}, not {row.runtime}"
    if row.top1_drop is not None and row.top1_drop > limits.max_top1_drop:
        return f"top-1 drop {row.top1_drop:.2f} > {limits.max_top1_drop:.2f} points"
    if row.top1_drop is None and (has_top1 or row.top1_agreement is not None):
        return "its top-1 drop was not measured"
    latency = row.plain.get("latency_ms") or {}
    for name, allowed, found in (
        ("size", budgets.size_mib, row.plain.get("size_bytes", 0) / 2**20),
        ("p50 latency", budgets.latency_ms, latency.get("p50") or 1000.0 / row.iterations_per_s),
        ("peak memory", budgets.peak_rss_mib, row.plain.get("peak_rss_mib")),
    ):
        if allowed is not None and (found is None or found > allowed):
            unit = "ms" if name == "p50 latency" else "MiB"
            return f"{name} {'not measured' if found is None else f'{found:.1f} > {allowed:.1f} {unit}'}"
    return ""


def choose(rows: Sequence[Measured], limits: Limits, budgets: Budgets) -> Choice:
    """The fastest row inside the limits and budgets.

    Raises:
        GateError: None is inside; the line gives the reason of the fastest.
    """
    has_top1 = any(row.top1 is not None for row in rows)
    ordered = sorted(rows, key=lambda row: (-row.iterations_per_s, row.label))
    judged = [(row, why_not(row, limits, budgets, has_top1)) for row in ordered]
    inside = [row for row, reason in judged if not reason]
    if not inside:
        raise GateError(
            "package",
            expected="a measured artifact inside the recipe's limits and the device's budgets",
            found="; ".join(f"{row.label}: {reason}" for row, reason in judged),
            fix="change the recipe, raise its limits, or name an artifact with --artifact",
        )
    best = inside[0]
    faster = [(row, reason) for row, reason in judged if row.iterations_per_s > best.iterations_per_s]
    passed_over = tuple(f"{row.label} faster at {row.iterations_per_s:.1f} it/s but {reason}" for row, reason in faster)
    over = f" over {inside[1].label} at {inside[1].iterations_per_s:.1f}" if len(inside) > 1 else ""
    return Choice(best, "; ".join([f"chosen {best.label} at {best.iterations_per_s:.1f} it/s{over}", *passed_over]), passed_over)


def current_rows(rows: Sequence[Measured], sha256_of: Mapping[str, str], device: str) -> list[Measured]:
    """Rows whose artifact is still the file that was measured.

    Raises:
        UsageError: Nothing was measured on that device, or everything has changed since.
    """
    current = [row for row in rows if sha256_of.get(row.artifact) == row.sha256]
    if not current:
        found = "every artifact has changed since it was measured" if rows else "none"
        raise UsageError(
            "package", expected=f"batch-1 measurements on device '{device}'", found=found, fix=f"run: vitedge bench --device {device}"
        )
    return current
