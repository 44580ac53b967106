"""What a recipe's techniques make of its model, before anything is trained: weights, multiply-accumulates and bytes, part by part.

Techniques act through the same `apply` as in training, on real train images where they are at hand; `train` steps are passed over. What
is counted after a step is the model as it would be saved then (`converted`), so a quantizing technique shows its packed bytes.
Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitedge import data as datasets
from vitedge import plugins
from vitedge.artifact import digest_of
from vitedge.compress import Compressed
from vitedge.data import Dataset, Images, Split
from vitedge.errors import InputError, UsageError, VitedgeError
from vitedge.model_file import open_artifact
from vitedge.models.build import build
from vitedge.models.cost import CostTable, ModuleCost, cost_table
from vitedge.models.weights import WeightsSource, locate
from vitedge.progress import Progress, silent
from vitedge.recipe import PreprocessSpec, Recipe, TrainConfig
from vitedge.train.context import kept_origin, looks_back, technique_context
from vitedge.train.steps import CheckpointJob, checkpoint_meta, converted, with_technique

IMAGES = 64  # that a technique is shown at most: how much it takes away hardly depends on them, and seconds do
LOUD = 1.005  # growth from which on it is said
TIMED = "how much it takes away comes of timing models on the device, when the recipe is built"
_CLASSES = {"cifar10": 10, "cifar100": 100}  # of the data sets known by name
_GROWTH = (("params", "weights", "larger"), ("macs", "multiply-accumulates", "slower"))


@dataclass(frozen=True)
class StepCost:
    """One step of the recipe.

    Attributes:
        index: Its position in `steps`.
        name: `train`, or the technique.
        outcome: `done` | `not trained` | `left out` | `refused`.
        says: Plain sentences: what it changes and by how much, what it makes larger or slower; why it is left out.
        after: The model after it; None where it did not act.
        seconds: It took.
    """

    index: int
    name: str
    outcome: str
    says: tuple[str, ...]
    after: CostTable | None = None
    seconds: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs."""
        plain = {"index": self.index, "name": self.name, "outcome": self.outcome, "says": list(self.says)}
        return {**plain, "seconds": round(self.seconds, 2), "after": self.after.to_plain() if self.after else None}


