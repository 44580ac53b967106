"""A space of settings: what may vary in a recipe, by dotted path, and what of it a trial is given.

    space:
      model.img_size: {choice: [96, 112]}
      steps.prune.target.params: {float: [0.5, 0.8, 0.1]}
      steps.tome: {optional: true}
      steps.tome.r: {int: [4, 16, 4]}

A setting below another's path (`steps.tome.r` below `steps.tome`) is there only where that one is not null, and one with
`when: {path: value}` only where that path was given that value, so that a technique that is switched off has no ratio.
Optuna keeps what is chosen from a list as JSON text: its lists know neither lists nor the difference of 1 and true.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vitedge.errors import UsageError, closest
from vitedge.recipe import Recipe
from vitedge.schema import Section
from vitedge.study.overrides import apply_overrides

if TYPE_CHECKING:
    import optuna

KINDS = ("choice", "int", "float", "optional")
LOG = "log"
DIGITS = 6  # significant ones of a float, so that recipes stay readable and equal settings are found to be equal
CANDIDATES = 100  # values tried, at most, to find the one that a recipe has
# Named outside of the class below, in which `int` and `float` are fields.
Bounds = Annotated[tuple[Any, ...], Field(min_length=2, max_length=3)]
Choices = Annotated[tuple[Any, ...], Field(min_length=1)]
Settings = dict[str, Any]


class Dimension(Section):
    """One setting that varies: one of `choice`, `int`, `float` and `optional`."""

    choice: Choices | None = Field(None, description="values, of any kind that the recipe takes there; null removes a step or scheme")
    int: Bounds | None = Field(None, description="[low, high] or [low, high, step], both ends included")
    float: Bounds | None = Field(None, description="[low, high], [low, high, step] or [low, high, log]")
    optional: Literal[True] | None = Field(None, description="a step or scheme that is as the recipe has it, or is not there")
    when: dict[str, Any] = Field(
        default_factory=dict, description="path to value: only where those settings have these values; a list of values is any of them"
    )

    @field_validator("float", mode="before")
    @classmethod
    def _exponents_are_numbers(cls, bounds: Any) -> Any:
        # YAML reads 1e-5 as text, which a recipe takes for the number too.
        return [_number(bound) for bound in bounds] if isinstance(bounds, list) else bounds

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        if sum(getattr(self, kind) is not None for kind in KINDS) != 1:
            raise ValueError(f"one of {', '.join(KINDS)}")
        if self.choice is not None:
            _check_choices(self.choice)
        elif self.int is not None:
            _check_numbers(self.int, whole=True)
        elif self.float is not None:
            _check_numbers(self.float, whole=False)
        return self


def _number(bound: Any) -> Any:
    """Text that is a number as that number; anything else as it is."""
    try:
        return float(bound) if isinstance(bound, str) else bound
    except ValueError:
        return bound


def _check_choices(choices: tuple[Any, ...]) -> None:
    try:
        texts = [_encode(value) for value in choices]
    except TypeError as error:
        raise ValueError("numbers, texts, true, false, null, and lists and mappings of them") from error
    if len(set(texts)) < len(texts):
        raise ValueError("each choice once")


def _check_numbers(bounds: tuple[Any, ...], whole: bool) -> None:
    kind = (int,) if whole else (int, float)
    low, high, *rest = bounds
    log = not whole and rest == [LOG]
    step = None if log or not rest else rest[0]
    numbers = [low, high, *([] if step is None else [step])]
    if not all(isinstance(n, kind) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise ValueError(
            "whole numbers: [low, high] or [low, high, step]" if whole else "numbers: [low, high], or with a step or log after"
        )
    if low > high or (step is not None and step <= 0) or (log and low <= 0):
        raise ValueError("low up to high, a step above 0, and with log a low above 0")
    if step is not None and (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise ValueError("high to be low and a whole number of steps")


def options(dimension: Dimension) -> Sequence[Any] | None:
    """Every value, where they can be counted; True for an optional step that is there."""
    if dimension.choice is not None:
        return list(dimension.choice)
    if dimension.optional:
        return [True, None]
    if dimension.int is not None:
        low, high, *rest = dimension.int
        return range(low, high + 1, rest[0] if rest else 1)
    assert dimension.float is not None
    low, high, *rest = dimension.float
    if not rest or rest == [LOG]:
        return [low] if low == high else None
    steps = round((high - low) / rest[0])
    return [_tidy(low + place * rest[0]) for place in range(steps + 1)]


def probes(dimension: Dimension) -> list[Any]:
    """Values that a recipe must be able to have for the dimension to make sense: each choice, or both ends."""
    if dimension.choice is not None:
        return list(dimension.choice)
    if dimension.optional:
        return [None]
    low, high, *_ = dimension.int or dimension.float or ()
    return [low, high]


def contains(dimension: Dimension, value: Any) -> bool:
    """Whether a dimension has a value."""
    known = options(dimension)
    if dimension.int is None and dimension.float is None:
        return any(_encode(value) == _encode(one) for one in known or ())
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    if known is not None:
        return value in known
    low, high, *_ = dimension.float or ()
    return bool(low <= value <= high)


class Space:
    """Dimensions by path, each after those that decide whether it is there.

    Args:
        dimensions: As a search file has them.
        where: The file, for errors.

    Raises:
        UsageError: `when` names no path of the space, or a value it does not have, or dimensions wait for one another.
    """

    def __init__(self, dimensions: Mapping[str, Dimension], where: str) -> None:
        self._parents = {path: _parents(path, dimensions) for path in dimensions}
        for path, dimension in dimensions.items():
            for parent, value in dimension.when.items():
                _check_condition(f"{where}: space.{path}.when.{parent}", parent, value, dimensions)
        self.dimensions: dict[str, Dimension] = {}
        left = dict(dimensions)
        while left:
            ready = [path for path in left if all(parent in self.dimensions for parent in self._parents[path])]
            if not ready:
                raise UsageError(
                    f"{where}: space",
                    expected="settings that do not wait for each other",
                    found=", ".join(left),
                    fix="change `when`",
                )
            self.dimensions |= {path: left.pop(path) for path in ready}

    def is_there(self, path: str, settings: Mapping[str, Any]) -> bool:
        """Whether a setting belongs to a trial whose earlier settings are these."""
        when = self.dimensions[path].when
        return all(
            parent in settings and (_is_one_of(settings[parent], when[parent]) if parent in when else settings[parent] is not None)
            for parent in self._parents[path]
        )

    def draw(self, trial: optuna.Trial) -> Settings:
        """What Optuna proposes, value by path."""
        settings: Settings = {}
        for path, dimension in self.dimensions.items():
            if self.is_there(path, settings):
                settings[path] = _suggest(trial, path, dimension)
        return settings

    def read(self, params: Mapping[str, Any]) -> Settings:
        """What a trial was given, from the parameters that Optuna keeps of it."""
        return self.those_there({path: _decode(self.dimensions[path], kept) for path, kept in params.items() if path in self.dimensions})

    def those_there(self, settings: Mapping[str, Any]) -> Settings:
        """Settings without those that others of them switch off."""
        kept: Settings = {}
        for path in self.dimensions:
            if path in settings and self.is_there(path, kept):
                kept[path] = settings[path]
        return kept

    def params(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as Optuna keeps them; the opposite of `read`."""
        by_list = {path for path, one in self.dimensions.items() if one.choice is not None or one.optional}
        return {path: _encode(value) if path in by_list else value for path, value in settings.items()}

    def overrides(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as changes to the recipe: an optional step that is there is no change."""
        return {path: value for path, value in settings.items() if not (self.dimensions[path].optional and value)}

    def needed(self, path: str) -> Settings:
        """The settings of others that a setting needs to be there at all."""
        settings: Settings = {}
        for parent in self._parents[path]:
            settings |= self.needed(parent)
            when, known = self.dimensions[path].when.get(parent), options(self.dimensions[parent])
            if parent in self.dimensions[path].when:
                settings[parent] = when[0] if isinstance(when, list) else when
            elif known is not None:
                settings[parent] = next((value for value in known if value is not None), None)
            else:
                settings[parent] = probes(self.dimensions[parent])[0]
        return settings

    def count(self) -> float:
        """How many different trials there are; infinite where a float has no step."""
        deciding = {parent for parents in self._parents.values() for parent in parents}

        def below(paths: list[str], settings: Settings) -> float:
            if not paths:
                return 1
            path, *rest = paths
            if not self.is_there(path, settings):
                return below(rest, settings)
            known = options(self.dimensions[path])
            if known is None:
                return math.inf
            if path in deciding:
                return sum(below(rest, {**settings, path: value}) for value in known)
            return len(known) * below(rest, {**settings, path: known[0]})

        return below(list(self.dimensions), {})

    def of_recipe(self, recipe: Recipe) -> Settings:
        """The settings that leave a recipe as it is, those that can be told: a float without a step is left out."""
        settings: Settings = {}
        for path, dimension in self.dimensions.items():
            if not self.is_there(path, settings):
                continue
            for value in (options(dimension) or [])[:CANDIDATES]:
                if self._leaves(recipe, path, value):
                    settings[path] = value
                    break
        return settings

    def _leaves(self, recipe: Recipe, path: str, value: Any) -> bool:
        try:
            return apply_overrides(recipe, self.overrides({path: value})).to_plain() == recipe.to_plain()
        except UsageError:  # a value that the recipe cannot have is not the one it has
            return False


def _parents(path: str, dimensions: Mapping[str, Dimension]) -> list[str]:
    """The paths that decide whether a setting is there: those it names, and those it lies below."""
    above = [other for other in dimensions if path.startswith(f"{other}.")]
    return list(dict.fromkeys([*dimensions[path].when, *above]))


def _check_condition(where: str, parent: str, value: Any, dimensions: Mapping[str, Dimension]) -> None:
    known = list(dimensions)
    if parent not in dimensions:
        raise UsageError(where, expected="a path of the space", found=f"'{parent}'{closest(parent, known)}", fix="name one of its paths")
    for one in value if isinstance(value, list) else [value]:
        if not contains(dimensions[parent], one):
            raise UsageError(where, expected=f"a value that {parent} may have", found=repr(one), fix="name one of its values")


def _is_one_of(value: Any, wanted: Any) -> bool:
    return _encode(value) in [_encode(one) for one in (wanted if isinstance(wanted, list) else [wanted])]


def _suggest(trial: optuna.Trial, path: str, dimension: Dimension) -> Any:
    if dimension.int is not None:
        low, high, *rest = dimension.int
        return trial.suggest_int(path, low, high, step=rest[0] if rest else 1)
    if dimension.float is not None:
        low, high, *rest = dimension.float
        log = rest == [LOG]
        return _tidy(trial.suggest_float(path, low, high, step=None if log or not rest else rest[0], log=log))
    known = options(dimension)
    assert known is not None
    return _decode(dimension, trial.suggest_categorical(path, [_encode(value) for value in known]))


def _decode(dimension: Dimension, kept: Any) -> Any:
    if dimension.int is not None:
        return int(kept)
    return _tidy(kept) if dimension.float is not None else json.loads(kept)


def _encode(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _tidy(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
