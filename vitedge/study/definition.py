"""A search file: which recipe, what varies in it, what is wanted and what is allowed.

    recipe -> the baseline, measured first, which every ratio and drop is against
    recipe with `steps` and `schemes` in the place of its own -> what the settings of a trial are put into

Every path of the space is tried on the recipe before anything runs, so that a misspelt one costs no hour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vitedge.errors import FileProblems, UsageError, closest
from vitedge.recipe import Recipe, load_recipe, recipe_from_plain
from vitedge.schema import Section, load_yaml, resolve_file, validate
from vitedge.study.overrides import apply_overrides
from vitedge.study.space import Dimension, Space, contains, probes

FOLDER = "searches"
# What a trial must not change: what it is judged on, and what it is called.
_FIXED = ("data", "name", "description", "limits")


class Constraints(Section):
    """What a file must keep to win; the device's budgets are added."""

    max_top1_drop: float | None = Field(None, ge=0, description="top-1 points below the baseline's best file, same validation images")
    min_top1: float | None = Field(None, ge=0, le=100, description="percent of the validation images")
    min_speed_ratio: float | None = Field(None, gt=0, description="images/s over those of the baseline's fastest file, same run")
    min_images_per_s: float | None = Field(None, gt=0)
    max_size_ratio: float | None = Field(None, gt=0, description="size over that of the baseline's smallest file")
    max_size_mib: float | None = Field(None, gt=0)
    max_latency_ms: float | None = Field(None, gt=0, description="p50 at batch 1")
    max_peak_rss_mib: float | None = Field(None, gt=0)


class Measure(Section):
    """How files are timed and judged."""

    rounds: int = Field(3, ge=1, description="times each file is timed, in turns with the baseline's, each in a new process")
    seconds: float = Field(0.5, gt=0, description="shortest timed span of a round")
    iterations: int = Field(10, ge=6, description="fewest timed inferences of a round")
    batch_size: int = Field(1, ge=1)
    samples: int | None = Field(None, ge=1, description="validation images, at random; null: all of them")
    runtimes: tuple[str, ...] = Field((), description="only these of the device's; empty: all")
    artifacts: tuple[str, ...] = Field(("*",), min_length=1, description="patterns of the files of a trial that are measured")


class Search(Section):
    """The whole file. `name` is the file's stem."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    recipe: str = Field(min_length=1, description="the baseline, by name or path")
    weights: str | None = Field(None, description="as --weights of export; for the baseline and for every trial")
    overrides: dict[str, Any] = Field(default_factory=dict, description="path to value: changes to the recipe, for baseline and trials")
    steps: tuple[Any, ...] | None = Field(None, description="the steps of a trial, in the place of the recipe's")
    schemes: tuple[Any, ...] | None = Field(None, description="the quantizing schemes of a trial, in the place of the recipe's")
    space: dict[str, Dimension] = Field(min_length=1, description="path to what may stand there")
    first: tuple[dict[str, Any], ...] = Field((), description="settings to try before any is drawn; empty: those of the recipe as it is")
    objectives: Annotated[tuple[Literal["top1", "images_per_s", "mib"], ...], Field(min_length=1)] = ("top1", "images_per_s", "mib")
    constraints: Constraints = Constraints()
    measure: Measure = Measure()
    trials: int = Field(30, ge=1, description="different settings to try, over all workers")
    minutes: float | None = Field(None, gt=0, description="time of one call: no trial is started that would probably end later")
    device: str = Field("cpu", description="device profile, by name or path")
    seed: int = Field(0, ge=0, description="of what is drawn")


@dataclass(frozen=True)
class Definition:
    """A search file that was read, with everything it names.

    Attributes:
        search: The file.
        where: Its path.
        baseline: The recipe that everything is compared with.
        base: The recipe that settings are put into.
        space: What varies.
    """

    search: Search
    where: str
    baseline: Recipe
    base: Recipe
    space: Space

    def recipe_of(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe that has these settings.

        Raises:
            UsageError: They do not go together.
        """
        return apply_overrides(self.base, self.space.overrides(settings))

    def first(self) -> list[dict[str, Any]]:
        """Settings to try before any is drawn; what they leave open is as the recipe has it, where that can be told."""
        own = self.space.of_recipe(self.base)
        return [self.space.those_there({**own, **settings}) for settings in self.search.first] or [own]


