"""What a study has to do: recipes built once because rows share them, and every row for every device.

A task's key is a digest of what it is made from, so that a row whose recipe, overrides, base or named weights were changed is
another task, and one that was done before is not done again. The bytes of images and weights are no part of it: a study is
held to those it began with (`origins.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitedge.artifact import digest_of
from vitedge.device import Device, load_device
from vitedge.errors import FileProblems, UsageError, closest
from vitedge.pipeline import STAGE_VERSIONS
from vitedge.recipe import Recipe, load_recipe
from vitedge.study.budget import Budget
from vitedge.study.overrides import apply_overrides
from vitedge.study.spec import BASE, RowSpec, StudySpec, folder_name

BUILDS = "builds"
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_STAGE = "checkpoint"  # the one stage of a shared recipe that is run
SELF = "self"  # a teacher that is the student itself


@dataclass(frozen=True)
class Task:
    """One thing to build.

    Attributes:
        key: Digest of what it is made from.
        label: Of the row; name of the recipe for what rows share.
        device: Name of the device it is built for; empty for what rows share, of which only the checkpoint is built.
        folder: Name of its build folder.
        recipe: Resolved, the budget applied; named as the folder.
        weights: What `--weights` would be; None for the recipe's own.
        needs: Keys of tasks that must have been done before.
        after: Key of the task, done or failed, whose checkpoint it takes over; empty for none.
        source: Folder of that task.
    """

    key: str
    label: str
    device: str
    folder: str
    recipe: Recipe
    weights: str | None = None
    needs: tuple[str, ...] = ()
    after: str = ""
    source: str = ""

    @property
    def shared(self) -> bool:
        """Whether it is built once for several rows."""
        return not self.device

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.label}, shared" if self.shared else f"{self.label} on {self.device}"


@dataclass(frozen=True)
class Options:
    """What the command line changes of a study.

    Attributes:
        devices: In the place of the study's; empty for those.
        data: `--data`.
        weights: In the place of the base's checkpoint.
        budget: How much of the work is done.
        only: Labels of the rows that are wanted; empty for all.
    """

    devices: tuple[str, ...] = ()
    data: str | None = None
    weights: str | None = None
    budget: Budget = field(default_factory=Budget)
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A study resolved.

    Attributes:
        spec: The file, its rows those that are wanted and what they are compared with.
        folder: The study's folder.
        devices: Profiles, with the name or path that each was asked for by.
        tasks: In the order they are begun.
        data: `--data`.
        weights: `--weights`.
        budget: Always a share.
        samples: Test images for top-1; None for all.
        narrowed: Whether `--only` left rows out.
    """

    spec: StudySpec
    folder: Path
    devices: tuple[tuple[str, Device], ...]
    tasks: tuple[Task, ...]
    data: str | None
    weights: str | None
    budget: Budget
    samples: int | None
    narrowed: bool = False

    def root(self, task: Task) -> Path:
        """A task's build folder."""
        return self.folder / BUILDS / task.folder

    def rows_of(self, device: str) -> list[Task]:
        """The tasks of a device's rows, in the study's order."""
        return [task for task in self.tasks if task.device == device]


def make_plan(spec: StudySpec, folder: Path, options: Options) -> Plan:
    """Resolve a study; reads recipes and device profiles, and neither data nor weights.

    A budget in minutes is to be made a share first, by `estimate.fitted`.

    Raises:
        UsageError: A device or label that is not there, or a base that is neither in the study nor given.
        FileProblems: Every row whose recipe cannot be had, a line each.
    """
    spec = _selected(spec, options.only)
    devices = tuple((asked, load_device(asked)) for asked in dict.fromkeys(options.devices or spec.devices))
    _check_names(devices)
    budget = options.budget
    assert budget.minutes is None
    tasks = _Resolver(spec, folder, devices, options).tasks()
    samples = min((count for count in (spec.measure.samples, budget.samples) if count is not None), default=None)
    return Plan(spec, folder, devices, tuple(tasks), options.data, options.weights, budget, samples, bool(options.only))


def first_of(devices: Sequence[tuple[str, Device]]) -> str:
    """The profile whose builds have the rows' own folders: one without an accelerator, which is never refused; others take them over."""
    return next((device.name for _, device in devices if device.accelerator == "none"), devices[0][1].name)


def _check_names(devices: tuple[tuple[str, Device], ...]) -> None:
    """Two profiles of one name would share rows, builds and measurements.

    Raises:
        UsageError: There are.
    """
    by_name: dict[str, str] = {}
    for asked, device in devices:
        if device.name in by_name:
            raise UsageError(
                f"device {asked}",
                expected="profiles that differ in `name`",
                found=f"'{device.name}' in {by_name[device.name]} too",
                fix="rename one of them",
            )
        by_name[device.name] = asked


def _selected(spec: StudySpec, only: Sequence[str]) -> StudySpec:
    """The study with the rows that are wanted, and those that they start from or are compared with.

    Raises:
        UsageError: A label that no row has.
    """
    if not only:
        return spec
    rows = {row.label: row for row in spec.rows}
    wanted: set[str] = set()
    waiting = [*only, spec.baseline_label]
    while waiting:
        label = waiting.pop()
        if label not in rows:
            raise UsageError(
                f"--only {label}",
                expected=f"the label of a row: {', '.join(rows)}",
                found=f"'{label}'{closest(label, list(rows))}",
                fix="see `vitedge study NAME --dry-run`",
            )
        if label in wanted:
            continue
        wanted.add(label)
        row = rows[label]
        waiting += [other for other in (row.weights, row.untouched, row.continued) if other in rows]
    kept = tuple(row for row in spec.rows if row.label in wanted)
    return spec.model_copy(update={"rows": kept, "baseline": spec.baseline_label})


