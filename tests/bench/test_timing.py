"""The timing loop on a clock of its own: durations are chosen, so every count is known."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import chain, cycle, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitedge.bench.timing import time_iterations, warm_up

MS = 1_000_000


class Fake:
    """A model whose inferences take given times on a clock that only they move."""

    def __init__(self, durations_ns: Iterator[int]) -> None:
        self.now, self.durations_ns, self.calls = 0, durations_ns, 0

    def clock(self) -> int:
        return self.now

    def step(self) -> None:
        self.calls += 1
        self.now += next(self.durations_ns)


def test_warm_up_ends_once_three_windows_agree():
    fake = Fake(repeat(10 * MS))
    warm = warm_up(fake.step, 2.0, fake.clock)
    assert warm.settled
    assert warm.iterations == fake.calls == 24  # three windows of 80 ms


def test_warm_up_waits_until_a_falling_time_has_settled():
    fake = Fake(chain((100 * MS, 90 * MS, 60 * MS, 50 * MS, 40 * MS, 30 * MS), repeat(20 * MS)))
    warm = warm_up(fake.step, 10.0, fake.clock)
    assert warm.settled
    assert warm.iterations >= 6 + 12  # the slow ones, and three whole windows of 20 ms


def test_warm_up_that_never_settles_says_so_and_stops_in_time():
    fake = Fake(chain.from_iterable([100 * MS + i * 40 * MS] * 2 for i in range(1000)))
    warm = warm_up(fake.step, 2.0, fake.clock)
    assert not warm.settled
    assert 2.0e9 <= fake.now <= 3.0e9


def test_warm_up_gives_a_slow_model_its_three_windows():
    fake = Fake(repeat(1500 * MS))
    assert warm_up(fake.step, 2.0, fake.clock).settled
    assert fake.calls == 6


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """What other tests have left is not looked through at every collection."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_garbage")
@given(st.integers(1, 50), st.floats(0.001, 2.0), st.integers(1, 300))
def test_loop_reaches_both_bounds_and_not_one_inference_more(iterations, seconds, each_ms):
    fake = Fake(repeat(each_ms * MS))
    timed = time_iterations(fake.step, iterations, seconds, fake.clock)
    count = len(timed.samples_ns)
    span = round(seconds * 1e9)
    assert count >= iterations
    assert timed.elapsed_ns >= span
    assert count - 1 < iterations or (count - 1) * each_ms * MS < span
    assert timed.elapsed_ns == count * each_ms * MS == sum(timed.samples_ns)


def test_samples_are_each_inference_and_the_first_after_collecting_is_not_one():
    fake = Fake(cycle((7 * MS, 1 * MS, 2 * MS)))
    assert time_iterations(fake.step, 3, 0.001, fake.clock).samples_ns == [1 * MS, 2 * MS, 7 * MS]


def test_garbage_collector_is_off_while_timing_and_on_again_after_a_failure():
    seen: list[bool] = []

    def step() -> None:
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        time_iterations(step, 5, 0.001)
    assert seen == [False] * 3
    assert gc.isenabled()
