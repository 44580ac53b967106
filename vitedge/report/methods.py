"""One line per method, as the papers' tables have it: accuracy, speed on CPU and GPU, size, and the change against the model untouched.

A method is a label of a study. Its artifact on a device is its fastest one: of the quantized files where it made
any, since those are what the method is, else of all, in any runtime and precision; the line names it. Accuracy and
size are that artifact's. A column has one place: where a study was measured on several CPUs or GPUs, the method has a
line for each. The papers' changes are worked out from their own tables in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from vitedge.report.against import is_quantized
from vitedge.report.places import Place, place_names, place_of
from vitedge.report.records import Row, Table

BATCH = 1  # the papers' iterations are of one image


@dataclass(frozen=True)
class Method:
    """One line.

    Attributes:
        label: The method.
        study: Name of the study; empty for a bench.
        paper: The paper's figures.
        paper_untouched: The paper's figures of the model the change is counted against; empty where it has none.
        cpu, gpu: Its artifact there; None where it was not measured there.
        failures: Why something was not measured, once each, with its first line.
        budget: How the figures were made smaller.
        places: Names of where it was measured; empty where the whole study was measured on one CPU, one GPU or one of each.
        seconds: What its techniques themselves took, s.
    """

    label: str
    study: str
    paper: Mapping[str, float]
    paper_untouched: Mapping[str, float]
    cpu: Row | None
    gpu: Row | None
    failures: tuple[str, ...]
    budget: str
    places: str = ""
    seconds: float | None = None

    @property
    def main(self) -> Row | None:
        """The row whose accuracy and size are shown: the CPU's, else the GPU's."""
        return self.cpu or self.gpu

    @property
    def paper_change(self) -> float | None:
        """Points the paper's method has above its untouched model; negative where it lost."""
        own, other = self.paper.get("top1"), self.paper_untouched.get("top1")
        return None if own is None or other is None or self.paper is self.paper_untouched else own - other

    def paper_ratio(self, name: str) -> float | None:
        """The paper's figure over its untouched model's: of `size_mb`, `cpu_it_s` or `gpu_it_s`."""
        own, other = self.paper.get(name), self.paper_untouched.get(name)
        return None if own is None or not other or self.paper is self.paper_untouched else own / other


def methods(table: Table) -> list[Method]:
    """A line per label, in the order of the table; another for each further CPU or GPU of its study."""
    by_label: dict[tuple[str, str], list[Row]] = {}
    for row in table.rows:
        by_label.setdefault((row.study, row.label), []).append(row)
    names = place_names(table.rows)
    made = []
    for (study, label), rows in by_label.items():
        untouched = by_label.get((study, rows[0].untouched), [])
        several, pairs = _pairs([row for row in table.measured if row.study == study])
        failures = tuple(dict.fromkeys(f"{row.device}: {row.failure}" if row.device else row.failure for row in rows if row.failure))
        paper = (rows[0].paper, untouched[0].paper if untouched else {})
        budget = "; ".join(dict.fromkeys(row.budget for row in rows if row.budget))
        found = [(_fastest(_there(rows, cpu, on_gpu=False)), _fastest(_there(rows, gpu, on_gpu=True))) for cpu, gpu in pairs]
        lines = [pair for pair in found if any(pair)] or [(None, None)]
        for number, (cpu, gpu) in enumerate(lines):
            places = " and ".join(names[place_of(row)] for row in (cpu, gpu) if row is not None) if several else ""
            told = failures if number == 0 else ()
            made.append(Method(label, study, *paper, cpu, gpu, told, budget, places, rows[0].method_seconds))
    return made


def _pairs(measured: Sequence[Row]) -> tuple[bool, list[tuple[Place | None, Place | None]]]:
    """A study's CPU places beside its GPU places, and whether there is more than one of either."""
    cpus = list(dict.fromkeys(place_of(row) for row in measured if not row.on_gpu))
    gpus = list(dict.fromkeys(place_of(row) for row in measured if row.on_gpu))
    return max(len(cpus), len(gpus)) > 1, list(zip_longest(cpus, gpus))


def _there(rows: Sequence[Row], place: Place | None, on_gpu: bool) -> list[Row]:
    return [row for row in rows if place_of(row) == place and row.on_gpu == on_gpu]


def has_methods(table: Table) -> bool:
    """Whether there is more than one method, so that a line for each says something."""
    return len({(row.study, row.label) for row in table.rows}) > 1


def _fastest(rows: Sequence[Row]) -> Row | None:
    """The artifact that stands for the method in one place, at batch size 1 or the smallest that was measured."""
    measured = [row for row in rows if row.measurement is not None]
    quantized = [row for row in measured if row.measurement is not None and is_quantized(row.measurement)]
    candidates = quantized or measured
    if not candidates:
        return None
    sizes = {row.measurement.batch_size for row in candidates if row.measurement is not None}
    batch = BATCH if BATCH in sizes else min(sizes)
    return max(candidates, key=lambda row: _rate(row, batch))


def _rate(row: Row, batch: int) -> float:
    m = row.measurement
    return m.images_per_s if m is not None and m.batch_size == batch else 0.0