class _Resolver:
    """Turns rows into tasks; what they share becomes a task when it is first needed."""

    def __init__(self, spec: StudySpec, folder: Path, devices: tuple[tuple[str, Device], ...], options: Options) -> None:
        self.spec, self.folder, self.options = spec, folder, options
        self.profiles = {device.name: device for _, device in devices}
        names = [device.name for _, device in devices]
        self.first = first_of(devices)
        self.devices = list(dict.fromkeys([self.first, *names]))
        self.shared: dict[str, Task] = {}

    def tasks(self) -> list[Task]:
        """All tasks: what is shared first, then each device's rows."""
        problems: list[UsageError] = []
        built: dict[tuple[str, str], Task] = {}
        for number, row in enumerate(self.spec.rows):
            where = f"study {self.spec.name}: rows.{number} ({row.label})"
            try:
                self._add_row(row, built)
            except FileProblems as error:
                problems += [_within(where, problem) for problem in error.problems]
            except UsageError as error:
                problems.append(_within(where, error))
        for folder in self.shared.keys() & {task.folder for task in built.values()}:
            problems.append(
                UsageError(
                    f"label of folder '{folder}'", expected="another name than a shared recipe has", found="the same", fix="rename it"
                )
            )
        if problems:
            raise FileProblems(f"study {self.spec.name}", problems)
        return [*self.shared.values(), *(built[row.label, device] for device in self.devices for row in self.spec.rows)]

    def _add_row(self, row: RowSpec, built: dict[tuple[str, str], Task]) -> None:
        recipe = self._resolve(row.recipe, row.overrides, folder_name(row.label))
        needs = self._teachers(recipe, ())
        weights = told = row.weights
        if weights == BASE:
            weights, base_needs = self._base()
            # A path is another on each machine; what the study builds there is told by the keys of `needs`.
            told = None if base_needs else "--weights"
            needs += base_needs
        elif (weights, self.first) in built:
            source = built[str(weights), self.first]
            weights, needs = self._checkpoint(source), (*needs, source.key)
        first: Task | None = None
        for device in self.devices:
            folder = recipe.name if first is None else f"{recipe.name}.{device}"
            profile = self.profiles[device].to_plain()
            key = digest_of("row", row.label, device, folder, profile, recipe.to_plain(), told, needs, STAGE_VERSIONS)
            task = Task(key, row.label, device, folder, recipe, weights, needs)
            if first is not None:
                task = replace(task, after=first.key, source=first.folder)
            built[row.label, device] = task
            first = first or task

    def _base(self) -> tuple[str | None, tuple[str, ...]]:
        """The weights that rows start from, and what has to be built for them."""
        if self.options.weights is not None:
            return self.options.weights, ()
        base = self.spec.base
        if base is None:
            raise UsageError("weights: base", expected="a base in the study", found="none", fix="add `base:`, or give --weights")
        name = load_recipe(base.recipe).name
        task = self._share(name, self._resolve(base.recipe, base.overrides, name), ())
        return self._checkpoint(task), (task.key,)

    def _teachers(self, recipe: Recipe, above: tuple[str, ...]) -> tuple[str, ...]:
        """Keys of the teachers that a recipe names by their recipes; `distill` looks for them beside the build folder."""
        keys = []
        for _, config in recipe.steps:
            teacher = getattr(config, "teacher", SELF)
            if teacher == SELF or os.sep in teacher or teacher.endswith(".safetensors"):
                continue
            if teacher in above:
                raise UsageError(f"teacher '{teacher}'", expected="teachers that end", found="one that teaches itself", fix="name another")
            keys.append(self._share(teacher, self._resolve(teacher, {}, teacher), (*above, teacher)).key)
        return tuple(dict.fromkeys(keys))

    def _share(self, folder: str, recipe: Recipe, above: tuple[str, ...]) -> Task:
        """The task of a recipe of which only the checkpoint is needed."""
        if folder not in self.shared:
            needs = self._teachers(recipe, above)
            key = digest_of("shared", recipe.to_plain(), needs, STAGE_VERSIONS[CHECKPOINT_STAGE])
            self.shared[folder] = Task(key, folder, "", folder, recipe, None, needs)
        elif self.shared[folder].recipe != recipe:
            raise UsageError(
                f"recipe {folder}",
                expected="the same overrides wherever it is shared",
                found="others",
                fix="give one of them a file of its own",
            )
        return self.shared[folder]

    def _resolve(self, name: str, overrides: dict[str, object], folder: str) -> Recipe:
        recipe = apply_overrides(load_recipe(name), overrides)
        if self.spec.data is not None:
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"name": self.spec.data})})
        recipe, _ = self.options.budget.apply(recipe)
        return recipe.model_copy(update={"name": folder})

    def _checkpoint(self, task: Task) -> str:
        return str(self.folder / BUILDS / task.folder / CHECKPOINT)


def _within(where: str, problem: UsageError) -> UsageError:
    return UsageError(f"{where}: {problem.where}", expected=problem.expected, found=problem.found, fix=problem.fix)
