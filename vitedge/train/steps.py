"""From a recipe to a checkpoint: build the model, run the recipe's `steps:` in order, save what came out.

A technique acts at once, its losses and hooks on the `train` steps after it. Each finished `train` step leaves
its weights in the work folder, so that an interrupted run goes on with the step it was in, and within that
step from its last state.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitedge import plugins
from vitedge.artifact import digest_of, write_json
from vitedge.compress import Compressed
from vitedge.data import Dataset, Split
from vitedge.errors import InputError, UsageError
from vitedge.models.build import CheckpointMeta, build, read_meta, read_tensors, save_checkpoint, write_tensors
from vitedge.models.quantized import is_quantized
from vitedge.models.weights import WeightsSource
from vitedge.progress import Progress
from vitedge.recipe import Recipe, TrainConfig
from vitedge.train.augment import Batches
from vitedge.train.context import kept_origin, refuse_untaught, technique_context
from vitedge.train.job import Log, TrainJob
from vitedge.train.loop import train
from vitedge.train.processes import Processes
from vitedge.train.timings import Stopwatch, Timings
from vitedge.train.validation import validate
from vitedge.train.watch import Watcher

LAST = "checkpoint.last.safetensors"
FLOAT = "checkpoint.float.safetensors"


@dataclass(frozen=True)
class CheckpointJob:
    """A checkpoint to make.

    Attributes:
        recipe: What to make.
        source: Its starting weights.
        dataset: Images to train on; None only for a recipe without steps.
        data_digest: Identity of the data and its split.
        path: Where the checkpoint goes; metrics and curves go beside it.
        work: Folder for what an interrupted run resumes from; removed at the end.
        key: Identity of the run.
        torch_device: `cpu` or `cuda`.
        bar: A named progress bar per step.
        tensorboard: Whether TensorBoard files are written too.
        stopwatch: Times a model on the device that is built for; None where no technique asks.
    """

    recipe: Recipe
    source: WeightsSource
    dataset: Dataset | None
    data_digest: str
    path: Path
    work: Path
    key: str
    torch_device: str
    bar: Callable[[str], Progress]
    tensorboard: bool = False
    stopwatch: Stopwatch | None = None


def make_checkpoint(job: CheckpointJob) -> dict[str, Any]:
    """Build, train, save; returns notes for the manifest. In a run of many processes, process 0 writes.

    Where anything was trained, the test split is looked at once, at the end, in float32.

    Raises:
        InputError: The weights' classes are not the data's, or a classifier is random and nothing trains it.
        UsageError: A step cannot be done as the recipe says.
        UnavailableError: The device, or an optional package, is not there.
        VitedgeError: Another process of the run is gone.
    """
    run = _Steps(job, checkpoint_meta(job))
    with run.processes.all_alive(), contextlib.closing(run):
        for index, (name, config) in enumerate(job.recipe.steps):
            run.take(index, name, config)
        return run.finish()


@dataclass
class _Steps:
    """The recipe's steps under way: the model, and what techniques left for the `train` steps that follow."""

    job: CheckpointJob
    meta: CheckpointMeta
    model: nn.Module = field(init=False)
    processes: Processes = field(init=False)
    active: list[tuple[str, Compressed]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    watcher: Watcher | None = None
    origin: nn.Module | None = None

    def __post_init__(self) -> None:
        job = self.job
        torch.manual_seed(job.recipe.seed)
        self.processes = Processes(job.torch_device if job.recipe.steps else "cpu")
        self.model, random = build(job.recipe.model, self.meta.num_classes, job.source)
        if random and not self.job.recipe.trains:
            raise InputError(
                str(job.source.path or job.source.kind),
                expected="a classifier for these classes",
                found=f"none that fits ({', '.join(random)} would stay random)",
                fix="add a `train` step, or give --weights of a model fine-tuned on this data",
            )
        if self.job.recipe.trains and self.processes.is_main:
            self.watcher = Watcher(job.path.parent, job.tensorboard)

    def take(self, index: int, name: str, config: Any) -> None:
        """Run one step on the model."""
        if isinstance(config, TrainConfig):
            record = self.train(index, config)
        else:
            technique = plugins.load("compress", name)
            if hasattr(technique, "scheme"):  # the model as it was in float is what its quantized file is compared with
                self.save(converted(copy.deepcopy(self.model), self.active), self.job.path.with_name(FLOAT))
            self.origin = kept_origin(self.job.recipe.steps, index, self.model, self.origin)
            context = technique_context(self.job, self.meta, index, self.processes.device.type, self.timings(index), self.origin)
            compressed = technique.apply(self.model, config, context)
            trains_later = any(isinstance(c, TrainConfig) for _, c in self.job.recipe.steps[index:])
            if (compressed.losses or compressed.on_step) and not trains_later:
                raise UsageError(
                    f"steps.{index}",
                    expected=f"a `train` step after `{name}`, which acts on it",
                    found="none",
                    fix="move it before `train`",
                )
            refuse_untaught(self.job.recipe.steps, index, name, compressed.ends)
            self.model = compressed.model
            self.active = with_technique(self.active, name, compressed)
            record = compressed.notes
        self.notes.append({name: record})

    def key(self, index: int) -> str:
        """Identity of a step. What comes after it, and how often it is saved, change nothing about it."""
        before = [
            [name, {**plain, "checkpoint_every": None}]
            for step in self.job.recipe.to_plain()["steps"][: index + 1]
            for name, plain in step.items()
        ]
        return digest_of(self.job.key, before)

    def timings(self, index: int) -> Timings | None:
        """What times the candidates of a step; None where nothing is built for a device."""
        if self.job.stopwatch is None:
            return None
        return Timings(self.job.stopwatch, self.processes, self.job.work / f"step{index}.timings.json", self.key(index))

    def train(self, index: int, config: TrainConfig) -> dict[str, Any]:
        """One `train` step, or what an earlier, interrupted run has left of it."""
        job = self.job
        if is_quantized(self.model):  # integers have no gradient; LSQ and DiffQ leave theirs after the last `train`
            raise UsageError(
                f"steps.{index}",
                expected="a float model to train",
                found="one that an earlier step quantized",
                fix="move `train` before it",
            )
        done, key = job.work / f"step{index}.safetensors", self.key(index)
        record: dict[str, Any] | None = self.processes.from_main(_finished(done, key) if self.processes.is_main else None)
        if record is not None:
            weights = read_tensors(done) if self.processes.is_main else None
            self.model.load_state_dict(self.processes.from_main(weights))
            return record
        if job.dataset is None:
            raise UsageError(f"steps.{index}", expected="a data set", found="none", fix="give --data, or set VITEDGE_DATA")
        keeping_last = [name for name, compressed in self.active if compressed.keeps_last]
        if keeping_last and config.patience:
            raise UsageError(
                f"steps.{index}.patience",
                expected=f"0 beside `{keeping_last[0]}`, which costs accuracy while it learns",
                found=str(config.patience),
                fix="leave it out",
            )
        self.set_drops(config)
        trainings = [i for i, (_, c) in enumerate(job.recipe.steps) if isinstance(c, TrainConfig)]
        label = "train" if len(trainings) == 1 else f"train {trainings.index(index) + 1}/{len(trainings)}"
        trained = train(
            self.model,
            TrainJob(
                config,
                job.dataset.train,
                job.dataset.validation,
                job.recipe.contract(),
                self.meta.num_classes,
                # Every step its own images' order and views, but for views that are fixed: those are the recipe's.
                job.recipe.seed if config.views else job.recipe.seed + index,
                self.processes,
                job.work / f"step{index}",
                key,
                [loss for _, compressed in self.active for loss in compressed.losses],
                [compressed.on_step for _, compressed in self.active if compressed.on_step],
                job.bar(label),
                partial(_watch, self.watcher, trainings.index(index), label) if self.watcher else None,
                bool(keeping_last),
            ),
        )
        self.model.cpu()
        if self.processes.is_main:
            if index == len(job.recipe.steps) - 1:  # a technique after it would act on other weights, or on another structure
                write_tensors(job.work / LAST, trained.last)
            write_tensors(done, self.model.state_dict())
            write_json(done.with_suffix(".json"), {"key": key, "notes": trained.notes})
        return trained.notes

    def set_drops(self, config: TrainConfig) -> None:
        """Give the model a `train` step's own drop rates: timm sets them where it builds a model, as modules without weights."""
        from timm.layers import DropPath, PatchDropout

        fresh = self.meta.create(config.drop_path, config.patch_drop)
        modules = [*self.model.named_modules(), *fresh.named_modules()]
        for path in {path for path, module in modules if isinstance(module, (DropPath, PatchDropout))}:
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, getattr(fresh.get_submodule(parent), leaf))

    def finish(self) -> dict[str, Any]:
        """Convert, save, judge on the test split, clear up."""
        job = self.job
        notes: dict[str, Any] = {"weights": job.source.kind, "steps": self.notes}
        # Asked of the recipe as it is now: a LAST that lies there may be of a shorter one.
        if self.processes.is_main and job.recipe.ends_in_training and (job.work / LAST).is_file():
            last = copy.deepcopy(self.model)
            last.load_state_dict(read_tensors(job.work / LAST))
            self.convert_and_save(last, job.path.with_name(LAST))
        self.model = self.convert_and_save(self.model, job.path)
        if self.watcher is not None:
            self.watcher.draw()
        if self.job.recipe.trains and job.dataset is not None and job.dataset.test is not None and len(job.dataset.test.labels):
            notes["test"] = self.test(job.dataset.test)
        if self.processes.is_main:
            shutil.rmtree(job.work, ignore_errors=True)
        return notes

    def convert_and_save(self, model: nn.Module, path: Path) -> nn.Module:
        """The model as techniques leave it after training; process 0 writes it."""
        model = converted(model, self.active)
        model.float().cpu()
        self.save(model, path)
        return model

    def save(self, model: nn.Module, path: Path) -> None:
        """Process 0 writes a checkpoint of the model, with what techniques so far made of its architecture."""
        if self.processes.is_main:
            structure = tuple((name, c.structure(model)) for name, c in self.active if c.structure is not None)
            save_checkpoint(path, model, replace(self.meta, structure=structure))

    def close(self) -> None:
        """Close the file of metrics."""
        if self.watcher is not None:
            self.watcher.close()

    def test(self, split: Split) -> dict[str, Any]:
        """Top-1 of each head on the whole test split, in percent, in float32."""
        model = self.model.to(self.processes.device)
        batches = Batches(split.images, split.labels, self.job.recipe.contract(), self.processes.device, self.meta.num_classes)
        found = validate(model, batches, "fp32", self.processes)
        model.cpu()
        return {**{name: round(value, 4) for name, value in found.items()}, "images": len(batches)}


