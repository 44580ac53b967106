"""The accuracy guard: quantize, judge on validation images, and leave layers in float until the drop is inside a limit.

The limit that can be met with nothing left in float costs one build. Else layers are ranked (`sensitivity`), sets of
them are tried (`search`), each as a real file of the library in the runtime that will run it (`judge`), and the best
so far is what is written, with what was found out and why the search stopped in its notes.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitedge import plugins
from vitedge.artifact import Artifact, writing
from vitedge.data.records import Split
from vitedge.errors import VitedgeError
from vitedge.guard.clock import Clock
from vitedge.guard.judge import Change, Judge, compare
from vitedge.guard.layers import Layer, find_layers, open_float
from vitedge.guard.rounding import rounding_of
from vitedge.guard.search import proposals
from vitedge.guard.sensitivity import BATCH, SPAN_IMAGES, Probe, Sensitivity
from vitedge.model_file import input_spec
from vitedge.quantize import Job
from vitedge.quantize._ranges import Calibration, ProductRange, StoredRanges
from vitedge.recipe import GuardConfig, Scheme

MET, TIME_UP, NO_LAYER_LEFT = "limit met", "time up", "no layer left"

__all__ = ["MET", "NO_LAYER_LEFT", "TIME_UP", "GuardJob", "can_guard", "guard"]


def can_guard(config: Scheme) -> bool:
    """Whether a scheme's settings can leave layers in float."""
    return "exclude" in type(config).model_fields


@dataclass(frozen=True)
class GuardJob:
    """One guarded file to make.

    Attributes:
        job: The file as it would be made without the guard.
        library: Of `vitedge/quantize/`, and of `vitedge/runtimes/`, which judges.
        config: The limit on the drop, and on the time.
        validation: Labelled images that neither training nor calibration takes.
        threads: Of the runtime.
        now: Seconds, for the time limit.
    """

    job: Job
    library: str
    config: GuardConfig
    validation: Split
    threads: int
    now: Callable[[], float] = time.monotonic


def guard(asked: GuardJob) -> Artifact:
    """Write the file that loses least: inside the limit, the one with the fewest layers in float.

    Returns:
        The artifact; `notes["guard"]` holds the limit, the drop with its paired interval, why the search stopped,
        every file tried and every layer's sensitivity and fate.

    Raises:
        VitedgeError: The first file cannot be made or judged; nothing is written then. Where a later one cannot, the
            search stops, says so, and writes the best before it.
    """
    clock = Clock(asked.config.minutes, asked.job.progress, asked.now)
    judge = Judge(asked.job.source, asked.validation, asked.config.images, asked.threads)
    with tempfile.TemporaryDirectory(prefix="vitedge-guard-") as temporary:
        trials = _Trials(asked, judge, Path(temporary), clock)
        ranking: list[Sensitivity] = []
        if trials.make(()).met:
            stopped = MET
        else:
            try:
                ranking = _rank(asked, judge, trials, clock)
                stopped = _search(trials, ranking, clock)
            except VitedgeError as error:
                stopped = f"failed: {error}"
        best = trials.best
        artifact = _install(best.artifact, asked.job.folder)
    notes = {**artifact.notes, "guard": _notes(asked, judge, trials, ranking, stopped, clock)}
    return replace(artifact, notes=notes)


@dataclass(frozen=True)
class _Trial:
    """A file with some layers in float, and what it lost."""

    floats: tuple[str, ...]
    artifact: Artifact
    change: Change
    met: bool

    def worth(self) -> tuple[bool, float, float, float]:
        """Less is better: inside the limit the fewest layers in float, outside of it the smallest drop."""
        lost = (self.change.drop, self.change.loss)
        return (False, len(self.floats), *lost) if self.met else (True, *lost, len(self.floats))


class _Trials:
    """Makes and judges files; keeps the best one's on disk."""

    def __init__(self, asked: GuardJob, judge: Judge, folder: Path, clock: Clock) -> None:
        self.job, self.library, self.limit = asked.job, asked.library, asked.config.max_top1_drop
        self.judge, self.folder, self.clock = judge, folder, clock
        self.done: list[_Trial] = []
        self.longest = 0.0  # seconds that a file took
        self.layers: dict[str, Layer] = {}
        clock.tell("judging the fp32 file")
        self.reference = judge.judge(asked.job.source, asked.library)

    @property
    def best(self) -> _Trial:
        """The best so far."""
        return min(self.done, key=_Trial.worth)

    def make(self, floats: tuple[str, ...]) -> _Trial:
        """Build and judge the file with these layers in float, by name."""
        began = self.clock.elapsed()
        text = f"file {len(self.done) + 1}, {len(floats)} layers in float"
        self.clock.tell(text)
        exclude = (*self.job.config.exclude, *(self.layers[name].exclude for name in floats))
        job = replace(
            self.job,
            config=self.job.config.model_copy(update={"exclude": exclude}),
            folder=self.folder / str(len(self.done)),
            progress=lambda done, total, what="": self.clock.tell(f"{text}: {done:.0f} of {total:.0f} {what}".rstrip()),
            ranges=self._known_ranges(floats) if floats else self.job.ranges,
        )
        artifact: Artifact = plugins.load("quantize", self.library).quantize(job)
        if not floats:
            self.layers = {layer.name: layer for layer in find_layers(open_float(self.job.source), artifact, self.job.config)}
        change = compare(self.reference, self.judge.judge(artifact, self.library))
        met = change.drop <= self.limit or math.isclose(change.drop, self.limit)  # 3 of 1,000 images are 0.3 points
        trial = _Trial(floats, artifact, change, met)
        self.done.append(trial)
        for position, other in enumerate(self.done):
            if other is not self.best:
                shutil.rmtree(self.folder / str(position), ignore_errors=True)
        self.longest = max(self.longest, self.clock.elapsed() - began)
        return trial

    def _known_ranges(self, floats: tuple[str, ...]) -> StoredRanges | None:
        """Ranges that the first file was made with, less those of layers in float: the same as calibrating again, sooner.

        None where the scheme takes none, or where not every quantized node has one of its own.
        """
        first = self.done[0].artifact
        entries = {entry["weight_sha256"]: entry for entry in first.notes.get("ranges", [])}
        if self.job.scheme not in plugins.load("quantize", self.library).TAKES_RANGES or len(entries) != first.notes.get("nodes_chosen"):
            return None
        gone = {self.layers[name].weight_sha256 for name in floats}
        images = 0 if self.job.calibration is None else len(self.job.calibration)
        return StoredRanges(
            checkpoint_sha256=self.job.source.sha256,
            made_with={},
            calibration=Calibration(images=max(1, images), seed=0, data="", split="train"),
            data_sha256="",
            tools=first.tools,
            ranges=tuple(ProductRange(**entry) for sha, entry in entries.items() if sha not in gone),
        )