@dataclass(frozen=True)
class RecipeCost:
    """What a recipe costs, step by step.

    Attributes:
        recipe, arch, side: Its name, timm's name of its model, and the side of the input in pixels.
        about: What weights, classes and images are, one sentence each.
        start: The model before the first step.
        steps: The steps, as far as they could be taken.
        error: What stopped them; None where nothing did.
        seconds: All of it took.
    """

    recipe: str
    arch: str
    side: int
    about: tuple[str, ...]
    start: CostTable
    steps: tuple[StepCost, ...]
    error: VitedgeError | None
    seconds: float

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs."""
        failed = {"exit_code": self.error.exit_code, "message": str(self.error)} if self.error else None
        return {
            "schema_version": 1,
            "recipe": self.recipe,
            "model": {"arch": self.arch, "img_size": self.side},
            "about": list(self.about),
            "start": self.start.to_plain(),
            "steps": [step.to_plain() for step in self.steps],
            "error": failed,
            "seconds": round(self.seconds, 2),
        }


def estimate_cost(
    recipe: Recipe, data: str | None, weights: str | None, builds: Path, threads: int, bar: Callable[[str], Progress]
) -> RecipeCost:
    """Go through a recipe's steps without training; nothing is downloaded, and no build is touched.

    Args:
        recipe: The recipe.
        data: `--data`.
        weights: `--weights`.
        builds: The folder of build folders, in which teachers are looked for.
        threads: Of torch.
        bar: Makes a progress bar of a name.

    Raises:
        UsageError: Data or weights named by option are not there, or the model cannot be built as the recipe says.
        InputError: The weights are another model's, or the data are damaged.
    """
    began = time.monotonic()
    torch.set_num_threads(threads)
    job, about = _prepare(recipe, data, weights, builds)
    meta, side = checkpoint_meta(job), job.recipe.model.side
    torch.manual_seed(job.recipe.seed)
    model, random = build(job.recipe.model, meta.num_classes, job.source)
    if random:
        about.append(f"classifier: random, for it is for {meta.num_classes} classes ({', '.join(random)})")
    start = cost_table(model, (3, side, side))
    steps, error = _take_steps(job, model, start, bar(f"steps of {recipe.name}"))
    return RecipeCost(recipe.name, job.recipe.model.arch, side, tuple(about), start, tuple(steps), error, time.monotonic() - began)


def _take_steps(job: CheckpointJob, model: nn.Module, before: CostTable, progress: Progress) -> tuple[list[StepCost], VitedgeError | None]:
    """Let techniques act in order; with the error where one refuses, for training would stop there too."""
    meta, shape_CHW = checkpoint_meta(job), (3, job.recipe.model.side, job.recipe.model.side)
    taken: list[StepCost] = []
    active: list[tuple[str, Compressed]] = []
    trained = False
    origin: nn.Module | None = None
    for index, (name, config) in enumerate(job.recipe.steps):
        began = time.monotonic()
        progress(index, len(job.recipe.steps), name)
        if isinstance(config, TrainConfig):
            trained = True
            taken.append(StepCost(index, name, "not trained", ()))
            continue
        origin = kept_origin(job.recipe.steps, index, model, origin)
        technique = plugins.load("compress", name)
        try:
            technique.files(config, job.path.parent.parent)
        except UsageError as absent:  # such as a teacher that has not been trained yet
            taken.append(StepCost(index, name, "left out", (str(absent),)))
            continue
        if hasattr(technique, "times") and technique.times(config):
            taken.append(StepCost(index, name, "left out", (TIMED,)))
            continue
        if looks_back(name, config) and (earlier := _timed(taken)):
            taken.append(StepCost(index, name, "left out", (f"it goes by what `{earlier}` makes of the model, which is left out here",)))
            continue
        context = technique_context(job, meta, index, "cpu", origin=origin)
        try:
            compressed: Compressed = technique.apply(model, config, replace(context, sample=partial(_few, context.sample)))
        except VitedgeError as refusal:
            taken.append(StepCost(index, name, "refused", (str(refusal),)))
            return taken, refusal
        ended = {other for other, _ in active} & set(compressed.ends)
        model, active = compressed.model, with_technique(active, name, compressed)
        converts = any(each.convert is not None for _, each in active)
        after = cost_table(converted(copy.deepcopy(model), active) if converts else model, shape_CHW)
        says = describe_change(name, before, after)
        if trained and ended:
            says.append("before training: which units go is not known yet, how many is")
        elif trained and after.total != before.total:
            says.append("before training: what is chosen by the values of weights may come out differently after it")
        taken.append(StepCost(index, name, "done", tuple(says), after, time.monotonic() - began))
        before = after
    progress(len(job.recipe.steps), len(job.recipe.steps))
    return taken, None


def _timed(taken: list[StepCost]) -> str | None:
    """The last technique since the last training that was left out because it goes by times, or None."""
    row = itertools.takewhile(lambda step: step.outcome != "not trained", reversed(taken))
    return next((step.name for step in row if step.says == (TIMED,)), None)


def _few(sample: Callable[[int], tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """As the context's `sample`, of `IMAGES` images at most."""
    return sample(min(count, IMAGES))


def describe_change(name: str, before: CostTable, after: CostTable) -> list[str]:
    """What a technique did, in sentences: by how much each figure changed, and what it made larger or slower."""
    old, new = before.total, after.total
    if old == new:
        return [f"{name} changes neither weights nor multiply-accumulates nor bytes"]
    pairs = (("weights", old.params, new.params), ("multiply-accumulates", old.macs, new.macs), ("bytes", old.bytes, new.bytes))
    says = [f"{name}: {', '.join(f'{noun} {_times(was, now)}' for noun, was, now in pairs)}"]
    for figure, noun, adjective in _GROWTH:
        was, now = getattr(old, figure), getattr(new, figure)
        if now > LOUD * was:
            says.append(f"{name} makes the model {adjective}: {short(now)} {noun} instead of {short(was)} ({_times(was, now)})")
        modules = _grown(before.modules, after.modules, figure)
        if modules:
            worst = max(modules, key=lambda module: modules[module])
            others = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
            says.append(f"{name} makes {worst}{others} {adjective}: {noun} {'up to ' if others else ''}x{modules[worst]:.3g}")
    if new.bytes > LOUD * old.bytes and new.params <= LOUD * old.params:
        instead = f"{short(new.bytes)} bytes instead of {short(old.bytes)}"
        says.append(f"{name} makes the checkpoint larger: {instead} ({_times(old.bytes, new.bytes)})")
    return says


def _grown(before: dict[str, ModuleCost], after: dict[str, ModuleCost], figure: str) -> dict[str, float]:
    """Modules that grew, by how many times; of those inside each other the innermost."""
    both = [(name, getattr(before[name], figure), getattr(after[name], figure)) for name in before if name and name in after]
    grown = {name: now / was for name, was, now in both if was and now > LOUD * was}
    return {name: times for name, times in grown.items() if not any(other.startswith(f"{name}.") for other in grown)}


