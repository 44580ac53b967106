"""The order of tries: whatever layers are needed, they are found, in few tries."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from vitedge.guard.search import proposals


def answer(ranked: list[str], needed: set[str] | None) -> list[tuple[tuple[str, ...], bool]]:
    """Every try with its answer, where a try meets the limit if it holds all that is needed; None: nothing does."""
    tries: list[tuple[tuple[str, ...], bool]] = []
    moves = proposals(ranked)
    try:
        floats = next(moves)
        while True:
            met = needed is not None and needed <= set(floats)
            tries.append((floats, met))
            floats = moves.send(met)
    except StopIteration:
        return tries


@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_the_fewest_layers_are_found(case: tuple[int, set[int]]) -> None:
    count, positions = case
    ranked = [f"layer{i}" for i in range(count)]
    needed = {ranked[i] for i in positions}
    tries = answer(ranked, needed)
    best = min((floats for floats, met in tries if met), key=len)
    assert set(best) == needed
    assert len(best) == len(set(best)) and all(floats for floats, _ in tries)
    reach = max(positions) + 1
    # Doubling, bisection, and one try for each layer that may be given back.
    assert len(tries) <= 2 * (math.ceil(math.log2(reach)) + 1) + reach - 1
    assert len({floats for floats, _ in tries}) == len(tries)  # no file is made twice


@given(st.integers(0, 80))
def test_without_any_answer_the_last_try_is_everything(count: int) -> None:
    ranked = [f"layer{i}" for i in range(count)]
    tries = [floats for floats, _ in answer(ranked, None)]
    sizes = [len(floats) for floats in tries]
    assert sizes == sorted(set(sizes)) and (not count or tries[-1] == tuple(ranked))
    assert len(tries) <= (math.ceil(math.log2(count)) + 1 if count else 0)


def test_the_most_sensitive_layer_alone_is_tried_first() -> None:
    assert answer(["worst", "second", "third"], {"worst"}) == [(("worst",), True)]
    assert answer(["a", "b", "c", "d"], {"b", "c"}) == [
        (("a",), False),
        (("a", "b"), False),
        (("a", "b", "c", "d"), True),
        (("a", "b", "c"), True),
        (("a", "c"), False),  # b is needed
        (("b", "c"), True),  # a is not
    ]
