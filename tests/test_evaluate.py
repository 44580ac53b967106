"""Quality, intervals and parity against closed forms, exact enumeration and an independent float64 reference."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests import tiny
from vitedge.errors import InputError
from vitedge.evaluate import check_contract, evaluate, mcnemar, paired_interval, parity, top1_agreement, wilson_interval
from vitedge.preprocess import Preprocessing

CONTRACT = Preprocessing(size=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
bools = st.lists(st.booleans(), min_size=1, max_size=60)


class Table:
    """A model that answers the logits row whose number is the image's grey level, so every answer is known."""

    def __init__(self, logits_NC: np.ndarray, batch: int | None = None) -> None:
        self.logits_NC, self.input_shape = logits_NC, (batch, 3, 4, 4)
        self.batches: list[int] = []

    def __call__(self, x_BCHW: np.ndarray, /) -> np.ndarray:
        assert x_BCHW.dtype == np.float32
        self.batches.append(len(x_BCHW))
        level = np.round((x_BCHW[:, 0, 0, 0] * 0.5 + 0.5) * 255).astype(int)
        return self.logits_NC[level]


def greys(count: int) -> list[np.ndarray]:
    return [np.full((4, 4, 3), level, np.uint8) for level in range(count)]


def one_hot(classes: list[int], count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_top1_and_top5_count_what_is_right():
    logits = np.tile(np.arange(6, 0, -1, dtype=np.float32), (4, 1))  # class 0 first, class 5 last
    quality = evaluate(Table(logits), greys(4), np.array([0, 0, 4, 5]), CONTRACT)
    assert quality.top1 == 50.0
    assert quality.top5 == 75.0
    assert quality.correct.tolist() == [True, True, False, False]
    assert quality.predictions.tolist() == [0, 0, 0, 0]
    assert quality.images == 4


def test_top5_needs_five_classes():
    assert evaluate(Table(one_hot([0], 4)), greys(1), np.array([0]), CONTRACT).top5 is None


@given(st.integers(1, 7), st.integers(1, 20), st.booleans())
def test_batching_changes_nothing(batch, count, is_fixed):
    truth = np.arange(count) % 3
    model = Table(one_hot([(i * 2) % 3 for i in range(count)], 3), batch if is_fixed else None)
    quality = evaluate(model, greys(count), truth, CONTRACT, batch_size=batch)
    assert quality.predictions.tolist() == [(i * 2) % 3 for i in range(count)]
    assert math.isclose(quality.top1, 100 * np.mean(quality.predictions == truth))
    if is_fixed:
        assert set(model.batches) == {batch}


def test_agrees_with_an_independent_model_on_real_preprocessing():
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (12, 9, 3), dtype=np.uint8) for _ in range(10)]
    mean, std = np.array(tiny.CONTRACT.mean), np.array(tiny.CONTRACT.std)
    resized = [np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC)) for image in images]
    x_BCHW = ((np.stack(resized) / 255.0 - mean) / std).transpose(0, 3, 1, 2)

    class Reference:
        input_shape = (None, 3, 8, 8)

        def __call__(self, x_BCHW: np.ndarray, /) -> np.ndarray:
            return tiny.logits(x_BCHW)

    want = tiny.logits(x_BCHW).argmax(1)
    quality = evaluate(Reference(), images, want, tiny.CONTRACT, batch_size=3)
    assert quality.top1 == 100.0
    assert quality.predictions.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("model", "labels", "words"),
    [
        (Table(one_hot([0, 1], 2)), [0, 2], "label 2"),
        (Table(one_hot([0, 1], 2)), [0, -1], "labels"),
        (Table(one_hot([0, 1], 2)), [0], "2 images, 1 labels"),
        (Table(np.full((2, 2), np.nan, np.float32)), [0, 1], "NaN"),
        (Table(np.zeros((2, 3, 4), np.float32)), [0, 1], "shape [2, 3, 4]"),
    ],
)
def test_refuses_what_cannot_be_judged(model, labels, words):
    with pytest.raises(InputError) as caught:
        evaluate(model, greys(2), np.array(labels), CONTRACT)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_a_model_of_another_size():
    model = Table(one_hot([0], 2))
    model.input_shape = (None, 3, 8, 8)
    with pytest.raises(InputError, match="preprocessing contract"):
        evaluate(model, greys(1), np.array([0]), CONTRACT)


def test_no_images_is_an_error():
    with pytest.raises(InputError, match="0 images"):
        evaluate(Table(one_hot([0], 2)), [], np.array([], int), CONTRACT)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_their_equation(case):
    """Each bound p is where |hits/n - p| = 1.96 sqrt(p (1 - p) / n)."""
    hits, trials = case
    low, high = (bound / 100 for bound in wilson_interval(hits, trials))
    share = hits / trials
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        assert math.isclose((share - bound) ** 2, 1.959963984540054**2 * bound * (1 - bound) / trials, rel_tol=1e-6, abs_tol=1e-9)


