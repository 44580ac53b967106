"""Properties of the stratified split."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitedge.data.splits import split_off

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(lambda values: np.array(values, dtype=np.int64))
SHARES = st.floats(0.01, 0.89)


@given(LABELS, SHARES, st.integers(0, 2**32 - 1))
def test_parts_are_disjoint_and_cover_all(labels: np.ndarray, share: float, seed: int) -> None:
    kept, cut = split_off(labels, share, seed)
    assert np.array_equal(np.sort(np.concatenate([kept, cut])), np.arange(len(labels)))


@given(LABELS, SHARES, st.integers(0, 1000))
def test_every_class_gives_its_share_and_keeps_one(labels: np.ndarray, share: float, seed: int) -> None:
    kept, cut = split_off(labels, share, seed)
    for label in np.unique(labels):
        size, taken = int((labels == label).sum()), int((labels[cut] == label).sum())
        assert int((labels[kept] == label).sum()) >= 1
        assert taken == 0 if size == 1 else taken >= 1
        assert abs(taken - share * size) <= 1


@given(LABELS, SHARES, st.integers(0, 1000))
def test_same_seed_same_split(labels: np.ndarray, share: float, seed: int) -> None:
    for first, second in zip(split_off(labels, share, seed), split_off(labels.copy(), share, seed), strict=True):
        assert np.array_equal(first, second)


def test_split_is_the_one_it_always_was() -> None:
    # NumPy promises RandomState's stream; another result here would put train images into validation
    # of every model trained so far.
    _, cut = split_off(np.repeat(np.arange(3), 8), 0.25, seed=0)
    assert cut.tolist() == [2, 6, 9, 14, 18, 21]


def test_another_seed_is_another_split() -> None:
    labels = np.repeat(np.arange(3), 40)
    assert not np.array_equal(split_off(labels, 0.25, 0)[1], split_off(labels, 0.25, 1)[1])
