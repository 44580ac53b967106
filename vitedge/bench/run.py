"""A whole bench: choose the rows, time them alone on the host, judge them, compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitedge.bench.conditions import Settings, gather
from vitedge.bench.host_lock import working
from vitedge.bench.quality import Judged, find_images, find_reference, try_judge, with_top1
from vitedge.bench.records import Measurement, Skipped
from vitedge.bench.rows import PlannedRow, check_runtimes, find_candidates, nothing_runs, plan_rows
from vitedge.bench.session import time_rows
from vitedge.bench.verdict import judge as judge_speed
from vitedge.device import load_device, mismatches, require_accelerator, usable_runtimes
from vitedge.errors import VitedgeError
from vitedge.host import probe, probe_host
from vitedge.progress import Progress

Bar = Callable[[str], Progress]


@dataclass(frozen=True)
class BenchRequest:
    """What is asked of a bench.

    Attributes:
        paths: Model files and build folders; empty for everything built.
        build: The folder of build folders.
        device: Profile by name or path.
        data: `--data`.
        runtimes: Only these; empty for all of the profile.
        batch_sizes: Empty for the profile's.
        threads: None for the profile's, else the cores this process may use.
        settings: Rounds and time; its threads are filled in.
        top1: Whether top-1 is measured.
        samples: Test images for top-1, at random; None for the whole split.
    """

    paths: tuple[Path, ...] = ()
    build: Path = Path("build")
    device: str = "cpu"
    data: str | None = None
    runtimes: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    threads: int | None = None
    settings: Settings = field(default_factory=Settings)
    top1: bool = True
    samples: int | None = None


@dataclass(frozen=True)
class BenchResult:
    """What came out.

    Attributes:
        measurements: Judged, in the order of the rows.
        folders: The build folder of each measurement; None for a file outside of one.
        skipped: Rows that were not measured, with the reason.
        errors: What was raised for rows that failed though they should run, or whose answers could not be judged though there are images.
    """

    measurements: tuple[Measurement, ...]
    folders: tuple[Path | None, ...]
    skipped: tuple[Skipped, ...]
    errors: tuple[VitedgeError, ...]


def bench(request: BenchRequest, say: Callable[[str], None], bar: Bar) -> BenchResult:
    """Measure, judge and compare.

    Args:
        request: What to measure and how.
        say: Told, in a line each, what the user should know while waiting.
        bar: Gives a progress bar by name.

    Raises:
        UsageError: Nothing to measure, or options that do not fit the profile.
        UnavailableError: The device's accelerator is missing, or no row can run here.
        InputError: A file that was named is not a model.
        VitedgeError: The only rows there were failed; the first one's error.
    """
    device = load_device(request.device)
    check_runtimes(request.runtimes, device)
    candidates, skipped, damaged = find_candidates(request.paths, request.build)
    host = probe()
    require_accelerator(device, host)
    differing = mismatches(device, host)
    if differing:
        say(f"device {device.name} is not this host ({'; '.join(differing)}): figures are labelled emulated")
    uses = [use for use in usable_runtimes(device, host) if not request.runtimes or use[0].runtime in request.runtimes]
    settings = replace(request.settings, threads=request.threads or device.threads or host.usable_cores)
    planned, unplanned = plan_rows(candidates, device, host, uses, settings.threads, request.batch_sizes or device.batch_sizes)
    skipped += unplanned
    if not planned:
        raise damaged[0] if damaged else nothing_runs(device, skipped)
    if request.data is not None and request.top1:
        for folder in {one.candidate.folder for one in planned}:
            find_images(folder, request.data)  # a wrong --data must not come out after minutes of timing
    with working("timing", say):
        conditions = gather(device, probe_host(), settings, differing)
        timings = time_rows(planned, settings, conditions, bar("timing"))
        if not timings.measurements:
            raise timings.errors[0]
        judged = _judge_rows([one for one, _ in timings.measurements], request, bar)
    artifacts = {one.row.artifact.sha256: one.row.artifact for one in planned}
    schemes = {sha256: artifact.scheme for sha256, artifact in artifacts.items()}
    parents = {sha256: artifact.parent for sha256, artifact in artifacts.items()}
    flat = [
        (measurement, one, found) for (one, several), found in zip(timings.measurements, judged, strict=True) for measurement in several
    ]
    with_speed = judge_speed([measurement for measurement, _, _ in flat], parents, schemes, host.isa)
    by_row = {_row_of(m): found for (m, _, found) in flat}
    finished = [_with_quality(m, with_speed, by_row, schemes) for m in with_speed]
    unjudged = [one.error for one in judged if one.error is not None]
    errors = (*damaged, *timings.errors, *unjudged)
    return BenchResult(tuple(finished), tuple(one.candidate.folder for _, one, _ in flat), (*skipped, *timings.skipped), errors)


def _judge_rows(rows: Sequence[PlannedRow], request: BenchRequest, bar: Bar) -> list[Judged]:
    judged = []
    for one in rows:
        if request.top1:
            judged.append(try_judge(one.row, one.candidate.folder, request.data, request.samples, bar(f"top-1 {one.name}")))
        else:
            judged.append(Judged(one.row.artifact, reason="not asked for (--no-top1)"))
    return judged


RowKey = tuple[str, str, str, str, str]


def _row_of(m: Measurement) -> RowKey:
    return m.sha256, m.runtime, m.provider, m.precision, m.float_precision


def _with_quality(
    measurement: Measurement, others: Sequence[Measurement], by_row: dict[RowKey, Judged], schemes: dict[str, str]
) -> Measurement:
    def found(m: Measurement) -> Judged:
        return by_row[_row_of(m)]

    reference = find_reference(measurement, others, schemes)
    named = (f"{reference.artifact} in {reference.runtime} fp32", found(reference)) if reference else None
    return with_top1(measurement, found(measurement), named)
