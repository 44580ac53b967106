"""The columns of CSV and JSON: a name with its unit, what it says, and where it comes from. None is an empty cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vitedge.bench.compare import Comparison, Flips
from vitedge.bench.records import Measurement
from vitedge.report.cells import MIB
from vitedge.report.records import Against, Row

Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: With the unit in it.
        doc: What it says, in a line.
        value: Its cell of a row.
    """

    name: str
    doc: str
    value: Callable[[Row], Any]


def _row(name: str, doc: str) -> Column:
    return Column(name, doc, lambda row: getattr(row, name) or None)


def _measured(name: str, doc: str, value: Callable[[Measurement], Any] | None = None) -> Column:
    read = value or (lambda m: getattr(m, name))
    return Column(name, doc, lambda row: None if row.measurement is None else read(row.measurement))


def _condition(name: str, doc: str, key: str | None = None) -> Column:
    return _measured(name, doc, lambda m: m.conditions.get(key or name))


def _paper(name: str, key: str, doc: str) -> Column:
    return Column(name, doc, lambda row: row.paper.get(key))


def _count(said: Flips, count: int) -> int | None:
    """A count is 0 where nothing was compared, which is no figure."""
    return None if said.change is None else count


def _references(which: str, whom: str) -> list[Column]:
    """The columns that put a row beside one reference."""

    def beside(row: Row) -> Against | None:
        found: Against | None = getattr(row, f"against_{which}")
        return found

    def speed(row: Row) -> Comparison:
        found = beside(row)
        return found.speed if found else Comparison("")

    def flips(row: Row) -> Flips:
        found = beside(row)
        return found.flips if found else Flips("")

    def size_ratio(row: Row) -> float | None:
        found = beside(row)
        return found.size_ratio if found else None

    def name_of(reference: str) -> Callable[[Row], str | None]:
        def name(row: Row) -> str | None:
            other = getattr(beside(row), reference, None)
            return other.name if other is not None else None

        return name

    def reasons(row: Row) -> str | None:
        return "; ".join(dict.fromkeys(said.reason for said in (speed(row), flips(row)) if said.reason)) or None

    return [
        Column(f"{which}_name", f"what the next columns compare with: {whom}", lambda row: speed(row).baseline or None),
        Column(f"speed_reference_of_{which}", "its fastest row, which speed is compared with", name_of("fastest")),
        Column(f"answers_reference_of_{which}", "its fp32 row, which answers and size are compared with", name_of("plain")),
        Column(f"speed_vs_{which}", "baseline, faster, same, slower, unknown or not comparable", lambda row: speed(row).relation or None),
        Column(f"speed_ratio_vs_{which}", "images per second over its fastest artifact's", lambda row: speed(row).ratio),
        Column(f"speed_ratio_low_vs_{which}", "lower end of the 95 % interval", lambda row: speed(row).low),
        Column(f"speed_ratio_high_vs_{which}", "upper end of the 95 % interval", lambda row: speed(row).high),
        Column(f"size_ratio_vs_{which}", "bytes over its fp32 file's", size_ratio),
        Column(f"top1_vs_{which}", "baseline, better, same, worse or not comparable", lambda row: flips(row).relation or None),
        Column(f"top1_change_points_vs_{which}", "top-1 points above its fp32 file, same images", lambda row: flips(row).change),
        Column(f"top1_change_low_points_vs_{which}", "lower end of the 95 % interval, paired", lambda row: flips(row).low),
        Column(f"top1_change_high_points_vs_{which}", "upper end of the 95 % interval, paired", lambda row: flips(row).high),
        Column(f"agreement_percent_vs_{which}", "images with the same predicted class", lambda row: flips(row).agreement),
        Column(f"broken_images_vs_{which}", "images it has right and this row has not", lambda row: _count(flips(row), flips(row).broken)),
        Column(f"repaired_images_vs_{which}", "images this row has right, it not", lambda row: _count(flips(row), flips(row).repaired)),
        Column(f"mcnemar_p_vs_{which}", "exact two-sided p that both are right equally often", lambda row: flips(row).p),
        Column(f"not_comparable_vs_{which}", "why speed or top-1 is not comparable", reasons),
    ]