def _rank(asked: GuardJob, judge: Judge, trials: _Trials, clock: Clock) -> list[Sensitivity]:
    """Layers, the most sensitive first; nothing where the time is up already."""
    if clock.left() == 0.0:
        return []
    source, job = asked.job.source, asked.job
    model, fixed = open_float(source), input_spec(source).batch_size
    probe = Probe(source, model, list(trials.layers.values()), rounding_of(f"{asked.library}.{job.scheme}", job.config, job.rules))
    step = fixed or BATCH
    few = judge.contract([judge.images[i] for i in range(min(len(judge), max(step, SPAN_IMAGES)))])
    # A batch that is fixed, or fewer images than one, is filled up with images that are there.
    x_BCHW = np.take(few, range(max(1, len(few) // step) * step), axis=0, mode="wrap")
    return probe.measure_losses(probe.measure_sqnr(x_BCHW, step, clock), judge, clock)


def _search(trials: _Trials, ranking: list[Sensitivity], clock: Clock) -> str:
    """Try sets of layers in float until the fewest are found or the time is up; returns why it stopped."""
    # One layer stays: a file with nothing quantized is the fp32 file.
    moves = proposals([one.layer.name for one in ranking[: max(0, len(trials.layers) - 1)]])
    if clock.left() == 0.0:
        return TIME_UP
    try:
        floats = next(moves)
        while clock.left() > trials.longest:  # a file that would be late is not begun
            floats = moves.send(trials.make(floats).met)
    except StopIteration:
        return MET if trials.best.met else NO_LAYER_LEFT
    return TIME_UP


def _install(artifact: Artifact, folder: Path) -> Artifact:
    """Put a file, or for OpenVINO a folder, under its final name, whole or not at all."""
    made = artifact.path.parent if artifact.format == "openvino" else artifact.path
    final = folder / made.name
    with writing(final) as temporary:
        if made.is_dir():
            shutil.copytree(made, temporary)
        else:
            shutil.copyfile(made, temporary)
    files = tuple(final / file.name if made.is_dir() else final for file in artifact.files)
    return replace(artifact, files=files)


def _notes(asked: GuardJob, judge: Judge, trials: _Trials, ranking: list[Sensitivity], stopped: str, clock: Clock) -> dict[str, Any]:
    best, limit, images = trials.best, asked.config.max_top1_drop, len(judge)
    version = plugins.load("runtimes", asked.library).available().version
    cautions = [f"a limit of {limit:g} points is {limit * images / 100:.1f} of {images:,} images"]
    if best.change.high > limit:
        cautions.append(f"on other images the drop may be up to {best.change.high:.2f} points (95 %)")
    if len(trials.done) > 1:
        cautions.append(f"the best of {len(trials.done)} files on the same images looks better than it is: judge it on the test images")
    return {
        "max_top1_drop": limit,
        "minutes": asked.config.minutes,
        "seconds": round(clock.elapsed(), 1),
        "images": images,
        "split": "validation",
        "runtime": f"{asked.library} {version}, CPU, fp32 where float, {asked.threads} threads",
        "top1_fp32": trials.reference.top1,
        **best.change.to_plain(),
        "met": best.met,
        "stopped": stopped,
        "float_layers": list(best.floats),
        "quantized_layers": len(trials.layers) - len(best.floats),
        "cautions": cautions,
        "trials": [{"float_layers": list(trial.floats), **trial.change.to_plain(), "met": trial.met} for trial in trials.done],
        "layers": [
            {
                "name": one.layer.name,
                "module": one.layer.module,
                "op": one.layer.op,
                # JSON has no infinity; there is none to tell where rounding changed nothing.
                "sqnr_db": one.sqnr_db if math.isfinite(one.sqnr_db) else None,
                "loss_change": one.loss,
                "decision": "float" if one.layer.name in best.floats else asked.job.scheme,
            }
            for one in ranking
        ],
    }
