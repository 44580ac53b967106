"""Any measurement against any other: what may be compared, the ratio of speeds by bootstrap, and top-1 image by image.

Speed. Rows of one run are measured in turns, round by round, so ratios are paired: per round r the log
ratio is d_r = log(rate_r / baseline rate_r), and the ratio given is exp(mean d), as in `verdict`. The
interval is a bootstrap's: rounds are drawn with replacement, both rows' together, and within each drawn
round the inferences of each row; the quantiles of exp(mean d) over the draws bound it.

What that can tell and what it cannot. It assumes no distribution, so a round that went wrong skews the
interval as it should. But it knows only the few processes there were: R rounds have R values of d, no draw
leaves their span by more than the inferences' own noise, and the plain percentile interval is too narrow by
sqrt((R - 1) / R) and by the factor between Student's t and the normal: of five rounds' 95 % intervals about
84 % cover the truth, of three rounds' 75 %. Two things are done about it. The quantiles are those of the expanded
percentile interval (Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69,
2015): Phi(-+ sqrt(R / (R - 1)) t), with t of R - 1 degrees of freedom. And the interval is never
narrower than `verdict.paired_ratio`'s t interval, which alone can reach outside the rounds' span: with two
or three rounds it decides, with ten or more the two are close. One round has no interval, whatever
its thousand inferences say: they share one process, and processes differ.

Top-1. Two models' answers to the same images differ in the images one has right and the other has not;
those alone tell (`evaluate.paired_interval`, `evaluate.mcnemar_of`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from vitedge.bench.answers import unpack
from vitedge.bench.records import Measurement
from vitedge.bench.verdict import paired_ratio, relation, t95
from vitedge.evaluate import discordant, mcnemar_of, paired_interval, top1_agreement

DRAWS = 4000  # of rounds; the expanded quantiles of five rounds leave four draws beyond each end
INNER_DRAWS = 200  # of the inferences of one round, from which every draw of that round takes one
HOST = ("cpu", "arch", "cores", "memory_mib", "os")


@dataclass(frozen=True)
class Comparison:
    """A row's speed against a baseline's.

    Attributes:
        relation: baseline | faster | same | slower | unknown | not comparable.
        ratio: Images per second over the baseline's, geometric mean over rounds; None where not comparable.
        low, high: 95 % interval of `ratio`; None with one round.
        baseline: What it was compared with, by name.
        reason: Why it is not comparable, or why there is no interval.
    """

    relation: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    baseline: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Flips:
    """A row's answers against a baseline's on the same images.

    Attributes:
        relation: baseline | better | same | worse | not comparable; `same` where the interval covers 0.
        change: Top-1 points above the baseline; negative where points were lost.
        low, high: 95 % interval of `change`, paired.
        agreement: Percent of images with the same predicted class.
        broken: Images that the baseline has right and this row has not.
        repaired: Images that this row has right and the baseline has not.
        p: McNemar's exact two-sided p that both are right equally often.
        images: How many images.
        baseline: What it was compared with, by name.
        reason: Why it is not comparable.
    """

    relation: str
    change: float | None = None
    low: float | None = None
    high: float | None = None
    agreement: float | None = None
    broken: int = 0
    repaired: int = 0
    p: float | None = None
    images: int = 0
    baseline: str = ""
    reason: str = ""


def run_of(conditions: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for measurements of one run, whose rounds were interleaved."""
    load = conditions.get("load_average")
    parts = (*(conditions.get(name) for name in (*HOST, "device", "date", "rounds", "seed")), tuple(load) if load else None)
    return parts


def why_not_comparable(one: Measurement, other: Measurement) -> str:
    """Why the ratio of two rows' speeds would mean nothing; empty where it means something."""
    here, there = one.conditions, other.conditions
    if any(here.get(name) != there.get(name) for name in HOST):
        return f"another host: {_host(here)}, not {_host(there)}"
    if here.get("device") != there.get("device"):
        return f"another device: {here.get('device')}, not {there.get('device')}"
    if run_of(here) != run_of(there):
        return f"another run: {here.get('date')}, not {there.get('date')}"
    if one.batch_size != other.batch_size:
        return f"another batch size: {one.batch_size}, not {other.batch_size}"
    if len(one.rounds) != len(other.rounds):
        return f"another number of rounds: {len(one.rounds)}, not {len(other.rounds)}"
    return ""


def _host(conditions: dict[str, Any]) -> str:
    return f"{conditions.get('cpu')}, {conditions.get('cores')} cores, {conditions.get('memory_mib')} MiB, {conditions.get('os')}"