def test_wilson_covers_the_truth_as_often_as_it_says():
    """Exact coverage over all outcomes of 200 trials at several true shares."""
    n = 200
    for truth in (0.3, 0.6, 0.9):
        covered = sum(
            math.comb(n, k) * truth**k * (1 - truth) ** (n - k)
            for k in range(n + 1)
            if wilson_interval(k, n)[0] <= 100 * truth <= wilson_interval(k, n)[1]
        )
        assert 0.93 < covered < 0.97


def test_paired_interval_of_a_worked_case():
    """10 only a, 4 only b, of 1000: difference 0.6 points; p = 11/1002 and 5/1002."""
    a, b = np.zeros(1000, bool), np.zeros(1000, bool)
    a[:900], b[:900] = True, True
    b[:10], a[900:904], b[900:904] = False, False, True
    a[900:904] = False
    difference, low, high = paired_interval(a, b)
    p, q = 11 / 1002, 5 / 1002
    half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / 1002)
    assert math.isclose(difference, 0.6)
    assert math.isclose(low, 100 * (p - q - half), rel_tol=1e-12)
    assert math.isclose(high, 100 * (p - q + half), rel_tol=1e-12)


@given(bools, st.randoms(use_true_random=False))
def test_paired_interval_holds_the_difference_and_turns_with_the_order(values, random):
    a = np.array(values)
    b = np.array([random.random() < 0.5 for _ in values])
    difference, low, high = paired_interval(a, b)
    assert math.isclose(difference, 100 * (a.mean() - b.mean()), abs_tol=1e-9)
    assert -100 <= low <= difference <= high <= 100
    assert low < high
    turned = paired_interval(b, a)
    assert np.allclose(turned, (-difference, -high, -low))


def test_paired_interval_covers_a_known_difference():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        cell = generator.choice(4, 500, p=[0.85, 0.06, 0.03, 0.06])  # both, only a, only b, none
        a, b = (cell == 0) | (cell == 1), (cell == 0) | (cell == 2)
        _, low, high = paired_interval(a, b)
        covered += low <= 3.0 <= high
    assert 0.92 <= covered / 400 <= 0.98


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_mcnemar_is_the_exact_sign_test(only_a_list):
    """All 2^n ways the discordant images can fall, counted one by one."""
    only_a = np.array(only_a_list)
    n, fewer = len(only_a), min(only_a.sum(), (~only_a).sum())
    as_extreme = sum(min(sum(way), n - sum(way)) <= fewer for way in product((0, 1), repeat=n))
    assert math.isclose(mcnemar(only_a, ~only_a), as_extreme / 2**n)


def test_mcnemar_of_equal_results_is_one_and_of_large_ones_finite():
    same = np.array([True, False, True])
    assert mcnemar(same, same) == 1.0
    a = np.ones(10_000, bool)
    assert 0.0 <= mcnemar(a, ~a) < 1e-300


def test_parity_in_float64():
    reference = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    other = reference + np.array([[0.5, 0.0], [0.0, 1.5]], np.float32)
    result = parity(reference, other)
    assert result.max_abs_err == 1.5
    assert math.isclose(result.sqnr_db, 10 * math.log10(26 / 2.5))
    assert result.top1_agreement == 50.0


def test_parity_of_the_same_is_perfect_and_nan_is_refused():
    logits = np.array([[1.0, 2.0]], np.float32)
    assert parity(logits, logits) == parity(logits, logits.copy())
    assert parity(logits, logits).sqnr_db == math.inf
    with pytest.raises(InputError, match="finite"):
        parity(logits, np.array([[np.nan, 2.0]], np.float32))
    with pytest.raises(ValueError, match="shapes"):
        parity(logits, np.zeros((1, 3), np.float32))


def test_top1_agreement_counts_equal_predictions():
    assert top1_agreement(np.array([1, 2, 3, 4]), np.array([1, 0, 3, 4])) == 75.0
    with pytest.raises(ValueError, match="shapes"):
        top1_agreement(np.array([1]), np.array([1, 2]))


def test_check_contract_names_every_differing_field():
    other = Preprocessing(size=8, interpolation="bilinear", mean=CONTRACT.mean, std=CONTRACT.std)
    check_contract(CONTRACT, CONTRACT, "model.onnx")
    with pytest.raises(InputError) as caught:
        check_contract(other, CONTRACT, "model.onnx")
    text = str(caught.value)
    assert text.startswith("model.onnx:")
    assert "size: 8, 4" in text
    assert "interpolation: bilinear, bicubic" in text
    assert "mean" not in text
    with pytest.raises(InputError, match="none in the file"):
        check_contract(None, CONTRACT, "model.onnx")