def with_technique(active: list[tuple[str, Compressed]], name: str, compressed: Compressed) -> list[tuple[str, Compressed]]:
    """The techniques that count once one more has acted; those that it ends are over."""
    return [*((other, c) for other, c in active if other not in compressed.ends), (name, compressed)]


def converted(model: nn.Module, active: list[tuple[str, Compressed]]) -> nn.Module:
    """What techniques make of a model that is trained no more, the last of them first; it may be the same one, changed in place."""
    for _, compressed in reversed(active):
        model = compressed.convert(model) if compressed.convert is not None else model
    return model


def checkpoint_meta(job: CheckpointJob) -> CheckpointMeta:
    """Header of the checkpoint: classes come from the data, or from the weights where there is no data.

    Raises:
        UsageError: Nothing says which classes there are, or the embedded model has other sizes than the recipe.
        InputError: The embedded model has another preprocessing.
    """
    spec, contract = job.recipe.model, job.recipe.contract()
    header = read_meta(job.source.path) if job.source.kind == "builtin" and job.source.path else None
    if header is not None:
        asked = (spec.arch, spec.side, spec.patch_size)
        found = (header.arch, header.img_size, header.patch_size)
        if asked != found:
            raise UsageError(
                "model",
                expected=f"the embedded model's arch, img_size, patch_size {found}",
                found=f"{asked}",
                fix="copy them from `vitedge recipes show deit_tiny_int8`",
            )
        if header.preprocessing != contract.to_json() and not job.recipe.steps:
            raise InputError(
                "preprocess",
                expected=f"the embedded model's contract {header.preprocessing}",
                found=contract.to_json(),
                fix="remove the `preprocess:` section",
            )
    if job.dataset is not None:
        labels = job.dataset.classes
    elif header is not None:
        labels = header.labels
    else:
        raise UsageError("data", expected="a data set, to know the classes", found="none", fix="give --data, or set VITEDGE_DATA")
    return CheckpointMeta(spec.arch, spec.side, spec.patch_size, len(labels), contract.to_json(), tuple(labels), spec.stem, spec.options)


def _watch(watcher: Watcher, stage: int, label: str, step: int) -> Log:
    """What takes the metrics of a `train` step that starts at `step`."""
    watcher.stage(stage, label, step)
    return watcher.log


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    """Notes of a step that an earlier, interrupted run completed, or None."""
    record = path.with_suffix(".json")
    if not (path.is_file() and record.is_file()):
        return None
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:  # cut off by a power failure: the step is taken again
        return None
    notes: dict[str, Any] = content["notes"]
    return notes if content["key"] == key else None
