"""Which widths a cut leaves: rounding, thresholds, shares, redistribution, and the least cut that keeps a limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compress import made
from tests.compress.pruning import vit
from vitedge.compress._prune_cut import Widths, trial
from vitedge.compress._prune_notes import histograms
from vitedge.compress._prune_scores import Scores
from vitedge.compress._prune_select import Rule, allowed_width, deal, keep, select
from vitedge.compress._prune_units import find_places, width
from vitedge.errors import UsageError
from vitedge.models.cost import count


def mlp(*scores: list[float]) -> Scores:
    return {(f"blocks.{i}", "mlp"): torch.tensor(each, dtype=torch.float64) for i, each in enumerate(scores)}


def units(widths: Widths) -> float:
    return sum(widths.values())


def left(widths: Widths) -> list[int]:
    return list(widths.values())


@given(exact=st.floats(0, 100), full=st.integers(1, 100), step=st.sampled_from([1, 2, 3, 4, 8, 200]), minimum=st.integers(1, 120))
@settings(max_examples=300, deadline=None)
def test_a_width_is_the_nearest_that_is_allowed(exact: float, full: int, step: int, minimum: int) -> None:
    found = allowed_width(exact, full, step, minimum)
    allowed = [w for w in range(1, full + 1) if (w % step == 0 or w == full) and w >= minimum] or [full]
    assert found in allowed and abs(found - exact) == min(abs(w - exact) for w in allowed)


def test_of_two_widths_as_near_the_wider_is_taken() -> None:
    assert allowed_width(12, 64, 8, 1) == 16 and allowed_width(9, 10, 8, 1) == 10 and allowed_width(8.9, 10, 8, 1) == 8


def test_a_global_cut_takes_the_lowest_scores_of_all_layers() -> None:
    scores = mlp([1, 2, 3, 4], [10, 0.5, 20, 30], [40, 50, 60, 70])
    rule = Rule(multiple=1)
    found = select(scores, units, 8, rule)
    assert left(found.widths) == [1, 3, 4] and found.cost == 8 and found.threshold == 3
    assert {place: index.tolist() for place, index in keep(scores, found.widths).items()} == {
        ("blocks.0", "mlp"): [3],
        ("blocks.1", "mlp"): [0, 2, 3],
    }


def test_scores_of_a_layer_can_be_counted_in_its_mean() -> None:
    scores = mlp([1, 2, 3, 4], [100, 5, 200, 300])
    assert left(select(scores, units, 6, Rule(multiple=1)).widths) == [2, 4]
    found = select(scores, units, 6, Rule(multiple=1, normalize=True))
    assert left(found.widths) == [3, 3] and found.threshold is None
    # A layer that is all zeros has no mean to divide by.
    assert left(select(mlp([0, 0, 0, 0], [1, 2, 3, 4]), units, 5, Rule(multiple=1, normalize=True)).widths) == [1, 4]


def test_the_same_share_of_every_layer() -> None:
    generator = np.random.default_rng(0)
    scores = mlp(*(generator.random(64 * 2**i).tolist() for i in range(3)))
    found = select(scores, units, 448 * 0.75, Rule(scope="layer"))
    assert left(found.widths) == [48, 96, 192] and found.threshold is None


def test_dimensions_of_heads_count_over_all_of_them() -> None:
    """Three heads: 8 dimensions of each are the least that make a multiple of 8; four: 2."""
    for heads, step in ((3, 8), (4, 2), (8, 1), (6, 4)):
        scores = {("b", "value_dims"): torch.rand(heads, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
        found = select(scores, lambda widths: widths["b", "value_dims"], 15, Rule())
        assert found.widths == {("b", "value_dims"): 16 - step} and heads * (16 - step) % 8 == 0
        kept = keep(scores, found.widths)["b", "value_dims"]
        assert kept.shape == (heads, 16 - step)
        for head in range(heads):
            expected = sorted(np.argsort(scores["b", "value_dims"][head].numpy())[step:].tolist())
            assert kept[head].tolist() == expected


def test_a_step_of_the_dimensions_goes_by_the_heads_that_are_left() -> None:
    scores = {("b", "value_dims"): torch.ones(3, 16, dtype=torch.float64), ("b", "heads"): torch.tensor([0.1, 5, 5])}
    scores["b", "value_dims"][:, :4] = 0.01
    found = select(scores, lambda widths: widths["b", "heads"] * widths["b", "value_dims"], 24, Rule())
    # 12 of 16 dimensions of 2 of 3 heads; of 3 heads it would have to be 8 or 16.
    assert found.widths == {("b", "value_dims"): 12, ("b", "heads"): 2} and list(found.widths) == list(scores)


def test_a_minimum_is_kept() -> None:
    scores = mlp([0.1] * 16, [5.0] * 16)
    assert left(select(scores, units, 20, Rule(multiple=4)).widths) == [4, 16]
    assert left(select(scores, units, 20, Rule(multiple=4, minimum=6)).widths) == [8, 12]


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    nothing=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_dealing_out_keeps_the_total_and_the_proportions(sizes: list[int], share: float, seed: int, nothing: bool) -> None:
    sizes_P = np.array(sizes, dtype=np.float64)
    importance_P = np.random.default_rng(seed).random(len(sizes)) * (0 if nothing else 1)
    total = share * sizes_P.sum()
    dealt_P = deal(total, sizes_P, importance_P)
    assert dealt_P.sum() == pytest.approx(total) and (dealt_P <= sizes_P + 1e-9).all() and (dealt_P >= -1e-9).all()
    weights_P = sizes_P if nothing else importance_P
    rates_P = dealt_P / weights_P
    inside = dealt_P < sizes_P - 1e-9
    if inside.any():  # one rate for all that are not full, and none that is full would get less by it
        assert np.ptp(rates_P[inside]) <= 1e-9 * max(1.0, rates_P[inside].max())
        assert (rates_P[inside].max() * weights_P[~inside] >= sizes_P[~inside] - 1e-6).all()


def test_redistribution_gives_widths_by_importance_at_the_same_total() -> None:
    scores = mlp([1.0] * 32, [4.0] * 32, [9.0] * 32)  # roots 1, 2 and 3
    found = select(scores, units, 48, Rule(multiple=1, redistribute=True))
    assert left(found.widths) == [8, 16, 24] and found.cost == 48
    found = select(scores, units, 72, Rule(multiple=1, redistribute=True))
    assert left(found.widths) == [13, 27, 32]  # the last one is full: 40 among the rest, 1 to 2
    assert left(select(scores, units, 48, Rule(multiple=1)).widths) == [1, 15, 32]


def test_it_is_the_least_cut_for_any_cost() -> None:
    """A latency in steps of 32 units, as hardware has them: the next smaller cut is above the limit."""
    scores = mlp(*(np.random.default_rng(i).random(128).tolist() for i in range(3)))
    asked: list[Widths] = []

    def latency_ms(widths: Widths) -> float:
        asked.append(widths)
        return sum(math.ceil(width / 32) for width in widths.values()) * 0.5

    found = select(scores, latency_ms, 4.5, Rule(multiple=1))
    assert found.cost == 4.5 and len(asked) <= 12 and sum(left(found.widths)) > 250
    with pytest.raises(UsageError, match=r"prune\.target: expected at most 1, found 1\.5 at the least widths"):
        select(scores, latency_ms, 1.0, Rule(multiple=1), "prune.target")


@given(seed=st.integers(0, 99), share=st.floats(0.2, 0.8), multiple=st.sampled_from([1, 8]))
@settings(max_examples=50, deadline=None)
def test_a_cost_that_trembles_is_asked_seven_times_at_most_and_kept(seed: int, share: float, multiple: int) -> None:
    scores = mlp(*(np.random.default_rng(i).random(128).tolist() for i in range(3)))
    asked: list[float] = []

    def latency_ms(widths: Widths) -> float:
        asked.append(units(widths) * float(np.random.default_rng((seed, *left(widths))).uniform(0.9, 1.1)))
        return asked[-1]

    found = select(scores, latency_ms, share * 384, Rule(multiple=multiple), resolution=1 / 32)
    assert found.cost in asked and found.cost <= share * 384 and len(asked) <= 7
    # What is left is as much as the limit, but for the trembling, 1/32 of the units, and rounding in three places.
    assert units(found.widths) >= share * 384 / 1.1 - 384 / 32 - 3 * multiple


def test_a_trial_has_the_widths_and_leaves_the_model_alone() -> None:
    model = vit()
    places = find_places(model, ["heads", "key_dims", "mlp", "qkv_input"])
    before = count(model, (3, 8, 8))
    widths = dict(zip(places, [1, 3, 20, 9, 2, 8, 64, 16], strict=True))
    small = trial(model, widths)
    assert [width(small, place) for place in places] == list(widths.values())
    assert count(model, (3, 8, 8)) == before != count(small, (3, 8, 8))
    assert small(made.batch().x_BCHW.double()).shape == (6, 4)


def test_the_histogram_counts_weights() -> None:
    scores = {
        ("a", "mlp"): torch.tensor([0.0, 1.0, 10.0, 100.0], dtype=torch.float64),
        ("b", "mlp"): torch.tensor([1.0, 100.0], dtype=torch.float64),
        ("a", "value_dims"): torch.full((2, 3), 2.0, dtype=torch.float64),
    }
    weights = {place: torch.full_like(score, 33.0) for place, score in scores.items()}
    kept = {("a", "mlp"): torch.tensor([2, 3]), ("a", "value_dims"): torch.tensor([[0, 2], [1, 2]])}
    found = histograms(scores, kept, weights)
    assert list(found) == ["mlp", "value_dims"]
    hidden = found["mlp"]
    assert hidden["edges"][0] == 0 and hidden["edges"][-1] == 2 and len(hidden["counts"]) == len(hidden["edges"]) - 1
    assert [count for count in hidden["counts"] if count] == [66, 33, 66] and [count for count in hidden["kept"] if count] == [33, 33, 66]
    assert (hidden["zeros"], hidden["zeros_kept"]) == (33, 0)
    dims = found["value_dims"]
    assert sum(dims["counts"]) == 6 * 33 and sum(dims["kept"]) == 4 * 33
    assert dims["edges"][0] < math.log10(2) < dims["edges"][-1]
    # What is kept of a head that goes is gone with it.
    headed = {**scores, ("a", "heads"): torch.tensor([1.0, 3.0], dtype=torch.float64)}
    found = histograms(headed, {**kept, ("a", "heads"): torch.tensor([1])}, {**weights, ("a", "heads"): torch.full((2,), 99.0)})
    assert sum(found["value_dims"]["kept"]) == 2 * 33 and sum(found["heads"]["kept"]) == 99


def test_equal_scores_go_evenly() -> None:
    scores = mlp([1.0] * 64, [1.0] * 32)
    assert left(select(scores, units, 72, Rule(multiple=1)).widths) == [48, 24]
