"""Watching a training: every metric as a line of JSON, TensorBoard by option, and a picture of the curves.

All of it lies in the build folder. `metrics.jsonl` is the source, written line by line as the training
goes; the TensorBoard events and the picture are made from its lines, so that a resumed run shows each step once.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, TextIO

from vitedge.artifact import saying_where, write_text, writing
from vitedge.errors import InputError, extra_missing

METRICS = "metrics.jsonl"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"


class Watcher:
    """Takes the metrics of a recipe's `train` steps, its stages.

    A line of `metrics.jsonl` is one object: `stage` (its index), `label` (its name), `step` (optimizer steps taken
    in this stage) and whatever was logged, a number that is not finite as null. Those that `draw` knows: `seconds`
    (training time of the stage), `loss`, `lr`, `images_per_s`, `data_share` (part of `seconds` spent waiting
    for images), `validation_loss`, and in percent `validation_top1`, `validation_top1_class`, `validation_top1_distill`.

    Args:
        folder: The build folder.
        tensorboard: Whether to write TensorBoard events too, each stage as a run of its own.

    Raises:
        UnavailableError: A package that this needs is not installed; said before any training.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise extra_missing("train", "torch")
        self.folder, self.path = folder, folder / METRICS
        self._summary_writer = _summary_writer() if tensorboard else None
        self._index, self._label = 0, ""
        self._lines: TextIO | None = None
        self._events: Any = None
        self._began = 0.0

    def stage(self, index: int, label: str, resumed_step: int) -> None:
        """Start the `index`-th `train` step of the recipe, or go on with it.

        What an earlier run has left of steps after `resumed_step`, and of later stages, is removed first.

        Args:
            index: Counted from 0.
            label: What to call it.
            resumed_step: Steps that the state it goes on from had taken, 0 where it begins.

        Raises:
            InputError: `metrics.jsonl` is damaged, but for a last line that a kill cut off.
            OutputError: The folder cannot be written.
        """
        self.close()
        before = read_metrics(self.path) if self.path.exists() else []
        kept = [line for line in before if line["stage"] < index or (line["stage"] == index and line["step"] <= resumed_step > 0)]
        write_text(self.path, "".join(_text(line) for line in kept))
        self._index, self._label = index, label
        with saying_where(self.path):
            self._lines = self.path.open("a", encoding="utf-8")
        if self._summary_writer is not None:
            self._start_events(self._summary_writer, [line for line in kept if line["stage"] == index])

    def log(self, step: int, **metrics: float | int | str) -> None:
        """Write the metrics of a step as one line, and hand it to the operating system at once.

        Raises:
            OutputError: The disk is full.
        """
        if self._lines is None:
            raise RuntimeError("stage() says where the metrics belong, and comes before log()")
        line = {"stage": self._index, "label": self._label, "step": step}
        line |= {name: _finite(value) for name, value in metrics.items()}
        with saying_where(self.path):
            self._lines.write(_text(line))
            self._lines.flush()
        self._add_event(line)

    def draw(self) -> Path | None:
        """Draw `curves.png` from `metrics.jsonl`; returns its path, or None where there is nothing to draw.

        Raises:
            InputError: `metrics.jsonl` is damaged.
            OutputError: The folder cannot be written.
        """
        from vitedge.train.curves import plot_curves

        figure = plot_curves(read_metrics(self.path) if self.path.exists() else [], self.folder.resolve().name)
        if figure is None:
            return None
        with writing(self.folder / CURVES) as temporary:
            figure.savefig(temporary, format="png")
        return self.folder / CURVES

    def close(self) -> None:
        """Finish the files; `stage` opens them again.

        Raises:
            OutputError: The disk is full.
        """
        lines, self._lines = self._lines, None
        events, self._events = self._events, None
        with saying_where(self.folder):
            if lines is not None:
                lines.close()
            if events is not None:
                events.close()

    def _start_events(self, summary_writer: Any, lines: list[dict[str, Any]]) -> None:
        """A new run in TensorBoard for this stage, told what is known already.

        Its clock goes by training time, so that a pause before resuming leaves no gap.
        """
        root = self.folder / TENSORBOARD
        for old in root.glob("stage*"):
            if int(old.name.removeprefix("stage")) >= self._index:
                shutil.rmtree(old)
        with saying_where(root):
            self._events = summary_writer(str(root / f"stage{self._index}"))
        self._began = time.time() - max((line.get("seconds") or 0.0 for line in lines), default=0.0)
        for line in lines:
            self._add_event(line)

    def _add_event(self, line: dict[str, Any]) -> None:
        if self._events is None:
            return
        seconds = line.get("seconds")
        at = time.time() if seconds is None else self._began + seconds
        for name, value in line.items():
            if name not in ("stage", "step", "seconds") and isinstance(value, (int, float)):
                self._events.add_scalar(name, value, line["step"], walltime=at)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in order; a last line that was cut off while being written is left out.

    Raises:
        InputError: The file is missing, or another line is damaged.
    """
    try:
        rows = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(str(path), expected="metrics of a training", found=str(error.strerror), fix="train first") from error
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
            if not (isinstance(line, dict) and type(line.get("stage")) is int and type(line.get("step")) is int):
                raise ValueError("no object with a stage and a step")
            lines.append(line)
        except ValueError as error:
            if number < len(rows):  # the last row ends in no newline: it is empty, or cut off
                raise InputError(
                    f"{path}:{number}", expected="one JSON object of metrics", found=str(error), fix="remove the line, or the file"
                ) from error
    return lines


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _finite(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer() -> Any:
    """TensorBoard's writer, as torch gives it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise extra_missing("train --tensorboard", "tensorboard") from error
    return SummaryWriter