def _times(was: int, now: int) -> str:
    return f"x{now / was:.3g}" if was else f"{now} instead of 0"


def short(figure: int) -> str:
    """A number with three digits and the letter of its thousands: `5.52 M`."""
    value, letters = float(figure), iter(("", " k", " M", " G", " T"))
    letter = next(letters)
    while value >= 999.5 and letter != " T":
        value, letter = value / 1000, next(letters)
    return f"{value:.3g}{letter}"


def _prepare(recipe: Recipe, data: str | None, weights: str | None, builds: Path) -> tuple[CheckpointJob, list[str]]:
    """The job that training would have, with made-up images where there are none, and sentences on what it consists of."""
    source, about = _find_weights(recipe, weights)
    dataset, missing = _find_images(recipe, data)
    if dataset is not None:
        recipe = datasets.fill(recipe, dataset) if datasets.wants_data(recipe) else recipe
        digest = digest_of(dataset.digest, recipe.data.validation, recipe.data.split_seed)
        said = [about, f"images: at most {IMAGES} train images of {dataset.label}"]
    else:
        # Means and deviations of pixels change nothing that is counted.
        usual = PreprocessSpec()
        pixels = {name: getattr(usual, name) for name in ("mean", "std") if getattr(recipe.preprocess, name) is None}
        recipe = recipe.model_copy(update={"preprocess": recipe.preprocess.model_copy(update=pixels)})
        labels, why = _find_classes(recipe, source)
        dataset = _made_up(labels, recipe.seed)
        digest = dataset.digest
        said = [about, f"classes: {len(labels)}, {why}", f"images: random, seed {recipe.seed}; {missing}"]
    path = builds / recipe.name / "checkpoint.safetensors"
    return CheckpointJob(recipe, source, dataset, digest, path, path.parent / ".work", "", "cpu", lambda _: silent), said


def _find_weights(recipe: Recipe, option: str | None) -> tuple[WeightsSource, str]:
    """Weights at hand, else none; and the sentence about them.

    Raises:
        UsageError: Weights named by option are not there.
    """
    try:
        source = locate(recipe.model.weights, recipe.model.arch, option)
    except UsageError as absent:
        if option is not None:
            raise
        return WeightsSource("none"), f"weights: random, {absent.found}"
    if source.kind == "download":
        return WeightsSource("none"), "weights: random, the pretrained ones are not at hand (VITEDGE_WEIGHTS)"
    return source, f"weights: {source.path.name}" if source.path else "weights: random, as the recipe says"


def _find_images(recipe: Recipe, option: str | None) -> tuple[Dataset | None, str]:
    """The data set where it is at hand, else why not.

    Raises:
        UsageError: One named by option is not there.
        InputError: It is damaged.
    """
    try:
        source = datasets.find(recipe.data.name, option, download=False)
    except UsageError as absent:
        if option is not None:
            raise
        return None, f"no data set '{recipe.data.name}' is at hand: {absent.found}"
    return datasets.load(source, recipe.data.validation, recipe.data.split_seed), ""


def _find_classes(recipe: Recipe, source: WeightsSource) -> tuple[tuple[str, ...], str]:
    """Names of the classes without the data, and where they are from."""
    import timm

    if source.path is not None and source.path.suffix == ".safetensors":
        with contextlib.suppress(InputError):  # weights of somebody else name no classes
            if labels := open_artifact(source.path).labels:
                return labels, "as the weights have"
    count = _CLASSES.get(recipe.data.name)
    why = f"as {recipe.data.name} has"
    if count is None:
        config = timm.models.get_pretrained_cfg(recipe.model.arch) if timm.is_model(recipe.model.arch) else None
        count, why = config.num_classes if config is not None else 1000, "the architecture's own, for those of the data are not known"
    return tuple(f"class {number}" for number in range(count)), why


def _made_up(classes: tuple[str, ...], seed: int) -> Dataset:
    """Train images of smooth random colours, as `vitedge.data.sample` makes them."""
    small = np.random.default_rng(seed).integers(0, 256, size=(IMAGES, 4, 4, 3), dtype=np.uint8)
    train = Split(Images(small), np.arange(IMAGES, dtype=np.int64) % len(classes))
    nothing = Split(Images(small[:0]), np.zeros(0, np.int64))
    return Dataset("random", "random images", classes, digest_of("random images", seed, len(classes)), train, nothing, None)
