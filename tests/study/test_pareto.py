"""The Pareto set against its definition, point by point; and the one winner."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.study.points import make_point
from vitedge.device import Budgets, Device
from vitedge.errors import UsageError
from vitedge.study import pareto
from vitedge.study.definition import Constraints
from vitedge.study.pareto import choose_winner, front, non_dominated
from vitedge.study.point import Point, limits_of, misses_of, stands_for

NAMES = ("top1", "images_per_s", "mib")


def dominates(one: tuple[int, ...], other: tuple[int, ...], larger: tuple[bool, ...]) -> bool:
    """By the definition: nowhere worse, somewhere better."""
    signed = [(a, b) if up else (b, a) for a, b, up in zip(one, other, larger, strict=True)]
    return all(a >= b for a, b in signed) and any(a > b for a, b in signed)


@st.composite
def points(draw: st.DrawFn) -> tuple[tuple[bool, ...], list[tuple[int, ...]]]:
    larger = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=4)))
    row = st.tuples(*(st.integers(-3, 3) for _ in larger))  # few values, so that there are ties
    return larger, draw(st.lists(row, max_size=30))


@settings(deadline=None)
@given(points())
def test_exactly_those_are_kept_that_no_other_dominates(made: tuple[tuple[bool, ...], list[tuple[int, ...]]]) -> None:
    larger, rows = made
    expected = [not any(dominates(other, one, larger) for other in rows) for one in rows]
    assert non_dominated(np.array(rows, float).reshape(len(rows), len(larger)), larger).tolist() == expected


def test_many_points_are_compared_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 40, (300, 3)).astype(float)
    whole = non_dominated(values, (True, True, False))
    monkeypatch.setattr(pareto, "_CHUNK", 7)
    assert non_dominated(values, (True, True, False)).tolist() == whole.tolist()
    assert 0 < whole.sum() < 300


def test_the_front_is_of_all_points_the_largest_gain_first() -> None:
    small, fast, worse = make_point(1, speed=1.0, size=0.5), make_point(2, speed=1.5, size=1.0), make_point(3, speed=0.9, size=1.1)
    right = make_point(4, speed=0.5, size=2.0, top1=95.0)
    assert front([worse, right, fast, small], NAMES) == [small, fast, right]
    assert front([worse, right], ("mib",)) == [worse]
    assert front([], NAMES) == []


def test_the_winner_is_the_largest_gain_inside_the_limits_whatever_the_order() -> None:
    outside = make_point(1, speed=9.0, misses={"max_top1_drop": 0.3})
    inside = make_point(2, speed=1.5, size=0.5, misses={"max_top1_drop": -0.1})
    equal_but_later = replace(inside, trial=3)
    better_top1 = replace(inside, trial=4, top1=91.0)
    made = [outside, inside, equal_but_later]
    for seed in range(5):
        random.Random(seed).shuffle(made)
        assert choose_winner(made) == inside
    assert choose_winner([*made, better_top1]) == better_top1
    assert choose_winner([*made, replace(inside, trial=None)]) == replace(inside, trial=None)
    assert choose_winner([outside]) is None


def test_a_winner_that_did_not_settle_is_one_only_where_no_other_is_inside() -> None:
    noisy, settled = make_point(1, speed=9.0, unstable="rounds differ by 40 %"), make_point(2, speed=1.1)
    assert choose_winner([noisy, settled]) == settled and choose_winner([noisy]) == noisy


def test_a_trial_stands_for_its_fastest_file_inside_else_for_the_one_that_misses_least() -> None:
    fast = make_point(1, speed=3.0, misses={"max_top1_drop": 0.2, "max_size_ratio": 0.1})
    slow = make_point(1, speed=1.2, misses={"max_top1_drop": -0.2, "max_size_ratio": 0.25})
    inside = make_point(1, speed=1.1, misses={"max_top1_drop": 0.0, "max_size_ratio": -0.5})
    faster_inside = replace(inside, speed_ratio=1.3)
    assert stands_for([fast, slow]) == slow
    assert stands_for([fast, slow, inside, faster_inside]) == faster_inside
    assert inside.inside and not slow.inside


def test_what_is_missed_is_above_zero_and_what_is_kept_is_not() -> None:
    figures = {"top1_drop": 2.0, "top1": 88.0, "speed_ratio": 1.25, "images_per_s": 100.0, "size_ratio": 0.5, "size_mib": 3.0}
    figures |= {"p50_ms": 10.0, "peak_rss_mib": 100.0}
    limits = {"max_top1_drop": 1.0, "min_top1": 88.0, "min_speed_ratio": 1.5, "min_images_per_s": 80.0, "max_size_ratio": 0.4}
    limits |= {"max_size_mib": 4.0, "max_latency_ms": 8.0, "max_peak_rss_mib": 100.0}
    assert set(limits) == set(Constraints.model_fields)
    found = misses_of(limits, figures)
    expected = {"max_top1_drop": 0.1, "min_top1": 0.0, "min_speed_ratio": 0.2, "min_images_per_s": -0.2, "max_size_ratio": 0.25}
    assert found == pytest.approx({**expected, "max_size_mib": -0.25, "max_latency_ms": 0.25, "max_peak_rss_mib": 0.0})


def device(**budgets: float) -> Device:
    use = {"runtime": "onnxruntime", "provider": "CPUExecutionProvider"}
    source = dict.fromkeys(("runtimes", "budgets"), "made for a test")
    return Device.model_validate({"name": "board", "runtimes": [use], "budgets": Budgets(**budgets), "source": source})


def test_the_tighter_of_the_searchs_limit_and_the_devices_budget_counts() -> None:
    asked = Constraints(max_size_mib=5.0, max_top1_drop=1.0)
    assert limits_of(asked, device(size_mib=4.0, peak_rss_mib=200.0), 8) == {
        "max_size_mib": 4.0,
        "max_top1_drop": 1.0,
        "max_peak_rss_mib": 200.0,
    }
    assert limits_of(asked, device(size_mib=6.0), 1) == {"max_size_mib": 5.0, "max_top1_drop": 1.0}
    with pytest.raises(UsageError, match="batch_size"):
        limits_of(asked, device(latency_ms=20.0), 8)


def test_a_point_survives_json() -> None:
    import json

    point = make_point(None, misses={"max_size_mib": -0.5}, speed_low=None, speed_high=None)
    plain = json.loads(json.dumps(point.to_plain()))
    assert Point.from_plain({**plain, "later": "field"}) == point
    assert point.label == "model.int8_dynamic.onnx in onnxruntime int8"
    assert replace(point, float_precision="bf16").label.endswith("int8+bf16")
