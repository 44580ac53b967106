"""Properties of the stratified split."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitedge.data.splits import split_off, split_off_by_name

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


NAMES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 500)), min_size=1, max_size=120, unique=True)


def by_name(images: list[tuple[int, int]], share: float = 0.2) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Images, a class and a number each, that are kept and that are split off."""
    kept, cut = split_off_by_name([f"{kind}/{n}.png" for kind, n in images], np.array([kind for kind, _ in images]), share, 0)
    return {images[p] for p in kept}, {images[p] for p in cut}


@given(NAMES, SHARES)
def test_by_name_parts_are_disjoint_and_cover_all_and_every_class_keeps_one(images: list[tuple[int, int]], share: float) -> None:
    kept, cut = by_name(images, share)
    assert not kept & cut and kept | cut == set(images)
    for label in {kind for kind, _ in images}:
        size, taken = (sum(kind == label for kind, _ in some) for some in (images, cut))
        assert taken < size and (taken >= 1 or size == 1)


@given(NAMES, NAMES)
def test_by_name_images_added_later_move_no_other(images: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
    # Images of both sides in every class, so that none has to take one or to give one back.
    anchors = [(kind, 1000 + n) for kind in range(5) for n in range(60)]
    before, after = by_name([*anchors, *images]), by_name(list({*anchors, *images, *more}))
    assert before[0] <= after[0] and before[1] <= after[1]


def test_by_name_the_share_is_about_what_was_asked() -> None:
    kept, cut = by_name([(kind, n) for kind in range(5) for n in range(1000)])
    assert abs(len(cut) / (len(kept) + len(cut)) - 0.2) < 0.02


def test_by_name_split_is_the_one_it_always_was() -> None:
    # Another result here would put images that models were trained on into their test split.
    _, cut = split_off_by_name([f"cat/{n}.jpg" for n in range(20)], np.zeros(20, dtype=np.int64), 0.2, 0)
    assert cut.tolist() == [1, 5]
