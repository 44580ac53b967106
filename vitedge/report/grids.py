"""The tables that people read, in cells: one line per method beside the paper's, every measurement, and flips against the baseline.

Terminal, Markdown and HTML draw the same grids, so that they cannot say different things. A column in which
no row has anything is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vitedge.bench.records import Measurement
from vitedge.report import cells
from vitedge.report.cells import NONE
from vitedge.report.methods import Method, has_methods, methods
from vitedge.report.records import Against, Row, Table, file_of


@dataclass(frozen=True)
class Shown:
    """One cell.

    Attributes:
        text: What is read first.
        note: An interval or what else belongs to it.
        paper: The paper's figure; empty where it has none.
        order: What it is sorted by, missing figures last; None sorts by the text.
    """

    text: str
    note: str = ""
    paper: str = ""
    order: float | None = None


@dataclass(frozen=True)
class Head:
    """A column's head.

    Attributes:
        title: Short, with the unit.
        doc: What it says, in a line.
        numeric: Whether it is figures, which stand to the right.
        brief: Whether it has a place in a terminal of 100 columns.
    """

    title: str
    doc: str
    numeric: bool = True
    brief: bool = True


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        name: Short, for anchors.
        title: For people.
        note: A line under the title.
        heads: The columns.
        lines: A list of cells per row.
        tags: Per row what it can be filtered by: device and runtime.
    """

    name: str
    title: str
    note: str
    heads: tuple[Head, ...]
    lines: tuple[tuple[Shown, ...], ...]
    tags: tuple[dict[str, str], ...] = field(default=())


def grids(table: Table) -> list[Grid]:
    """What there is to show, in order."""
    made = [_methods_grid(table)] if has_methods(table) else []
    made.append(_measurements_grid(table))
    if any(row.against_baseline is not None and row.against_baseline.flips.change is not None for row in table.rows):
        made.append(_flips_grid(table))
    return [_without_empty(grid) for grid in made]


_METHOD_HEADS = (
    Head("method", "what was done to the model; below, the artifact that stands for it", numeric=False),
    Head("top-1 %", "test images whose label has the largest logit"),
    Head("top-1 vs untouched", "points above the same model before the method, same images; `same` inside the noise"),
    Head("top-1 vs continued", "points above that model trained on in float for as long, same images"),
    Head("CPU it/s", "iterations of one image per second on the CPU"),
    Head("CPU vs untouched", "that over the untouched model's fastest artifact, same run; `same` inside the noise"),
    Head("GPU it/s", "iterations of one image per second on the GPU"),
    Head("GPU vs untouched", "that over the untouched model's fastest artifact, same run; `same` inside the noise"),
    Head("MiB", "on disk; the paper's MB are MiB by its counts of weights"),
    Head("size vs untouched", "bytes over the untouched model's fp32 file"),
    Head("M params", "millions of weights, where the paper counts them"),
    Head("method, s", "what the method itself took, training left out"),
    Head("budget", "how the figures were made with less work", numeric=False, brief=False),
    Head("not measured", "why", numeric=False, brief=False),
)


def _methods_grid(table: Table) -> Grid:
    found = methods(table)
    counted = any("params_m" in method.paper for method in found)
    lines = [_method_line(method, counted) for method in found]
    note = "Changes are against the untouched model and its fastest artifact of the same run; the paper's are worked out from its table."
    return Grid("methods", "Methods", note, _METHOD_HEADS, tuple(lines))


def _method_line(method: Method, counted: bool) -> tuple[Shown, ...]:
    """A method's cells; its weights only where they are `counted`."""
    row = method.main
    own = row.measurement if row else None
    untouched = row.against_untouched if row else None
    continued = row.against_continued if row else None
    return (
        Shown(method.label, _artifact(row, method.places)),
        _top1(own, _paper(method, "top1")),
        _change(untouched, "" if method.paper_change is None else cells.signed(method.paper_change)),
        _change(continued),
        _rate(method.cpu, _paper(method, "cpu_it_s")),
        _speed(method.cpu.against_untouched if method.cpu else None, _paper_ratio(method, "cpu_it_s")),
        _rate(method.gpu, _paper(method, "gpu_it_s")),
        _speed(method.gpu.against_untouched if method.gpu else None, _paper_ratio(method, "gpu_it_s")),
        _mib(own, _paper(method, "size_mb")),
        _size(untouched, _paper_ratio(method, "size_mb")),
        _number(own.params_m if own and counted else None, _paper(method, "params_m")),
        _number(method.seconds, _paper(method, "seconds")),
        Shown(method.budget or NONE),
        Shown("; ".join(method.failures) or NONE),
    )


