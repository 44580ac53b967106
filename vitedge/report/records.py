"""What a report is made of: one row per measurement or failure, read from any number of files, and how it compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vitedge.bench.compare import Comparison, Flips
from vitedge.bench.records import Measurement

GPU_PROVIDERS = ("cuda", "gpu", "tensorrt")  # parts of the engines' own names


@dataclass(frozen=True)
class Against:
    """A row beside a reference that has a name.

    Attributes:
        speed: Images per second over those of `fastest`.
        flips: Answers against those of `plain`.
        size_ratio: Bytes over those of `plain`; None where it has none.
        fastest: The reference's fastest row of the same device, batch size and run; None where it has no row there.
        plain: The reference's fp32 row, or where it has none the one nearest to it.
    """

    speed: Comparison
    flips: Flips
    size_ratio: float | None = None
    fastest: Row | None = None
    plain: Row | None = None


@dataclass(frozen=True)
class Row:
    """One measurement, or one thing that could not be measured and why.

    Attributes:
        label: What people call it: a study's method, else the recipe, else the file.
        recipe: Name of the recipe; empty for a file that vitedge did not make.
        device: Device profile it was measured under.
        source: File it was read from.
        measurement: None where `failure` says why.
        failure: Why there is no measurement.
        study: Name of the study; empty for a bench.
        paper: The paper's figures for this method, where it has them: top1 (percent), gpu_it_s, cpu_it_s, size_mb, params_m, and
            seconds, what the method itself took.
        method_seconds: What the recipe's techniques themselves took, training left out, s; None where they do not say.
        budget: How the figures were made smaller, `10 % of the steps`; empty where they were not.
        baseline, untouched, continued: Labels of the study's rows that this one is compared with: all rows' one,
            the model as it was before, and that model trained in float for as long.
        build: Its build folder, where there is one.
        against_baseline, against_untouched, against_continued: Filled in by `vitedge.report.against`.
        warnings: Why its figures are not those of the rows beside it, filled in by `vitedge.report.comparable`.
    """

    label: str
    recipe: str
    device: str
    source: str
    measurement: Measurement | None = None
    failure: str = ""
    study: str = ""
    paper: Mapping[str, float] = field(default_factory=dict)
    method_seconds: float | None = None
    budget: str = ""
    baseline: str = ""
    untouched: str = ""
    continued: str = ""
    build: Path | None = None
    against_baseline: Against | None = None
    against_untouched: Against | None = None
    against_continued: Against | None = None
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Label, file and engine; with the batch size it is one row of a device."""
        return self.label if self.measurement is None else f"{self.label}: {file_of(self.measurement)}"

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on a GPU."""
        return self.measurement is not None and _on_gpu(self.measurement)


def _on_gpu(measurement: Measurement) -> bool:
    return any(part in measurement.provider.lower() for part in GPU_PROVIDERS)


def file_of(measurement: Measurement) -> str:
    """`model.fp32.onnx in onnxruntime fp32`; on a GPU with the provider, of which one engine has several."""
    provider = f" {measurement.provider}" if _on_gpu(measurement) else ""
    return f"{measurement.artifact} in {measurement.runtime}{provider} {precision_of(measurement)}"


def precision_of(measurement: Measurement) -> str:
    """`int8+bf16` where what stays in float is not fp32."""
    rest = measurement.float_precision
    return measurement.precision if rest in ("fp32", measurement.precision) else f"{measurement.precision}+{rest}"


@dataclass(frozen=True)
class Table:
    """Everything a report shows.

    Attributes:
        title: The study's name, or what was read.
        rows: In the order of the files and of the rows in them.
        problems: Files that should have been read and could not be, a line each.
        left_out: Files of a folder that are no measurements, a line each.
        pictures: Folder of further pictures; None where none is named.
    """

    title: str
    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    pictures: Path | None = None

    @property
    def measured(self) -> list[Row]:
        """Rows with a measurement."""
        return [row for row in self.rows if row.measurement is not None]

    @property
    def builds(self) -> list[Path]:
        """Build folders of the rows, once each."""
        return list(dict.fromkeys(row.build for row in self.rows if row.build is not None))

    def baselines(self) -> list[str]:
        """Names of the baselines, once each; a ratio without one means nothing."""
        return list(dict.fromkeys(row.against_baseline.speed.baseline for row in self.rows if row.against_baseline is not None))
