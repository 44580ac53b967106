"""One trial of a search: time its files in turns with the baseline's fastest one, and judge them on validation images.

What may run is decided as `vitedge bench` decides it, timed as it times and judged as it judges: every file in each runtime and float
precision of the device, rounds in turns, every round in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from vitedge.artifact import digest_of, read_json, write_json
from vitedge.bench.compare import compare_speed
from vitedge.bench.conditions import Settings, gather
from vitedge.bench.host_lock import working
from vitedge.bench.quality import Images, judge
from vitedge.bench.records import Measurement, Skipped
from vitedge.bench.rows import Candidate, PlannedRow, nothing_runs, plan_rows
from vitedge.bench.session import time_rows
from vitedge.bench.timing import TimingSettings
from vitedge.device import mismatches, usable_runtimes
from vitedge.errors import ExtraMissingError, InputError, UnavailableError, UsageError, VitedgeError
from vitedge.evaluate import Quality, paired_interval
from vitedge.host import probe_host
from vitedge.recipe import Recipe
from vitedge.study.folder_lock import held
from vitedge.study.point import Point, misses_of
from vitedge.study.workshop import Bar, Workshop, build, settings_digest, trial_root

BASELINE = "baseline.json"
AGAIN = 3  # times the rounds of a trial, for the winner
SCHEMA_VERSION = 1
RowKey = tuple[str, str, str, str]


def plan(shop: Workshop, candidates: Sequence[Candidate], patterns: Sequence[str]) -> tuple[list[PlannedRow], list[Skipped]]:
    """The files in every runtime of the device that runs them.

    Raises:
        UnavailableError: Nothing here runs any of them.
        UsageError: No file has a name that is measured.
    """
    measure = shop.definition.search.measure
    chosen = [one for one in candidates if any(fnmatchcase(one.artifact.name, pattern) for pattern in patterns)]
    if not chosen:
        names = ", ".join(one.artifact.name for one in candidates)
        raise UsageError("measure.artifacts", expected=f"a pattern of {names}", found=", ".join(patterns), fix="change the patterns")
    uses = [use for use in usable_runtimes(shop.device, shop.host) if not measure.runtimes or use[0].runtime in measure.runtimes]
    rows, skipped = plan_rows(chosen, shop.device, shop.host, uses, shop.threads, (measure.batch_size,))
    if not rows:
        raise nothing_runs(shop.device, skipped)
    return rows, skipped


def key_of(planned: PlannedRow) -> RowKey:
    """One file, runtime and precision."""
    row = planned.row
    return (row.artifact.sha256, row.runtime, row.provider, row.precision)


@dataclass(frozen=True)
class Timed:
    """Files timed in one run.

    Attributes:
        measurements: By row, those that could be timed.
        skipped: Those that could not, with the reason.
        errors: What was raised for them.
        conditions: Of the run.
    """

    measurements: dict[RowKey, Measurement]
    skipped: list[Skipped]
    errors: list[VitedgeError]
    conditions: dict[str, Any]


def time_alone(shop: Workshop, rows: Sequence[PlannedRow], bar: Bar, times_as_long: int = 1) -> Timed:
    """Time rows in turns while nothing else of vitedge works on this host, in `times_as_long` as many rounds as the search's."""
    measure = shop.definition.search.measure
    settings = Settings(times_as_long * measure.rounds, TimingSettings(measure.iterations, measure.seconds), shop.threads)
    with working("timing", shop.say):
        conditions = gather(shop.device, probe_host(), settings, mismatches(shop.device, shop.host))
        timings = time_rows(rows, settings, conditions, bar("timing"))
    found = {key_of(planned): several[0] for planned, several in timings.measurements}
    return Timed(found, timings.skipped, timings.errors, conditions)


def time_again(shop: Workshop, reference: Reference, row: PlannedRow, bar: Bar) -> dict[str, Any]:
    """Images/s of one file over those of the baseline's fastest, in a run of their own with more rounds, or the reason why not."""
    timed = time_alone(shop, [reference.fastest, row], bar, AGAIN)
    one, base = (timed.measurements.get(key_of(planned)) for planned in (row, reference.fastest))
    if one is None or base is None:
        return {"reason": str(timed.errors[0]) if timed.errors else "it was not timed"}
    speed = compare_speed(one, base, "the baseline's fastest file")
    if speed.ratio is None:
        return {"reason": speed.reason}
    return {
        "ratio": speed.ratio,
        "interval": [speed.low, speed.high],
        "rounds": AGAIN * shop.definition.search.measure.rounds,
        "unstable": one.unstable or base.unstable,
    }