def load_search(name_or_path: str) -> Definition:
    """Read a search by name or path, and try every path of its space on its recipe.

    Raises:
        UsageError: Not found, not YAML, or conditions that cannot be.
        FileProblems: Every problem of the file, a line each.
    """
    path = resolve_file(FOLDER, name_or_path)
    where = str(path)
    search = _read(path)
    baseline = apply_overrides(load_recipe(search.recipe), search.overrides)
    plain = baseline.to_plain()
    if search.steps is not None:
        plain["steps"] = list(search.steps)
    if search.schemes is not None:
        plain["quantize"]["schemes"] = list(search.schemes)
    base = recipe_from_plain(plain, where)
    definition = Definition(search, where, baseline, base, Space(search.space, where))
    problems = [*_bad_paths(definition), *_bad_first(definition)]
    if len(set(search.objectives)) < len(search.objectives):
        problems.append(UsageError(f"{where}: objectives", expected="each once", found=", ".join(search.objectives), fix="remove one"))
    if problems:
        raise FileProblems(where, problems)
    return definition


def _read(path: Path) -> Search:
    """The file, each dimension checked by itself so that a misspelt key of one is told with the keys it could be.

    Raises:
        FileProblems: Every problem of the file, a line each.
    """
    content = {"name": path.stem, **load_yaml(path)}
    problems: list[UsageError] = []
    if isinstance(content.get("space"), dict):
        dimensions = {}
        for key, plain in content["space"].items():
            try:
                dimensions[str(key)] = validate(Dimension, plain, str(path), prefix=f"space.{key}.")
            except FileProblems as error:
                problems += error.problems
        # Where none is good, that there is none is no problem of its own.
        content["space"] = dimensions if dimensions or not problems else {"-": Dimension(optional=True)}
    try:
        search = validate(Search, content, str(path))
    except FileProblems as error:
        raise FileProblems(str(path), [*problems, *error.problems]) from error
    if problems:
        raise FileProblems(str(path), problems)
    return search


def _bad_paths(definition: Definition) -> list[UsageError]:
    """A line for each value at an end of the space that the recipe cannot have."""
    problems = []
    for path, dimension in definition.space.dimensions.items():
        if path.split(".")[0] in _FIXED:
            problems.append(
                UsageError(
                    f"{definition.where}: space.{path}",
                    expected="a setting that leaves the comparison fair",
                    found="what trials are judged on, or are called",
                    fix="set it for all of them under overrides",
                )
            )
            continue
        for value in probes(dimension):
            try:
                definition.recipe_of({**definition.space.needed(path), path: value})
            except UsageError as error:
                causes = error.problems if isinstance(error, FileProblems) else [error]
                place = f"{definition.where}: space.{path}: {value!r}"
                problems += [
                    UsageError(place, expected=f"{cause.expected} (at {cause.where})", found=cause.found, fix=cause.fix) for cause in causes
                ]
    return problems


def _bad_first(definition: Definition) -> list[UsageError]:
    """A line for each hand-picked setting that is not in the space."""
    problems = []
    dimensions = definition.space.dimensions
    for index, settings in enumerate(definition.search.first):
        for path, value in settings.items():
            place = f"{definition.where}: first.{index}.{path}"
            if path not in dimensions:
                found = f"'{path}'{closest(path, list(dimensions))}"
                problems.append(UsageError(place, expected="a path of the space", found=found, fix="rename or remove it"))
            elif not contains(dimensions[path], value):
                problems.append(UsageError(place, expected="a value of the space", found=repr(value), fix="change it, or widen the space"))
    return problems
