"""Builds one task of a study: a recipe in its own folder under the study's, whole, or the checkpoint that others share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitedge.artifact import MANIFEST, Artifact, Manifest, read_json, saying_where, write_json, writing
from vitedge.bench.host_lock import working
from vitedge.device import Device
from vitedge.errors import InputError
from vitedge.pipeline import Bar, Pipeline
from vitedge.stage import times_models
from vitedge.study.folder_lock import held
from vitedge.study.plan import CHECKPOINT_STAGE, Plan, Task
from vitedge.study.untested import UntestedPipeline

STAMP = "task.json"  # in a build folder: the key of the task that it was built for
_QUIET_NOTES = (str, int, float, bool)


def build_task(plan: Plan, task: Task, data: str | None, say: Callable[[str], None], bar: Bar) -> dict[str, Any]:
    """Build what is not built yet; stages that an interrupted worker finished are reused.

    Args:
        plan: The study.
        task: What of it.
        data: Where the images are, as `--data`.
        say: Told, in a line, when this has to wait.
        bar: Gives a progress bar by name.

    Returns:
        What is kept with the task: how long the stages took, s, what the recipe's steps say of themselves, and what was not built.

    Raises:
        VitedgeError: The recipe cannot be built so.
    """
    root = plan.root(task)
    device = _device(plan, task)
    with held(root, say), working("build", say), saying_where(root):
        (root / STAMP).unlink(missing_ok=True)  # until it is built, the folder is nobody's
        if task.source and not times_models(task.recipe):  # what is cut to a time is cut for its own device
            take_checkpoint(root.parent / task.source, root)
        kind = Pipeline if plan.samples is None else UntestedPipeline
        pipeline = kind(task.recipe, device, root, data, task.weights)
        plans = pipeline.plan(CHECKPOINT_STAGE if task.shared else None)
        manifest = pipeline.run(plans, bar)
        write_json(root / STAMP, {"key": task.key})
    skipped = {one.name: one.reason for one in plans if one.action == "skip"}
    stages = {one.name: float(manifest.stages[one.name]["seconds"]) for one in plans if one.name in manifest.stages}
    checkpoint = manifest.artifacts["checkpoint.safetensors"]
    steps = [{name: _short(notes) for name, notes in step.items()} for step in checkpoint.notes.get("steps", [])]
    return {"stage_seconds": stages, "steps": steps, "not_built": skipped}


def is_built(plan: Plan, task: Task) -> bool:
    """Whether the task's folder holds what it was done for: another version may have been built there since, or nothing is left."""
    try:
        content = read_json(plan.root(task) / STAMP)
    except InputError:  # gone, or damaged: what is there is reused, and the note written anew
        return False
    return isinstance(content, dict) and content.get("key") == task.key


def _device(plan: Plan, task: Task) -> Device:
    """The profile a task is built for; of what rows share only the checkpoint is built, which no profile changes."""
    return next((device for _, device in plan.devices if device.name == task.device), plan.devices[0][1])


def _short(notes: Any) -> dict[str, Any]:
    """The figures of a step, without its lists of layers."""
    return {key: value for key, value in notes.items() if isinstance(value, _QUIET_NOTES)} if isinstance(notes, dict) else {}


def take_checkpoint(source: Path, root: Path) -> None:
    """Copy the checkpoint of the same row's build for another device, so that nothing is trained twice.

    For recipes of which only the int8 files depend on the device. Does nothing where there is no checkpoint, or this folder has
    the same one already.

    Raises:
        InputError: A manifest is damaged.
        OutputError: The copy cannot be written.
    """
    if not (source / MANIFEST).is_file():
        return
    made = Manifest.load(source)
    record = made.stages.get(CHECKPOINT_STAGE)
    taken = Manifest.load(root) if (root / MANIFEST).is_file() else Manifest(root, {})
    if record is None or taken.stages.get(CHECKPOINT_STAGE) == record:
        return
    taken.record(CHECKPOINT_STAGE, record, [_copy(made.artifacts[name], source, root) for name in record["outputs"]])
    taken.save()


def _copy(artifact: Artifact, source: Path, root: Path) -> Artifact:
    copies = tuple(root / file.relative_to(source) for file in artifact.files)
    for file, copy in zip(artifact.files, copies, strict=True):
        with writing(copy) as temporary:
            shutil.copyfile(file, temporary)
    return replace(artifact, files=copies)
