"""Quantiles only where the sample supports them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitedge.bench.records import Latency, quantile_ms


@pytest.mark.parametrize(("percent", "enough"), [(50, 6), (90, 30), (99, 300)])
def test_a_quantile_needs_three_samples_expected_beyond_it(percent, enough):
    assert quantile_ms([1.0] * (enough - 1), percent) is None
    assert quantile_ms([1.0] * enough, percent) == 1.0


@given(st.integers(300, 2000), st.integers(0, 2**32 - 1))
def test_quantiles_are_numpys(count, seed):
    samples = np.random.default_rng(seed).gamma(2.0, 3.0, count).tolist()
    latency = Latency.of(samples)
    assert np.allclose([latency.p50, latency.p90, latency.p99], np.quantile(samples, [0.5, 0.9, 0.99]))
    assert np.isclose(latency.mean, np.mean(samples))


def test_few_samples_have_a_mean_and_nothing_else():
    assert Latency.of([1.0, 3.0]) == Latency(2.0, None, None, None)