def judge_rows(
    shop: Workshop, rows: Sequence[PlannedRow], images: Images, bar: Bar
) -> tuple[dict[RowKey, tuple[Quality, str]], list[Skipped], list[VitedgeError]]:
    """Top-1 of rows, each file in the runtime and precision it was timed in; what cannot be judged, with the reason."""
    judged: dict[RowKey, tuple[Quality, str]] = {}
    skipped: list[Skipped] = []
    errors: list[VitedgeError] = []
    with working("build", shop.say):
        for planned in rows:
            row = planned.row
            try:
                judged[key_of(planned)] = judge(row, images, bar(f"top-1 {planned.name}"))
            except VitedgeError as error:
                errors.append(error)
                skipped.append(Skipped(row.artifact.name, row.runtime, row.precision, str(error), failed=True))
    return judged, skipped, errors


@dataclass(frozen=True)
class Reference:
    """The baseline, measured: what trials are compared with.

    Attributes:
        fastest: Its file with most images/s, as a row; every trial is timed in turns with it.
        best: Its file with the highest top-1 on validation, as a row.
        smallest_mib: Size of its smallest file, MiB.
        points: All its files.
        conditions: They were measured under.
        skipped: What could not be measured, and why.
    """

    fastest: PlannedRow
    best: PlannedRow
    smallest_mib: float
    points: tuple[Point, ...]
    conditions: dict[str, Any]
    skipped: tuple[str, ...]


def measure_baseline(shop: Workshop, identity: str, bar: Bar) -> Reference:
    """Build and measure the baseline, or read what an earlier call measured; the first worker does it, others wait.

    Raises:
        VitedgeError: It cannot be built, timed or judged.
    """
    recipe = shop.definition.baseline
    with held(shop.baseline_root, shop.say):
        candidates = build(shop, recipe, shop.baseline_root, bar)
        rows, unplanned = plan(shop, candidates, ("*",))
        by_key = {key_of(planned): planned for planned in rows}
        path = shop.folder / BASELINE
        made_of = digest_of(identity, sorted({key[0] for key in by_key}))
        kept = read_json(path) if path.is_file() else {}
        if kept.get("schema_version") == SCHEMA_VERSION and kept.get("made_of") == made_of:
            fastest, best = (by_key.get(tuple(kept[name])) for name in ("fastest", "best"))
            if fastest is not None and best is not None:
                points = tuple(Point.from_plain(point) for point in kept["points"])
                return Reference(fastest, best, kept["smallest_mib"], points, kept["conditions"], tuple(kept["skipped"]))
        timed = time_alone(shop, rows, bar)
        timeable = [planned for planned in rows if key_of(planned) in timed.measurements]
        if not timeable:
            raise timed.errors[0]
        judged, unjudged, errors = judge_rows(shop, timeable, shop.images("validation"), bar)
        known = [planned for planned in timeable if key_of(planned) in judged]
        if not known:
            raise errors[0]
        fastest = max(known, key=lambda planned: timed.measurements[key_of(planned)].images_per_s)
        best = max(known, key=lambda planned: judged[key_of(planned)][0].top1)
        smallest = min(planned.row.artifact.size_bytes for planned in known) / 2**20
        skipped = tuple(explain([*unplanned, *timed.skipped, *unjudged]))
        reference = Reference(fastest, best, smallest, (), timed.conditions, skipped)
        points = tuple(make_points(shop, reference, recipe, None, known, timed, judged, judged[key_of(best)][0]))
        reference = replace(reference, points=points)
        plain: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "made_of": made_of, "smallest_mib": smallest, "skipped": list(skipped)}
        plain |= {"fastest": key_of(fastest), "best": key_of(best), "conditions": timed.conditions}
        write_json(path, {**plain, "points": [point.to_plain() for point in points]})
        return reference


@dataclass(frozen=True)
class Measured:
    """What came of a trial.

    Attributes:
        points: Of its files, at least one.
        skipped: Files that could not be measured, and why.
        conditions: They were measured under.
    """

    points: tuple[Point, ...]
    skipped: tuple[str, ...]
    conditions: dict[str, Any]