def _artifact(row: Row | None, places: str) -> str:
    if row is None or row.measurement is None:
        return ""
    m = row.measurement
    batch = "" if m.batch_size == 1 else f", batch {m.batch_size}"
    return f"{file_of(m)}{batch}{f', on {places}' if places else ''}"


def _paper(method: Method, name: str) -> str:
    value = method.paper.get(name)
    return "" if value is None else f"{value:g}"


def _paper_ratio(method: Method, name: str) -> str:
    value = method.paper_ratio(name)
    return "" if value is None else cells.ratio(value)


def _top1(own: Measurement | None, paper: str) -> Shown:
    return Shown(NONE, paper=paper) if own is None else Shown(*cells.top1(own), paper=paper, order=own.top1)


def _mib(own: Measurement | None, paper: str) -> Shown:
    return Shown(NONE, paper=paper) if own is None else Shown(cells.mib(own), paper=paper, order=float(own.size_bytes))


def _number(value: float | None, paper: str) -> Shown:
    return Shown(cells.short(value), paper=paper, order=value)


def _rate(row: Row | None, paper: str = "") -> Shown:
    m = row.measurement if row else None
    return Shown(NONE, paper=paper) if m is None else Shown(cells.rate(m), paper=paper, order=m.images_per_s)


def _speed(against: Against | None, paper: str = "") -> Shown:
    said = against.speed if against else None
    return Shown(*cells.speed(said), paper=paper, order=said.ratio if said else None)


def _change(against: Against | None, paper: str = "") -> Shown:
    said = against.flips if against else None
    order = None if said is None else 0.0 if said.relation == "baseline" else said.change
    return Shown(*cells.change(said), paper=paper, order=order)


def _size(against: Against | None, paper: str = "") -> Shown:
    value = against.size_ratio if against else None
    return Shown(cells.ratio(value), paper=paper, order=value)


_MEASUREMENT_HEADS = (
    Head("model", "label, file, runtime and precision", numeric=False),
    Head("device", "device profile", numeric=False, brief=False),
    Head("batch", "images per inference"),
    Head("MiB", "on disk, external data included"),
    Head("M params", "millions of weights", brief=False),
    Head("GMAC", "10^9 multiply-accumulates per image", brief=False),
    Head("images/s", "median over rounds; ! where it did not settle"),
    Head("p50 ms", "median time of an inference", brief=False),
    Head("p90 ms", "90 % quantile", brief=False),
    Head("p99 ms", "99 % quantile", brief=False),
    Head("RSS MiB", "highest resident memory of the measuring process", brief=False),
    Head("top-1 %", "with the 95 % Wilson interval"),
    Head("drop", "points below fp32 of the same recipe, same images, with the 95 % interval; `same` inside the noise", brief=False),
    Head("vs fp32", "images/s over fp32 of the same recipe and runtime, with the 95 % t interval", brief=False),
    Head("speed vs baseline", "images/s over the baseline's fastest artifact, with the 95 % interval; `same` inside the noise"),
    Head("top-1 vs baseline", "points above the baseline's fp32 file, same images, with the 95 % interval; `same` inside the noise"),
    Head("budget", "how the figures were made with less work", numeric=False, brief=False),
    Head("warnings", "why the row is not comparable with the rows beside it", numeric=False, brief=False),
)


def _measurements_grid(table: Table) -> Grid:
    lines: list[tuple[Shown, ...]] = []
    tags: list[dict[str, str]] = []
    for row in table.rows:
        m = row.measurement
        if m is None:
            missing = (Shown(NONE),) * (len(_MEASUREMENT_HEADS) - 4)
            head = (Shown(row.label, row.recipe if row.recipe != row.label else ""), Shown(row.device or NONE))
            lines.append((*head, *missing, Shown(row.budget or NONE), Shown(f"not measured: {row.failure}")))
        else:
            lines.append(_measured_line(row, m))
        tags.append({"device": row.device, "runtime": m.runtime if m else ""})
    note = f"Baseline: {'; '.join(table.baselines()) or 'none'}."
    return Grid("measurements", "Measurements", note, _MEASUREMENT_HEADS, tuple(lines), tuple(tags))


