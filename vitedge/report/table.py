"""The terminal table of a bench: one row per file, runtime and precision, honest at 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitedge.bench.records import Measurement, Skipped, Verdict
from vitedge.report.cells import NONE, assigned, drop, points, short
from vitedge.report.records import precision_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_table(console: Console, measurements: Sequence[Measurement], skipped: Sequence[Skipped]) -> None:
    """Print the table, what is missing and why, and the conditions."""
    from rich.text import Text

    for recipe in dict.fromkeys(measurement.recipe for measurement in measurements):
        own = [m for m in measurements if m.recipe == recipe]
        batches = sorted({m.batch_size for m in own})
        # More than two batch sizes do not fit beside each other in 100 columns.
        for start in range(0, len(batches), 2):
            console.print(make_table(recipe, own, batches[start : start + 2]), "")
    for line in notes(measurements, skipped):
        # Text, not markup: names and reasons may hold square brackets.
        console.print(Text(line), soft_wrap=False)


def make_table(recipe: str, measurements: Sequence[Measurement], batches: Sequence[int]) -> Table:
    """One recipe's rows at these batch sizes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=recipe or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    table.add_column("artifact\nruntime, precision", no_wrap=True, overflow="fold", max_width=24)
    table.add_column("MiB\nRSS", justify="right", no_wrap=True)
    for batch in batches:
        table.add_column(f"{'it' if batch == 1 else 'img'}/s b{batch}\np50 ms", justify="right", no_wrap=True)
    table.add_column("top-1 %\n95 %", justify="right", no_wrap=True)
    table.add_column("drop\n95 %", justify="right", no_wrap=True)
    for batch in batches:
        table.add_column(f"vs fp32, b{batch}\n95 %", no_wrap=True, min_width=len("faster x1.23"))
    for cells in rows(measurements, batches):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def rows(measurements: Sequence[Measurement], batches: Sequence[int]) -> list[list[str]]:
    """The cells, two lines each, batch sizes side by side."""
    grouped: dict[Any, dict[int, Measurement]] = {}
    for m in (m for m in measurements if m.batch_size in batches):
        grouped.setdefault((m.artifact, m.sha256, m.runtime, m.provider, m.precision, m.float_precision), {})[m.batch_size] = m
    made = []
    for by_batch in grouped.values():
        some = next(iter(by_batch.values()))
        largest = max(m.peak_rss_mib for m in by_batch.values())
        made.append(
            [
                f"{some.artifact}\n  {some.runtime} {precision_of(some)}",
                f"{some.size_bytes / 2**20:.1f}\n{largest:.0f}",
                *(speed(by_batch.get(batch)) for batch in batches),
                NONE
                if some.top1 is None or some.top1_interval is None
                else f"{some.top1:.2f}\n{some.top1_interval[0]:.1f}-{some.top1_interval[1]:.1f}",
                NONE
                if some.top1_drop is None
                else f"{drop(some.top1_drop)[0]}\n{points(some.top1_drop.low)}~{points(some.top1_drop.high)}",
                *(NONE if batch not in by_batch else verdict(by_batch[batch].verdict) for batch in batches),
            ]
        )
    return made


def speed(measurement: Measurement | None) -> str:
    """Rate over median latency; `!` marks a figure that did not settle."""
    if measurement is None:
        return NONE
    mark = "!" if measurement.unstable else ""
    p50 = measurement.latency_ms.p50
    return f"{short(measurement.images_per_s)}{mark}\n{NONE if p50 is None else short(p50)}"


def verdict(said: Verdict) -> str:
    """`faster x1.31` over its interval."""
    if said.relation == "baseline":
        return "baseline"
    if said.ratio is None:
        return NONE
    head = f"{'?' if said.relation == 'unknown' else said.relation} x{said.ratio:.2f}"
    return head if said.low is None or said.high is None else f"{head}\n{said.low:.2f}-{said.high:.2f}"


def notes(measurements: Sequence[Measurement], skipped: Sequence[Skipped]) -> list[str]:
    """What must be said below the table: causes, what is unstable or missing, and the conditions."""
    lines = []
    causes: dict[str, list[str]] = {}
    for m in measurements:
        if m.verdict.cause:
            causes.setdefault(f"{m.artifact} in {m.runtime}: {m.verdict.relation}: {m.verdict.cause}", []).append(f"b{m.batch_size}")
    lines += [f"{text} ({', '.join(batches)})" for text, batches in causes.items()]
    lines += [f"! {m.artifact} in {m.runtime} {m.precision} b{m.batch_size} is unstable: {m.unstable}" for m in measurements if m.unstable]
    lines += [f"top-1 not measured: {reason}" for reason in dict.fromkeys(m.top1_reason for m in measurements) if reason]
    lines += [f"top-1 on {images}" for images in dict.fromkeys(m.top1_images for m in measurements) if images]
    for reference in dict.fromkeys(m.top1_drop.reference for m in measurements if m.top1_drop):
        lines.append(f"drop: points below {reference} on the same images, paired interval")
    for one in dict.fromkeys(skipped):
        words = (one.runtime, one.precision, f"b{one.batch_size}" if one.batch_size else "")
        place = " ".join(word for word in words if word)
        lines.append(f"not measured: {one.artifact}{f' in {place}' if place else ''}: {one.reason}")
    if measurements:
        lines += conditions(measurements[0])
    return lines


def conditions(measurement: Measurement) -> list[str]:
    """The conditions, as lines."""
    c = measurement.conditions
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items())
    load, gpus = c["load_average"][0], "".join(f"{name}, " for name in c.get("gpus", []))
    lines = [
        f"device {c['device']}{' (EMULATED)' if measurement.emulated else ''}: {c['cpu']}, {c['threads']} threads of {c['cores']} usable "
        f"cores, {c['os']}, {gpus}governor {c['governor'] or 'unknown'}, load {load:.2f} before",
        f"{c['rounds']} rounds, each a new process and at least {c['seconds']:g} s and {c['iterations']} inferences after warm-up; "
        "ratios paired over rounds, 95 % t interval",
        f"{versions}; vitedge commit {c['commit']}; seed {c['seed']}; {c['date']}",
    ]
    if c["mismatches"]:
        lines.insert(1, f"this host is not that device: {'; '.join(c['mismatches'])}")
    if c.get("inherited"):
        lines.insert(1, f"the shell's own {assigned(c['inherited'])}")
    if c["environment"]:
        lines.insert(1, f"measured under {assigned(c['environment'])}")
    if load > c["cores"] / 2:
        lines.insert(1, f"warning: the host was busy before the bench (load {load:.2f}); the figures may be too low")
    return lines
