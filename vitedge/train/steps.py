"""From a recipe to a checkpoint: build the model, run the recipe's `steps:` in order, save what came out.

Each finished step leaves its weights in the work folder, so that an interrupted run goes on with the
step it was in, and within that step from its last state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitedge.artifact import digest_of, write_json
from vitedge.data import Dataset
from vitedge.errors import InputError, UsageError
from vitedge.models.build import CheckpointMeta, build, load_checkpoint, read_meta, save_checkpoint
from vitedge.models.weights import WeightsSource
from vitedge.progress import Progress
from vitedge.recipe import Recipe, TrainConfig
from vitedge.train.loop import TrainJob, train

LAST = "checkpoint.last.safetensors"


@dataclass(frozen=True)
class CheckpointJob:
    """A checkpoint to make.

    Attributes:
        recipe: What to make.
        source: Its starting weights.
        dataset: Images to train on; None only for a recipe without `train` steps.
        path: Where the checkpoint goes.
        work: Folder for what an interrupted run resumes from; removed at the end.
        key: Identity of the run.
        torch_device: `cpu` or `cuda`.
        bar: A named progress bar per step.
    """

    recipe: Recipe
    source: WeightsSource
    dataset: Dataset | None
    path: Path
    work: Path
    key: str
    torch_device: str
    bar: Callable[[str], Progress]


def make_checkpoint(job: CheckpointJob) -> dict[str, Any]:
    """Build, train, save; returns notes for the manifest.

    Raises:
        InputError: The weights' classes are not the data's, or a classifier is random and nothing trains it.
    """
    recipe = job.recipe
    torch.manual_seed(recipe.seed)
    meta = _meta(job)
    notes: dict[str, Any] = {"weights": job.source.kind, "steps": []}
    model: nn.Module | None = None
    for index, (name, config) in enumerate(recipe.steps):
        done = job.work / f"step{index}.safetensors"
        key = digest_of(job.key, index)
        record = _finished(done, key)
        if record is None:
            model = _model_before(job, meta, index, config)
            record = _run_step(job, meta, model, index, name, config, key)
            save_checkpoint(done, model, meta)
            write_json(done.with_suffix(".json"), {"key": key, "notes": record})
        notes["steps"].append({name: record})
    if recipe.steps:
        model, _ = load_checkpoint(job.work / f"step{len(recipe.steps) - 1}.safetensors")
    else:
        model, random = build(recipe.model, meta.num_classes, job.source)
        _refuse_random(job, random)
    save_checkpoint(job.path, model.float(), meta)
    shutil.rmtree(job.work, ignore_errors=True)
    return notes


def _meta(job: CheckpointJob) -> CheckpointMeta:
    """Header of the checkpoint: classes come from the data, or from the weights where there is no data."""
    spec, contract = job.recipe.model, job.recipe.contract()
    header = read_meta(job.source.path) if job.source.kind == "builtin" and job.source.path else None
    if header is not None:
        asked = (spec.arch, spec.img_size, spec.patch_size)
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
    return CheckpointMeta(
        spec.arch, spec.img_size, spec.patch_size, len(labels), contract.to_json(), tuple(labels), spec.stem, spec.options
    )


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    """Notes of a step that an earlier, interrupted run completed, or None."""
    record = path.with_suffix(".json")
    if not (path.is_file() and record.is_file()):
        return None
    content = json.loads(record.read_text(encoding="utf-8"))
    notes: dict[str, Any] = content["notes"]
    return notes if content["key"] == key else None


def _model_before(job: CheckpointJob, meta: CheckpointMeta, index: int, config: Any) -> nn.Module:
    """The model as step `index` finds it, with that step's own drop rates."""
    drop_path, patch_drop = getattr(config, "drop_path", 0.0), getattr(config, "patch_drop", 0.0)
    if index == 0:
        model, random = build(job.recipe.model, meta.num_classes, job.source, drop_path, patch_drop)
        if not any(name == "train" for name, _ in job.recipe.steps):
            _refuse_random(job, random)
        return model
    model = meta.create(drop_path, patch_drop)
    before, _ = load_checkpoint(job.work / f"step{index - 1}.safetensors")
    model.load_state_dict(before.state_dict())
    return model


def _refuse_random(job: CheckpointJob, random: list[str]) -> None:
    if random:
        raise InputError(
            str(job.source.path or job.source.kind),
            expected="a classifier for these classes",
            found=f"none that fits ({', '.join(random)} would stay random)",
            fix="add a `train` step, or give --weights of a model fine-tuned on this data",
        )


def _run_step(job: CheckpointJob, meta: CheckpointMeta, model: nn.Module, index: int, name: str, config: Any, key: str) -> dict[str, Any]:
    """Run one step on the model in place, which keeps its best weights; the last step's last weights are kept beside. Returns notes."""
    if not isinstance(config, TrainConfig) or job.dataset is None:
        raise UsageError(f"steps.{index}", expected="`train` with a data set", found=name, fix="see `vitedge recipes schema`")
    label = "train" if len(job.recipe.steps) == 1 else f"train {index + 1}/{len(job.recipe.steps)}"
    folder = job.work / f"step{index}"
    contract, seed = job.recipe.contract(), job.recipe.seed + index
    trained = train(
        model, TrainJob(config, job.dataset.train, job.dataset.validation, contract, seed, job.torch_device, folder, key, job.bar(label))
    )
    model.cpu()
    if index == len(job.recipe.steps) - 1:
        best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(trained.last)
        save_checkpoint(job.path.with_name(LAST), model, meta)
        model.load_state_dict(best)
    return trained.notes