def _measured_line(row: Row, m: Measurement) -> tuple[Shown, ...]:
    latency = m.latency_ms
    numbers = [m.params_m, m.macs_g]
    quantiles = [latency.p50, latency.p90, latency.p99]
    fp32 = m.verdict.ratio if m.verdict.relation != "baseline" else 1.0
    return (
        Shown(row.label, file_of(m)),
        Shown(f"{row.device}{' (emulated)' if m.emulated else ''}"),
        Shown(str(m.batch_size), order=float(m.batch_size)),
        Shown(cells.mib(m), order=float(m.size_bytes)),
        *(Shown(cells.short(value), order=value) for value in numbers),
        Shown(cells.rate(m), order=m.images_per_s),
        *(Shown(cells.short(value), order=value) for value in quantiles),
        Shown(f"{m.peak_rss_mib:.0f}", order=m.peak_rss_mib),
        Shown(*cells.top1(m), order=m.top1),
        Shown(*cells.drop(m.top1_drop), order=m.top1_drop.points if m.top1_drop else None),
        Shown(*cells.speed(m.verdict), order=fp32),
        _speed(row.against_baseline),
        _change(row.against_baseline),
        Shown(row.budget or NONE),
        Shown("; ".join(row.warnings) or NONE),
    )


_FLIP_HEADS = (
    Head("model", "label, file, runtime and precision", numeric=False),
    Head("baseline", "what its answers are compared with", numeric=False, brief=False),
    Head("images", "judged by both"),
    Head("agreement %", "images with the same predicted class, right or wrong"),
    Head("broken", "images that the baseline has right and this row has not"),
    Head("repaired", "images that this row has right and the baseline has not"),
    Head("change", "repaired less broken, in points, with the 95 % interval"),
    Head("McNemar p", "exact two-sided p that both are right equally often"),
)


def _flips_grid(table: Table) -> Grid:
    lines: list[tuple[Shown, ...]] = []
    seen: set[tuple[str, ...]] = set()
    for row in table.measured:
        m, said = row.measurement, row.against_baseline.flips if row.against_baseline else None
        if m is None or said is None or said.change is None:
            continue
        key = (row.study, row.source, row.name, row.device, said.baseline)
        if key in seen:  # batch sizes of a row share its answers
            continue
        seen.add(key)
        lines.append(
            (
                Shown(row.label, file_of(m)),
                Shown(said.baseline),
                Shown(f"{said.images:,}", order=float(said.images)),
                Shown("" if said.agreement is None else f"{said.agreement:.2f}", order=said.agreement),
                Shown(str(said.broken), order=float(said.broken)),
                Shown(str(said.repaired), order=float(said.repaired)),
                Shown(*cells.change(said), order=said.change),
                Shown(cells.p_value(said.p), order=said.p),
            )
        )
    note = "Two models of equal top-1 may still answer many images differently; a user of the first sees each broken one."
    return Grid("flips", "Flips against the baseline", note, _FLIP_HEADS, tuple(lines))


def _without_empty(grid: Grid) -> Grid:
    """The grid without the columns in which no row says anything; the first stays."""
    kept = [index for index in range(len(grid.heads)) if index == 0 or any(_says(line[index]) for line in grid.lines)]
    heads = tuple(grid.heads[index] for index in kept)
    return Grid(grid.name, grid.title, grid.note, heads, tuple(tuple(line[index] for index in kept) for line in grid.lines), grid.tags)


def _says(shown: Shown) -> bool:
    return shown.text not in (NONE, "") or bool(shown.paper)


def brief(grid: Grid) -> tuple[Sequence[Head], list[list[Shown]]]:
    """The columns that fit a terminal; the device's only where rows differ in it."""
    devices = len({tag["device"] for tag in grid.tags})
    kept = [index for index, head in enumerate(grid.heads) if head.brief or (head.title == "device" and devices > 1)]
    return [grid.heads[index] for index in kept], [[line[index] for index in kept] for line in grid.lines]