COLUMNS: tuple[Column, ...] = (
    _row("study", "name of the study"),
    _row("label", "the method, the recipe or the file"),
    _row("recipe", "name of the recipe"),
    _measured("artifact", "the file"),
    _row("device", "device profile it was measured under"),
    _measured("runtime", "the engine"),
    _measured("provider", "the engine's own name for where it ran"),
    _measured("precision", "type of the heavy arithmetic that really ran"),
    _measured("float_precision", "type of what stays in float"),
    _measured("batch_size", "images per inference"),
    _measured("size_mib", "bytes on disk / 2^20, external data included", lambda m: m.size_bytes / MIB),
    _measured("params_m", "millions of weights"),
    _measured("macs_g", "10^9 multiply-accumulates per image"),
    _measured("images_per_s", "median over rounds"),
    _measured("p50_ms", "median time of an inference; empty where there are too few samples", lambda m: m.latency_ms.p50),
    _measured("p90_ms", "90 % quantile", lambda m: m.latency_ms.p90),
    _measured("p99_ms", "99 % quantile", lambda m: m.latency_ms.p99),
    _measured("load_ms", "reading, optimizing and compiling the file"),
    _measured("first_inference_ms", "first inference after loading"),
    _measured("peak_rss_mib", "highest resident memory of the measuring process"),
    _measured("top1_percent", "test images whose label has the largest logit", lambda m: m.top1),
    _measured("top1_low_percent", "lower end of the 95 % Wilson interval", lambda m: m.top1_interval and m.top1_interval[0]),
    _measured("top1_high_percent", "upper end of the 95 % Wilson interval", lambda m: m.top1_interval and m.top1_interval[1]),
    _measured("top1_images", "how many images, and of which split"),
    _measured("drop_points", "top-1 points below fp32 of the same recipe", lambda m: m.top1_drop and m.top1_drop.points),
    _measured("drop_low_points", "lower end of the 95 % interval, paired", lambda m: m.top1_drop and m.top1_drop.low),
    _measured("drop_high_points", "upper end of the 95 % interval, paired", lambda m: m.top1_drop and m.top1_drop.high),
    _measured("drop_reference", "what the drop is counted from", lambda m: m.top1_drop and m.top1_drop.reference),
    _measured("verdict", "against fp32 of the same recipe and runtime", lambda m: m.verdict.relation),
    _measured("verdict_ratio", "images per second over that row's", lambda m: m.verdict.ratio),
    _measured("verdict_low", "lower end of the 95 % t interval", lambda m: m.verdict.low),
    _measured("verdict_high", "upper end of the 95 % t interval", lambda m: m.verdict.high),
    *_references("baseline", "the table's baseline"),
    *_references("untouched", "the model as it was before"),
    *_references("continued", "that model trained in float for as long"),
    _paper("paper_top1_percent", "top1", "the paper's top-1"),
    _paper("paper_gpu_it_per_s", "gpu_it_s", "the paper's iterations per second on its GPU"),
    _paper("paper_cpu_it_per_s", "cpu_it_s", "the paper's iterations per second on its CPU"),
    _paper("paper_size_mb", "size_mb", "the paper's size, MB in its words"),
    _paper("paper_params_m", "params_m", "the paper's millions of weights"),
    _row("method_seconds", "what the techniques themselves took, training left out"),
    _paper("paper_seconds", "seconds", "the same by the paper"),
    _row("budget", "how the figures were made with less work; empty for the whole"),
    _measured("unstable", "why the figures are not to be trusted", lambda m: m.unstable or None),
    _measured("emulated", "measured under a profile that is not the host's"),
    _condition("threads", "of an inference"),
    _condition("cpu", "the host's processor"),
    _condition("cores", "usable ones"),
    _condition("rounds", "how often the row was measured, each time in a new process"),
    _condition("date", "of the run"),
    _condition("commit", "of vitedge"),
    _row("failure", "why there is no measurement"),
    Column("warnings", "why the row is not comparable with the rows beside it", lambda row: "; ".join(row.warnings) or None),
    _row("source", "file it was read from"),
)


def cells(row: Row) -> dict[str, Cell]:
    """A row's cells by column."""
    return {column.name: column.value(row) for column in COLUMNS}


def docs() -> Mapping[str, str]:
    """What each column says."""
    return {column.name: column.doc for column in COLUMNS}