def compare_speed(one: Measurement, baseline: Measurement, name: str, draws: int = DRAWS, seed: int = 0) -> Comparison:
    """A row's images per second against a baseline's of the same run.

    Args:
        one: The row.
        baseline: What it is compared with; itself for the baseline's own row.
        name: What to call the baseline.
        draws: Bootstrap draws.
        seed: Of the draws; the same rows and seed give the same interval.
    """
    if one is baseline:
        return Comparison("baseline", 1.0, 1.0, 1.0, name)
    reason = why_not_comparable(one, baseline)
    if reason:
        return Comparison("not comparable", baseline=name, reason=reason)
    rates, base_rates = _rates(one), _rates(baseline)
    ratio, t_low, t_high = paired_ratio(rates, base_rates)
    if t_low is None or t_high is None:
        return Comparison("unknown", ratio, baseline=name, reason="one round gives no interval; use --rounds 2 or more")
    generator = np.random.default_rng(seed)
    low, high = bootstrap_interval(rates, base_rates, one.samples_ms, baseline.samples_ms, generator, draws)
    low, high = min(low, t_low), max(high, t_high)
    return Comparison(relation(low, high), ratio, low, high, name)


def _rates(measurement: Measurement) -> list[float]:
    return [float(one["iterations_per_s"]) for one in measurement.rounds]


def bootstrap_interval(
    rates: Sequence[float],
    base_rates: Sequence[float],
    samples_ms: Sequence[Sequence[float]],
    base_samples_ms: Sequence[Sequence[float]],
    generator: np.random.Generator,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """Expanded percentile interval, nominally 95 %, of the geometric mean over rounds of two rates' ratio.

    Args:
        rates: Iterations per second of each round, R of two or more.
        base_rates: The baseline's in the same rounds.
        samples_ms: Time of each inference, a list per round; rounds of fewer than two add no noise of their own.
        base_samples_ms: The baseline's.
        generator: Draws; it is advanced.
        draws: How many times the rounds are drawn.
    """
    rounds = len(rates)
    log_ratios_R = np.log(np.asarray(rates, np.float64) / np.asarray(base_rates, np.float64))
    noise_RI, base_noise_RI = _inner_noise(samples_ms, rounds, generator), _inner_noise(base_samples_ms, rounds, generator)
    picked_DR = generator.integers(0, rounds, (draws, rounds))
    inner_DR, base_inner_DR = (generator.integers(0, INNER_DRAWS, (draws, rounds)) for _ in range(2))
    # A longer mean time is a lower rate, so a row's own noise counts down and the baseline's up.
    drawn_DR = log_ratios_R[picked_DR] - noise_RI[picked_DR, inner_DR] + base_noise_RI[picked_DR, base_inner_DR]
    tail = NormalDist().cdf(-math.sqrt(rounds / (rounds - 1)) * t95(rounds - 1))
    low, high = np.exp(np.quantile(drawn_DR.mean(axis=1), [tail, 1 - tail]))
    return float(low), float(high)


def _inner_noise(samples_ms: Sequence[Sequence[float]], rounds: int, generator: np.random.Generator) -> np.ndarray:
    """log(mean time of the drawn inferences / mean time of the round's), rounds by INNER_DRAWS."""
    noise_RI = np.zeros((rounds, INNER_DRAWS))
    for index, samples in enumerate(samples_ms[:rounds]):
        if len(samples) > 1:
            times_N = np.asarray(samples, np.float64)
            means_I = times_N[generator.integers(0, len(times_N), (INNER_DRAWS, len(times_N)))].mean(axis=1)
            noise_RI[index] = np.log(means_I / times_N.mean())
    return noise_RI


def compare_answers(one: Measurement, baseline: Measurement, name: str) -> Flips:
    """A row's answers against a baseline's on the same images, of any run and host.

    Args:
        one: The row.
        baseline: What it is compared with; itself for the baseline's own row.
        name: What to call the baseline.

    Raises:
        InputError: The answers kept with a row are damaged.
    """
    if one is baseline:
        return Flips("baseline", baseline=name)
    for row, whose in ((one, "this row"), (baseline, name)):
        if row.top1 is None:
            return Flips("not comparable", baseline=name, reason=f"top-1 of {whose} was not measured")
        if row.answers is None:
            return Flips("not comparable", baseline=name, reason=f"{whose} was measured before answers were kept")
    own, other = unpack(one.answers or {}, one.artifact), unpack(baseline.answers or {}, baseline.artifact)
    if own.images != other.images:
        return Flips("not comparable", baseline=name, reason=f"other images: {one.top1_images}, not {baseline.top1_images}")
    lost, low, high = paired_interval(other.correct, own.correct)
    broken, repaired = discordant(other.correct, own.correct)
    said = "worse" if low > 0 else "better" if high < 0 else "same"
    agreement = top1_agreement(own.predictions, other.predictions)
    # Points lost, turned into points gained: what a table calls a change.
    change = (0.0 - lost, 0.0 - high, 0.0 - low)
    return Flips(said, *change, agreement, broken, repaired, mcnemar_of(broken, repaired), len(own.correct), name)