def measure_trial(shop: Workshop, reference: Reference, recipe: Recipe, number: int, bar: Bar) -> Measured:
    """Build a trial's recipe and measure its files; the caller holds the trial's folder.

    Raises:
        ExtraMissingError: A package is missing that these settings need.
        VitedgeError: It cannot be built, or none of its files can be timed and judged.
    """
    try:
        return _measure_trial(shop, reference, recipe, number, bar)
    except ExtraMissingError:
        raise
    except UnavailableError as error:  # of these settings alone, for the baseline runs here: a precision, a compiler, a provider
        raise InputError(recipe.name, expected="settings that run on this host", found=str(error), fix="change the space") from error


def _measure_trial(shop: Workshop, reference: Reference, recipe: Recipe, number: int, bar: Bar) -> Measured:
    candidates = build(shop, recipe, trial_root(shop.folder, recipe), bar)
    rows, unplanned = plan(shop, candidates, shop.definition.search.measure.artifacts)
    with_reference = [reference.fastest, *(planned for planned in rows if key_of(planned) != key_of(reference.fastest))]
    timed = time_alone(shop, with_reference, bar)
    if key_of(reference.fastest) not in timed.measurements:
        raise timed.errors[0]
    timeable = [planned for planned in rows if key_of(planned) in timed.measurements]
    # The baseline's answers come from the cache, where this host judged it before.
    judged, unjudged, errors = judge_rows(shop, [*timeable, reference.best], shop.images("validation"), bar)
    known = [planned for planned in timeable if key_of(planned) in judged]
    if not known or key_of(reference.best) not in judged:
        raise [*timed.errors, *errors][0]
    points = make_points(shop, reference, recipe, number, known, timed, judged, judged[key_of(reference.best)][0])
    return Measured(tuple(points), tuple(explain([*unplanned, *timed.skipped, *unjudged])), timed.conditions)


def make_points(
    shop: Workshop,
    reference: Reference,
    recipe: Recipe,
    number: int | None,
    rows: Sequence[PlannedRow],
    timed: Timed,
    judged: dict[RowKey, tuple[Quality, str]],
    best: Quality,
) -> list[Point]:
    """Points of files that were timed and judged."""
    settings, base = settings_digest(recipe), timed.measurements[key_of(reference.fastest)]
    points = []
    for planned in rows:
        row, one, (quality, label) = planned.row, timed.measurements[key_of(planned)], judged[key_of(planned)]
        speed = compare_speed(one, base, "the baseline's fastest file")
        if speed.ratio is None:
            raise UsageError(planned.name, expected="rows of one run", found=speed.reason, fix="report it, with `vitedge env`")
        drop = paired_interval(best.correct, quality.correct)
        size, p50 = row.artifact.size_bytes / 2**20, one.latency_ms.p50
        figures: dict[str, Any] = {
            "size_mib": size,
            "size_ratio": size / reference.smallest_mib,
            "images_per_s": one.images_per_s,
            "speed_ratio": speed.ratio,
            "p50_ms": math.inf if p50 is None else p50,
            "peak_rss_mib": one.peak_rss_mib,
            "top1": quality.top1,
            "top1_drop": float(drop[0]),
        }
        points.append(
            Point(
                trial=number,
                settings=settings,
                artifact=row.artifact.name,
                sha256=row.artifact.sha256,
                runtime=row.runtime,
                provider=row.provider,
                asked=row.precision,
                precision=one.precision,
                float_precision=one.float_precision,
                speed_low=speed.low,
                speed_high=speed.high,
                top1_low=quality.top1_interval[0],
                top1_high=quality.top1_interval[1],
                drop_low=float(drop[1]),
                drop_high=float(drop[2]),
                images=label,
                unstable=one.unstable,
                emulated=one.emulated,
                misses=misses_of(shop.limits, figures),
                **{**figures, "p50_ms": p50},
            )
        )
    return points


def explain(skipped: Sequence[Skipped]) -> list[str]:
    """What was not measured, a line each."""
    lines = []
    for one in skipped:
        place = " ".join(word for word in (one.runtime, one.precision) if word)
        lines.append(f"{one.artifact}{f' in {place}' if place else ''}: {one.reason}")
    return list(dict.fromkeys(lines))
