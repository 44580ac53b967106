"""What a search ends with: every point, the Pareto set as recipes, and the winner, which alone sees the test split, once."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitedge.artifact import read_json, write_json, write_text
from vitedge.errors import InputError, VitedgeError
from vitedge.evaluate import paired_interval
from vitedge.recipe import Recipe
from vitedge.study.folder_lock import held
from vitedge.study.pareto import choose_winner, front
from vitedge.study.point import Point
from vitedge.study.records import Record
from vitedge.study.trial import Reference, judge_rows, key_of, plan, time_again
from vitedge.study.workshop import Bar, Workshop, build, settings_digest, trial_root

RESULT, WINNER, PARETO = "search.json", "winner.json", "pareto"
END_LOCK = ".end.lock"
SCHEMA_VERSION = 1
Bars = Callable[[], AbstractContextManager[Bar]]


@dataclass(frozen=True)
class Outcome:
    """A search as far as it has come.

    Attributes:
        records: Every trial.
        points: Of all files of all trials, the baseline's among them.
        front: Those that no other dominates, the best first.
        winner: The one; None where every point misses a constraint.
        test: What the test split says of the winner; None where it has not been asked, or there is none.
        recipes: Identity of a recipe to its file.
        ended: Why it ended.
        plain: All of it, as `search.json` has it.
    """

    records: tuple[Record, ...]
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    winner: Point | None
    test: dict[str, Any] | None
    recipes: dict[str, Path]
    ended: str
    plain: dict[str, Any]


def write_result(
    shop: Workshop,
    reference: Reference,
    records: Sequence[Record],
    ended: str,
    test: dict[str, Any] | None = None,
    recipes: dict[str, Path] | None = None,
) -> Outcome:
    """Write `search.json` of what there is so far."""
    search = shop.definition.search
    points = (*reference.points, *(point for record in records for point in record.points))
    kept, winner, recipes = front(points, search.objectives), choose_winner(points), recipes or {}
    on_front = {(point.trial, point.key) for point in kept}
    plain = {
        "schema_version": SCHEMA_VERSION,
        "search": search.name,
        "description": search.description,
        "device": shop.device.name,
        "batch_size": search.measure.batch_size,
        "objectives": list(search.objectives),
        "limits": shop.limits,
        "ended": ended,
        "baseline": {
            "recipe": shop.definition.baseline.name,
            "fastest": reference.fastest.name,
            "best": reference.best.name,
            "smallest_mib": reference.smallest_mib,
            "skipped": list(reference.skipped),
        },
        "conditions": reference.conditions,
        "trials": [record.to_plain() for record in records],
        "points": [
            {**point.to_plain(), "inside": point.inside, "gain": point.gain, "on_front": (point.trial, point.key) in on_front}
            for point in points
        ],
        "recipes": {digest: str(path) for digest, path in recipes.items()},
        "winner": None if winner is None else {**winner.to_plain(), "gain": winner.gain, "test": test},
    }
    write_json(shop.folder / RESULT, plain)
    return Outcome(tuple(records), points, tuple(kept), winner, test, recipes, ended, plain)


def finish(shop: Workshop, reference: Reference, read: Callable[[], list[Record]], ended: str, bars: Bars) -> Outcome:
    """Write the Pareto set as recipes and let the test split judge the winner, unless it did so before.

    While another worker is at a trial, its end may bring another winner: the last worker asks the test split.

    Args:
        shop: The search.
        reference: Its baseline.
        read: Gives all trials as they are now; another worker may have ended one while this one waited.
        ended: Why this worker ended.
        bars: Gives progress bars by name.
    """
    from filelock import FileLock

    with FileLock(shop.folder / END_LOCK):
        records = read()
        points = (*reference.points, *(point for record in records for point in record.points))
        kept, winner = front(points, shop.definition.search.objectives), choose_winner(points)
        recipes = write_recipes(shop, reference, kept, records)
        others = [record.number for record in records if record.state == "RUNNING"]
        test = None
        if winner is not None and others:
            shop.say(
                f"another worker is at trial {', '.join(map(str, others))}; the last worker to end asks the test split about the winner"
            )
        elif winner is not None:
            with bars() as bar:
                try:
                    test = test_winner(shop, reference, winner, records, bar)
                except VitedgeError as error:  # what was found stands all the same
                    test = {"reason": str(error)}
        return write_result(shop, reference, records, ended, test, recipes)


def test_winner(shop: Workshop, reference: Reference, winner: Point, records: Sequence[Record], bar: Bar) -> dict[str, Any]:
    """The winner once more, and never again: top-1 on the whole test split, paired with the baseline's best file, and its speed.

    Raises:
        VitedgeError: The winner's file cannot be built again.
    """
    path = shop.folder / WINNER
    judged_before = read_json(path) if path.is_file() else {}
    images = shop.images("test")
    stamp = [list(winner.key), winner.sha256, images.digest, list(key_of(reference.best))]
    if judged_before.get("of") == stamp:
        before: dict[str, Any] = judged_before["test"]
        return before
    recipe, root = _recipe_of(shop, winner, records)
    with held(root, shop.say):
        rows, _ = plan(shop, build(shop, recipe, root, bar), ("*",))
        wanted = winner.key[1:]
        found = [one for one in rows if (one.row.artifact.name, one.row.runtime, one.row.provider, one.row.precision) == wanted]
        if not found:
            raise InputError(str(root), expected=winner.label, found="no such file that runs here", fix="search again on the same device")
        row = found[0]
        if row.row.artifact.sha256 != winner.sha256:
            raise InputError(
                str(root),
                expected=f"{winner.label} as it was measured",
                found="a file of other bytes",
                fix="search again in another folder",
            )
        judged, _, errors = judge_rows(shop, [row, reference.best], images, bar)
        speed = time_again(shop, reference, row, bar) if key_of(row) != key_of(reference.fastest) else None
    if errors:
        return {"reason": str(errors[0])}
    (quality, label), (best, _) = judged[key_of(row)], judged[key_of(reference.best)]
    drop, low, high = paired_interval(best.correct, quality.correct)
    test = {
        "sha256": row.row.artifact.sha256,
        "top1": quality.top1,
        "top1_interval": list(quality.top1_interval),
        "baseline": reference.best.name,
        "baseline_top1": best.top1,
        "top1_drop": drop,
        "top1_drop_interval": [low, high],
        "images": label,
        "speed": speed,
    }
    write_json(path, {"schema_version": SCHEMA_VERSION, "of": stamp, "test": test})
    return test


def _recipe_of(shop: Workshop, point: Point, records: Sequence[Record]) -> tuple[Recipe, Path]:
    """The recipe of a point, and its build folder."""
    if point.trial is None:
        return shop.definition.baseline, shop.baseline_root
    record = next(record for record in records if record.number == point.trial)
    recipe = shop.definition.recipe_of(record.settings)
    return recipe, trial_root(shop.folder, recipe)


def write_recipes(shop: Workshop, reference: Reference, kept: Sequence[Point], records: Sequence[Record]) -> dict[str, Path]:
    """A recipe file for each trial of the Pareto set, the best first; files of an earlier call are removed.

    Returns:
        Identity of a recipe to its file.
    """
    by_number = {record.number: record for record in records}
    digests = list(dict.fromkeys((point.settings, point.trial) for point in kept if point.trial is not None))
    recipes: dict[str, Path] = {}
    for place, (digest, number) in enumerate(digests, start=1):
        path = shop.folder / PARETO / f"{place:02}_{shop.definition.search.name}_{digest[:8]}.yaml"
        recipe = shop.definition.recipe_of(by_number[number].settings)
        assert settings_digest(recipe) == digest
        recipe = with_own_teacher(shop, recipe)
        own = [point for point in kept if point.trial == number]
        write_text(path, recipe_text(shop, reference, recipe, path, number, own))
        recipes[digest] = path
    for path in (shop.folder / PARETO).glob("*.yaml"):
        if path not in recipes.values():
            path.unlink(missing_ok=True)
    return recipes


def with_own_teacher(shop: Workshop, recipe: Recipe) -> Recipe:
    """The recipe with the search's own baseline as its teacher, by path, where it names it: elsewhere that name is another model."""
    name, path = shop.definition.baseline.name, str((shop.baseline_root / "checkpoint.safetensors").resolve())
    steps = tuple(
        (step, config.model_copy(update={"teacher": path}) if getattr(config, "teacher", None) == name else config)
        for step, config in recipe.steps
    )
    return recipe.model_copy(update={"steps": steps})


