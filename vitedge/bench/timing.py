"""The timing loop of one measurement: warm up until stable, then count.

Both ends of the loop are bounds to be reached, at least so many iterations and at least so many
seconds, so that a slow model is not judged by two samples, nor a fast one by a millisecond.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

WINDOWS = 3  # windows of the warm-up whose medians must agree
WINDOW_ITERATIONS = 2  # fewest iterations of a window
WINDOW_NS = 80_000_000  # shortest window: several scheduler slices, so that one preemption does not decide
TOLERANCE = 0.05  # largest spread of the windows' medians, as a share of the smallest

Clock = Callable[[], int]


@dataclass(frozen=True)
class TimingSettings:
    """How long one round of one measurement takes.

    Attributes:
        iterations: Fewest timed inferences.
        seconds: Shortest timed span, s.
        warmup_seconds: The warm-up gives up settling after this long, s.
    """

    iterations: int = 10
    seconds: float = 0.5
    warmup_seconds: float = 2.0


@dataclass(frozen=True)
class WarmUp:
    """How the warm-up went: inferences run, and whether their time settled."""

    iterations: int
    settled: bool


@dataclass(frozen=True)
class Timed:
    """Raw result of the timed span.

    Attributes:
        samples_ns: Duration of each inference, ns.
        elapsed_ns: The whole span, the loop's own cost included, ns.
    """

    samples_ns: list[int]
    elapsed_ns: int


def warm_up(step: Callable[[], object], limit_seconds: float, clock: Clock = time.perf_counter_ns) -> WarmUp:
    """Run inferences until the medians of the last three windows agree within 5 %.

    A window is at least 80 ms and two inferences. Bounded by `limit_seconds`, but three windows are
    always tried, so that a slow model has its chance to settle.
    """
    medians: list[float] = []
    iterations = 0
    began = clock()
    while True:
        samples: list[int] = []
        opened = clock()
        while len(samples) < WINDOW_ITERATIONS or clock() - opened < WINDOW_NS:
            start = clock()
            step()
            samples.append(clock() - start)
        iterations += len(samples)
        medians.append(median(samples))
        last = medians[-WINDOWS:]
        if len(last) == WINDOWS:
            if max(last) - min(last) <= TOLERANCE * min(last):
                return WarmUp(iterations, True)
            if clock() - began >= limit_seconds * 1e9:
                return WarmUp(iterations, False)


def time_iterations(step: Callable[[], object], iterations: int, seconds: float, clock: Clock = time.perf_counter_ns) -> Timed:
    """Time at least `iterations` inferences and at least `seconds`, each on its own.

    The garbage collector is off meanwhile: its pauses belong to Python, not to the model. Its last
    run cools the caches, so one inference after it is not timed.
    """
    samples: list[int] = []
    span = round(seconds * 1e9)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        step()
        began = clock()
        while True:
            start = clock()
            step()
            end = clock()
            samples.append(end - start)
            if len(samples) >= iterations and end - began >= span:
                return Timed(samples, end - began)
    finally:
        if was_enabled:
            gc.enable()
