"""Made measurements of a small study, as files and as a table ready to be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.made import CONDITIONS, make_measurement
from vitedge.bench.answers import Answers, pack
from vitedge.bench.records import Measurement, Skipped
from vitedge.evaluate import wilson_interval
from vitedge.report.against import with_comparisons
from vitedge.report.comparable import with_warnings
from vitedge.report.json_file import dump, to_plain
from vitedge.report.reading import read
from vitedge.report.records import Table

NASTY = '</script><img src=x onerror=alert(1)> & "q" | `b`'
PAPER_UNTOUCHED = {"top1": 98.94, "cpu_it_s": 0.05, "size_mb": 327.0}
PAPER_DYNAMIC = {"top1": 98.73, "cpu_it_s": 0.062, "size_mb": 84.0}


def judged(name: str, rates: tuple[float, ...], correct: int, images: str = "made", **changes: Any) -> Measurement:
    """A measurement whose first `correct` of 100 images are right, the others called by another class."""
    right = np.arange(100) < correct
    known: dict[str, Any] = {
        "top1": float(correct),
        "top1_interval": wilson_interval(correct, 100),
        "top1_images": f"100 test images of {images}",
        "answers": pack(Answers(images, right, np.where(right, 0, 1))),
    }
    return make_measurement(name, rates, **{**known, **changes})


FP32 = judged("model.fp32.onnx", (100.0, 101.0, 99.0), 90)
BF16 = judged("model.fp32.onnx", (200.0, 202.0, 198.0), 90, runtime="openvino", provider="CPU", precision="bf16", float_precision="bf16")
INT8 = judged("model.int8_dynamic.onnx", (150.0, 151.5, 148.5), 86, precision="int8", size_bytes=1 << 18)


def study(**changes: Any) -> dict[str, Any]:
    """A study's results: untouched, dynamic int8, and a method that failed."""
    rows = [
        row("untouched", [FP32, BF16], paper=PAPER_UNTOUCHED, build="builds/untouched"),
        row("dynamic", [INT8], paper=PAPER_DYNAMIC, untouched="untouched"),
        row("pruned", [], untouched="untouched", failure="expected a ratio below 1, found 1"),
    ]
    return {"schema_version": 1, "study": "small", "baseline": "untouched", "budget": "", "rows": rows, **changes}


def row(label: str, measurements: list[Measurement], **changes: Any) -> dict[str, Any]:
    """One row of a study."""
    plain = {"label": label, "recipe": f"tiny_{label}", "device": "board", "failure": ""}
    return {**plain, "measurements": [one.to_plain() for one in measurements], **changes}


def write_study(folder: Path, content: dict[str, Any] | None = None) -> Path:
    """`results.json` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(dump(study() if content is None else content), encoding="utf-8")
    return path


def write_bench(path: Path, measurements: list[Measurement], skipped: tuple[Skipped, ...] = ()) -> Path:
    """The JSON of a bench."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(to_plain(measurements, skipped)), encoding="utf-8")
    return path


def made_table(path: Path, baseline: str | None = None, pictures: Path | None = None) -> Table:
    """What `vitedge report` draws."""
    return with_warnings(with_comparisons(read([path], pictures), baseline))


def other_conditions(**changes: Any) -> dict[str, Any]:
    """Conditions in which something differs."""
    return {**CONDITIONS, **changes}