def recipe_text(shop: Workshop, reference: Reference, recipe: Recipe, path: Path, number: int, points: Sequence[Point]) -> str:
    """A recipe as a file: what it is, the command, what to expect, then the recipe."""
    search, conditions = shop.definition.search, reference.conditions
    options = (("--weights", shop.weights), ("--data", shop.data), ("--device", search.device if search.device != "cpu" else None))
    command = ["vitedge", "export", "--recipe", str(path), *(word for name, value in options if value for word in (name, value))]
    what = f"Trial {number} of the search {search.name}, of its Pareto set in {', '.join(search.objectives)}."
    lines = [what, "", f"  {shlex.join(command)}", ""]
    lines += [f"Expect: {expected(point)}" for point in points]
    lines += [
        f"Ratios are to {shop.definition.baseline.name}: images/s to {reference.fastest.name} in turns with it, size to its smallest file, "
        f"drop to {reference.best.name}.",
        f"Measured on {conditions['cpu']}, {conditions['threads']} threads, batch {search.measure.batch_size}, device {shop.device.name}, "
        f"vitedge {conditions['commit']}.",
    ]
    plain = {key: value for key, value in recipe.to_plain().items() if key != "name"}
    plain["description"] = what
    header = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return header + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def expected(point: Point) -> str:
    """A point's figures in a line."""
    interval = "" if point.speed_low is None else f" ({point.speed_low:.2f} to {point.speed_high:.2f})"
    drop = f"{point.top1_drop:.2f} points lost ({point.drop_low:.2f} to {point.drop_high:.2f})"
    size = f"{point.size_mib:.2f} MiB (x{point.size_ratio:.2f})"
    return f"{point.label}: images/s x{point.speed_ratio:.2f}{interval}, {size}, top-1 {point.top1:.2f} % of {point.images}, {drop}"
