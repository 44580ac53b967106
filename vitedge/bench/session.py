"""Runs the rows in rounds, A B C A B C ..., each time in a new process, and sums the rounds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from vitedge.bench.conditions import Settings
from vitedge.bench.cost import Cost, count_cost
from vitedge.bench.isolation import time_in_worker
from vitedge.bench.records import Latency, Measurement, Skipped, Verdict
from vitedge.bench.rows import PlannedRow
from vitedge.errors import UnavailableError, VitedgeError
from vitedge.progress import Progress, silent

SPREAD_LIMIT = 0.10  # spread of the rounds' medians above which a row is called unstable


@dataclass
class Timings:
    """What the rounds brought.

    Attributes:
        measurements: A list per planned row, one measurement per batch size, without verdict and top-1.
        skipped: Rows that could not be measured.
        errors: What was raised for those that failed.
    """

    measurements: list[tuple[PlannedRow, list[Measurement]]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    errors: list[VitedgeError] = field(default_factory=list)


def time_rows(planned: Sequence[PlannedRow], settings: Settings, conditions: dict[str, Any], progress: Progress = silent) -> Timings:
    """Measure every row in every round; the caller holds the bench lock.

    A row that fails is listed with its reason and left out of later rounds; the others go on.

    Args:
        planned: The rows.
        settings: Rounds, and how long each takes.
        conditions: Stored with every measurement.
        progress: Told of processes done.
    """
    timings = Timings()
    answers: dict[int, list[list[dict[str, Any]]]] = {index: [] for index in range(len(planned))}
    total = settings.rounds * len(planned)
    for turn in range(settings.rounds):
        for index, one in enumerate(planned):
            progress(turn * len(planned) + index, total, one.name)
            if index not in answers:
                continue
            try:
                # What a session really got does not change between rounds, and finding out takes time.
                answers[index].append(time_in_worker(one.row, one.batch_sizes, settings.timing, settings.seed, describe=turn == 0))
            except VitedgeError as error:
                del answers[index]
                timings.errors.append(error)
                failed = not isinstance(error, UnavailableError)
                timings.skipped.append(Skipped(one.row.artifact.name, one.row.runtime, one.row.precision, str(error), failed=failed))
    progress(total, total, "")
    costs: dict[str, Cost] = {}
    for index, rounds in answers.items():
        one = planned[index]
        artifact = one.row.artifact
        if artifact.sha256 not in costs:
            costs[artifact.sha256] = count_cost(artifact)
        cost = costs[artifact.sha256]
        by_batch = zip(*rounds, strict=True)
        timings.measurements.append((one, [summarize(one, list(turns), cost, conditions) for turns in by_batch]))
    return timings


def summarize(one: PlannedRow, turns: Sequence[dict[str, Any]], cost: Cost, conditions: dict[str, Any]) -> Measurement:
    """The measurement out of one batch size's rounds, as `time_in_worker` returned them."""
    samples_ms = [[ns / 1e6 for ns in turn["samples_ns"]] for turn in turns]
    rounds = [
        {
            "iterations": len(turn["samples_ns"]),
            "iterations_per_s": len(turn["samples_ns"]) / (turn["elapsed_ns"] / 1e9),
            "p50_ms": median(samples),
            "warmup_iterations": turn["warmup_iterations"],
            "settled": turn["settled"],
            "load_ms": turn["load_ms"],
            "first_inference_ms": turn["first_inference_ms"],
        }
        for turn, samples in zip(turns, samples_ms, strict=True)
    ]
    facts, artifact, batch_size = turns[0]["facts"], one.row.artifact, turns[0]["batch_size"]
    rate = median(r["iterations_per_s"] for r in rounds)
    return Measurement(
        artifact=artifact.name,
        recipe=artifact.recipe,
        sha256=artifact.sha256,
        runtime=facts["runtime"],
        provider=facts["provider"],
        precision=facts["precision"],
        float_precision=facts["float_precision"],
        batch_size=batch_size,
        params_m=None if cost.params is None else round(cost.params / 1e6, 6),
        macs_g=None if cost.macs is None else round(cost.macs / 1e9, 6),
        size_bytes=artifact.size_bytes,
        iterations_per_s=rate,
        images_per_s=rate * batch_size,
        latency_ms=Latency.of([sample for samples in samples_ms for sample in samples]),
        load_ms=median(r["load_ms"] for r in rounds),
        first_inference_ms=median(r["first_inference_ms"] for r in rounds),
        peak_rss_mib=max(turn["peak_rss_mib"] for turn in turns),
        node_counts=facts["node_counts"],
        rounds=rounds,
        samples_ms=[[round(sample, 3) for sample in samples] for samples in samples_ms],
        unstable=why_unstable([r["p50_ms"] for r in rounds], [r["settled"] for r in rounds]),
        emulated=bool(conditions["environment"] or conditions["mismatches"]),
        verdict=Verdict("unknown"),
        conditions={**conditions, "threads": facts["threads"], "engine_version": facts["version"]},
    )


def why_unstable(medians_ms: Sequence[float], settled: Sequence[bool]) -> str:
    """Why the figures of a row are not to be trusted; empty when they are."""
    reasons = []
    spread = (max(medians_ms) - min(medians_ms)) / median(medians_ms)
    if spread > SPREAD_LIMIT:
        reasons.append(f"the rounds' medians differ by {100 * spread:.0f} %")
    if not all(settled):
        reasons.append(f"the warm-up did not settle in {settled.count(False)} of {len(settled)} rounds")
    return "; ".join(reasons)
