"""Any row against any other: what is refused, intervals of known ratios, and flips counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from tests.bench.made import CONDITIONS, make_measurement
from vitedge.bench.answers import Answers, pack
from vitedge.bench.compare import bootstrap_interval, compare_answers, compare_speed, why_not_comparable
from vitedge.bench.records import Measurement
from vitedge.bench.verdict import paired_ratio
from vitedge.evaluate import mcnemar_of


def timed(rates: tuple[float, ...], spread: float = 0.0, inferences: int = 40, seed: int = 0, **changes: Any) -> Measurement:
    """Rounds of these rates whose inferences vary by `spread`."""
    generator = np.random.default_rng(seed)
    samples = [(1000 / rate * (1 + spread * generator.standard_normal(inferences))).tolist() for rate in rates]
    return make_measurement("other.onnx", rates, samples_ms=samples, **changes)


BASE = timed((100.0, 110.0, 90.0, 105.0, 95.0))


def test_the_baselines_own_row():
    said = compare_speed(BASE, BASE, "untouched")
    assert (said.relation, said.ratio, said.baseline) == ("baseline", 1.0, "untouched")


def test_what_hits_both_rows_of_a_round_cancels():
    said = compare_speed(timed((130.0, 143.0, 117.0, 136.5, 123.5)), BASE, "base")
    assert said.relation == "faster"
    assert said.ratio is not None and math.isclose(said.ratio, 1.3)
    assert said.low is not None and said.high is not None
    assert math.isclose(said.low, 1.3, rel_tol=1e-9) and math.isclose(said.high, 1.3, rel_tol=1e-9)


def test_a_difference_inside_the_noise_is_the_same():
    said = compare_speed(timed((101.0, 108.0, 92.0, 104.0, 96.0)), BASE, "base")
    assert said.relation == "same"
    assert said.low is not None and said.high is not None and said.low < 1 < said.high


def test_slower_is_the_inverse_of_faster():
    rates = (130.0, 150.0, 115.0, 140.0, 121.0)
    there, back = compare_speed(timed(rates), BASE, "base"), compare_speed(BASE, timed(rates), "other")
    assert (there.relation, back.relation) == ("faster", "slower")
    assert there.ratio is not None and back.ratio is not None
    assert math.isclose(there.ratio * back.ratio, 1.0)


def test_the_same_seed_gives_the_same_interval():
    row = timed((101.0, 120.0, 92.0, 104.0, 99.0), spread=0.05)
    assert compare_speed(row, BASE, "b") == compare_speed(row, BASE, "b")
    one, other = (
        bootstrap_interval([101.0, 120.0, 92.0], [100.0, 110.0, 90.0], row.samples_ms[:3], [[]] * 3, np.random.default_rng(seed))
        for seed in (0, 1)
    )
    assert one != other


def test_one_round_has_a_ratio_and_no_verdict():
    said = compare_speed(timed((150.0,), spread=0.01, inferences=1000), timed((100.0,), spread=0.01, inferences=1000), "base")
    assert (said.relation, said.low, said.high) == ("unknown", None, None)
    assert said.ratio is not None and math.isclose(said.ratio, 1.5)
    assert "--rounds" in said.reason


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"conditions": {**CONDITIONS, "cpu": "Another processor"}}, "another host"),
        ({"conditions": {**CONDITIONS, "memory_mib": 1}}, "another host"),
        ({"conditions": {**CONDITIONS, "device": "phone"}}, "another device"),
        ({"conditions": {**CONDITIONS, "date": "2026-02-02T00:00:00+00:00"}}, "another run"),
        ({"conditions": {**CONDITIONS, "load_average": [0.2, 0.1, 0.1]}}, "another run"),
        ({"batch_size": 8}, "another batch size"),
    ],
)
def test_rows_that_were_not_timed_together_are_refused(changes: dict[str, Any], word: str):
    row = timed((150.0, 150.0, 151.0, 150.0, 150.0), **changes)
    assert word in why_not_comparable(row, BASE)
    said = compare_speed(row, BASE, "base")
    assert (said.relation, said.ratio) == ("not comparable", None)
    assert word in said.reason


def test_rows_of_other_numbers_of_rounds_are_refused():
    assert "another number of rounds" in why_not_comparable(timed((1.0, 2.0)), BASE)


def test_threads_and_engines_differ_inside_a_run():
    row = timed((1.0,) * 5, conditions={**CONDITIONS, "threads": 1, "engine_version": "9"})
    assert why_not_comparable(row, BASE) == ""


def test_it_is_never_narrower_than_the_t_interval():
    for seed in range(20):
        rates = tuple(np.random.default_rng(seed).lognormal(4.6, 0.05, 3).tolist())
        base = tuple(np.random.default_rng(seed + 100).lognormal(4.6, 0.05, 3).tolist())
        said = compare_speed(timed(rates), timed(base), "base")
        _, low, high = paired_ratio(rates, base)
        assert said.low is not None and said.high is not None and low is not None and high is not None
        assert said.low <= low and high <= said.high


def test_a_round_that_went_wrong_skews_the_interval():
    """Nine rounds of ratio 1 and one of 1/2: the bootstrap reaches further down than up, where the t interval is symmetric."""
    rates, base = [100.0] * 9 + [50.0], [100.0] * 10
    ratio, t_low, t_high = paired_ratio(rates, base)
    low, high = bootstrap_interval(rates, base, [[]] * 10, [[]] * 10, np.random.default_rng(0))
    assert t_low is not None and t_high is not None
    assert math.isclose(t_high / ratio, ratio / t_low)
    assert math.log(high / ratio) < 0.5 * math.log(ratio / low)
    assert high <= 1.0 + 1e-12


def test_the_spread_of_resampled_rounds_is_the_closed_form():
    """Rounds without noise of their own: the variance of a mean of R draws with replacement is s^2 (R - 1) / R^2."""
    generator = np.random.default_rng(3)
    logs = generator.normal(0, 0.02, 40)
    low, high = bootstrap_interval(np.exp(logs).tolist(), [1.0] * 40, [[]] * 40, [[]] * 40, generator, draws=20_000)
    expected = logs.std() / math.sqrt(40)  # of the population, as drawing with replacement has it
    # sqrt(40/39) t(39) = 2.049 standard deviations on either side; a mean of 40 draws is normal enough.
    assert math.isclose((math.log(high) - math.log(low)) / 2, 2.0485 * expected, rel_tol=0.04)


def test_noise_of_the_inferences_widens_it():
    rates, base = [100.0] * 10, [100.0] * 10
    generator = np.random.default_rng(0)
    samples = (10 * (1 + 0.2 * generator.standard_normal((10, 25)))).tolist()
    low, high = bootstrap_interval(rates, base, samples, [[]] * 10, generator)
    # sd of a round's mean is 0.2 / sqrt(25) = 0.04, of ten rounds' 0.04 / sqrt(10); sqrt(10/9) t(9) = 2.385 of them.
    assert math.isclose((math.log(high) - math.log(low)) / 2, 2.385 * 0.04 / math.sqrt(10), rel_tol=0.2)


@pytest.mark.parametrize("rounds", [3, 5, 10])
def test_interval_covers_a_known_ratio_in_95_of_100_runs(rounds: int):
    """The other way round, a true ratio of 1 is called faster or slower in at most 5 or 6 of 100 runs."""
    generator = np.random.default_rng(rounds)
    covered = 0
    for _ in range(400):
        shared = generator.lognormal(4.6, 0.3, rounds)
        rates = tuple((1.2 * shared * generator.lognormal(0, 0.03, rounds)).tolist())
        base = tuple((shared * generator.lognormal(0, 0.02, rounds)).tolist())
        said = compare_speed(make_measurement(rates=rates), make_measurement(rates=base), "base", draws=1000)
        assert said.low is not None and said.high is not None
        covered += said.low <= 1.2 <= said.high
    assert 0.92 <= covered / 400 <= 0.995


def answering(correct: list[bool], predictions: list[int], images: str = "digest", **changes: Any) -> Measurement:
    packed = pack(Answers(images, np.array(correct), np.array(predictions)))
    return make_measurement(top1=100 * sum(correct) / len(correct), answers=packed, top1_images=f"{images} images", **changes)


UNTOUCHED = answering([True] * 90 + [False] * 10, [0] * 100)


def test_flips_are_counted_image_by_image():
    """Of 100: 6 broken, 2 repaired, 1 wrong either way but differently."""
    row = answering([False] * 6 + [True] * 84 + [True] * 2 + [False] * 8, [1] * 6 + [0] * 84 + [1] * 2 + [2] + [0] * 7)
    found = compare_answers(row, UNTOUCHED, "untouched")
    assert (found.broken, found.repaired, found.images, found.baseline) == (6, 2, 100, "untouched")
    assert found.agreement == 91.0
    assert found.change is not None and math.isclose(found.change, -4.0)
    assert found.low is not None and found.high is not None and found.low < -4.0 < found.high
    assert found.p is not None and math.isclose(found.p, binomtest(2, 8).pvalue)
    assert found.relation == "same"


def test_worse_and_better_are_named():
    worse = answering([False] * 30 + [True] * 60 + [False] * 10, [1] * 30 + [0] * 70)
    assert compare_answers(worse, UNTOUCHED, "u").relation == "worse"
    back = compare_answers(UNTOUCHED, worse, "w")
    assert back.relation == "better"
    assert back.change is not None and math.isclose(back.change, 30.0)
    assert compare_answers(UNTOUCHED, UNTOUCHED, "u").relation == "baseline"


def test_equal_answers_are_the_same_and_say_zero():
    found = compare_answers(replace(UNTOUCHED, artifact="other"), UNTOUCHED, "u")
    assert (found.relation, found.agreement, found.p) == ("same", 100.0, 1.0)
    assert found.change is not None and math.copysign(1.0, found.change) == 1.0


def test_other_images_and_missing_answers_are_reasons():
    assert "other images" in compare_answers(answering([True], [0], "elsewhere"), UNTOUCHED, "u").reason
    old = make_measurement(top1=90.0)
    assert "before answers were kept" in compare_answers(old, UNTOUCHED, "u").reason
    assert "u was measured before" in compare_answers(UNTOUCHED, old, "u").reason
    assert "not measured" in compare_answers(make_measurement(), UNTOUCHED, "u").reason


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (5, 0), (3, 9), (12, 12), (400, 350), (90, 210)])
def test_mcnemar_is_scipys_exact_binomial_test(only_a: int, only_b: int):
    expected = binomtest(min(only_a, only_b), only_a + only_b).pvalue if only_a + only_b else 1.0
    assert math.isclose(mcnemar_of(only_a, only_b), expected, rel_tol=1e-9)
    assert mcnemar_of(only_a, only_b) == mcnemar_of(only_b, only_a)


def test_mcnemar_of_many_images_is_quick_and_finite():
    assert 0.0 < mcnemar_of(24_000, 26_000) < 1e-15
