"""How a range is chosen: each method against an independent reference, memory, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitedge import calibration
from vitedge.calibration import observer
from vitedge.calibration._histogram import Binned
from vitedge.calibration.entropy import _divergence, _least_divergence
from vitedge.errors import InputError, UsageError
from vitedge.numerics import Grid, fake_quantize, parameters, spread

INT8, UINT8 = Grid(8, narrow=True), Grid(8, signed=False)
METHODS = calibration.METHODS
BINNED = ("percentile", "entropy", "mse")


def _observed(
    method: str, batches: list[torch.Tensor], grid: Grid, symmetric: bool, axis: int | None = None, **options: float
) -> calibration.Observer:
    seen = observer(method, grid, symmetric, axis, **options)
    for batch in batches:
        seen.observe(batch)
    return seen


def _heavy_tailed(seed: int, count: int = 20_000) -> torch.Tensor:
    """Mostly of size 1, with some outliers of up to 30, as an MLP's activations are; different on the two sides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    x[:20] *= 8
    return torch.where(x < 0, x * 0.4, x)


def _squared_error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: Grid, symmetric: bool) -> float:
    scale, zero_point = parameters(low, high, grid, symmetric)
    return float((fake_quantize(x, scale, zero_point, grid).double() - x.double()).square().sum())


# --- all methods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("grid", "symmetric"), [(INT8, True), (UINT8, False)])
def test_a_channels_range_is_that_of_the_channel_alone(method: str, grid: Grid, symmetric: bool) -> None:
    batches = [torch.stack([_heavy_tailed(9 * part + row, 500) * 10**row for row in range(3)], 1).reshape(10, 50, 3) for part in range(3)]
    low_C, high_C = _observed(method, batches, grid, symmetric, axis=-1).range()
    assert low_C.shape == high_C.shape == (3,) and low_C.dtype == torch.float32
    for row in range(3):
        low, high = _observed(method, [batch[..., row] for batch in batches], grid, symmetric).range()
        assert low.shape == () and [float(low), float(high)] == [float(low_C[row]), float(high_C[row])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("grid", "symmetric"), [(INT8, True), (UINT8, False)])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-30])
def test_a_constant_keeps_its_value(method: str, grid: Grid, symmetric: bool, value: float) -> None:
    low, high = _observed(method, [torch.full((4, 5), value)] * 2, grid, symmetric).range()
    back = fake_quantize(torch.tensor(value), *parameters(low, high, grid, symmetric), grid)
    assert float(back) == pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_then_values_then_larger_ones(method: str) -> None:
    """A channel that was dead for a while, then outgrows its bins a thousandfold."""
    batches = [torch.zeros(100), torch.linspace(-1, 1, 101), torch.linspace(-1000, 1000, 1001)]
    low, high = _observed(method, batches, INT8, True, **({"momentum": 0.0} if method == "moving_average" else {})).range()
    assert -1000 <= float(low) < -500 and 500 < float(high) <= 1000


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinite_values_are_refused_and_change_nothing(method: str, bad: float) -> None:
    seen = _observed(method, [torch.linspace(-1, 2, 50)], UINT8, False)
    before = seen.range()
    with pytest.raises(InputError, match="calibration batch: expected finite values"):
        seen.observe(torch.tensor([0.0, bad]))
    assert all(a.equal(b) for a, b in zip(before, seen.range(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_seen_empty_batches_and_another_number_of_channels_are_refused(method: str) -> None:
    seen = observer(method, INT8, True, axis=1)
    with pytest.raises(InputError, match="at least one batch, found none"):
        seen.range()
    with pytest.raises(InputError, match=r"none in \(0, 4\)"):
        seen.observe(torch.zeros(0, 4))
    seen.observe(torch.ones(2, 4))
    with pytest.raises(InputError, match="expected 4 channels, found 3"):
        seen.observe(torch.ones(2, 3))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_and_gradients_do_not_matter(method: str) -> None:
    x = _heavy_tailed(3, 400).bfloat16()
    expected = _observed(method, [x.float()], INT8, True).range()
    found = _observed(method, [x.clone().requires_grad_(True)], INT8, True).range()
    assert all(a.equal(b) and not b.requires_grad for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("minmaks", {}, "did you mean 'minmax'"),
        ("percentile", {"percentil": 99}, "did you mean 'percentile'"),
        ("minmax", {"bins": 64}, "no option, found bins"),
        ("percentile", {"percentile": 101}, "50 to 100, found 101"),
        ("moving_average", {"momentum": 1.0}, "found 1.0"),
        ("mse", {"bins": 1000}, "a power of two from 16, found 1000"),
        ("entropy", {"bins": 256}, "at least 512, 4 for each of 128 levels, found 256"),
    ],
)
def test_wrong_methods_and_options_are_refused(method: str, options: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        observer(method, INT8, True, **options)


def test_16_bits_by_entropy_are_refused() -> None:
    with pytest.raises(UsageError, match="use the method minmax or mse"):
        observer("entropy", Grid(16), True)


# --- min-max and the moving average ---------------------------------------------------------------------------------


def test_minmax_is_the_extremes_of_all_batches() -> None:
    batches = [torch.randn(7, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    low_C, high_C = _observed("minmax", batches, INT8, True, axis=1).range()
    assert low_C.equal(torch.cat(batches).amin(0)) and high_C.equal(torch.cat(batches).amax(0))


def test_moving_average_in_closed_form() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 6.0]), torch.tensor([-5.0, 4.0])]
    low, high = _observed("moving_average", batches, UINT8, False, momentum=0.75).range()
    assert float(low) == pytest.approx(0.75 * (0.75 * -1 + 0.25 * -3) + 0.25 * -5, abs=1e-6)
    assert float(high) == pytest.approx(0.75 * (0.75 * 2 + 0.25 * 6) + 0.25 * 4, abs=1e-6)


# --- the histogram --------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), growth=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_histogram_that_grew_is_numpys_of_all_values(seed: int, growth: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(2, 60, generator=generator) * factor for factor in growth]
    seen = _observed("percentile", batches, INT8, True, axis=0, bins=32)
    assert isinstance(seen, Binned)
    for channel, width in enumerate(seen._width.tolist()):
        values = torch.cat(batches, 1)[channel].double().numpy()
        assert width * 16 <= np.abs(values).max() * (1 + 1e-6) and np.abs(values).max() <= width * 32
        expected, _ = np.histogram(values, bins=width * np.arange(-32, 33))
        # numpy closes each bin on the left as well, so counts agree but where a value lies on an edge of bins that grew.
        np.testing.assert_allclose(seen._sums[0, channel].numpy(), expected, atol=len(growth))


@pytest.mark.parametrize("method", BINNED)
def test_memory_stays_the_same_however_much_is_seen(method: str) -> None:
    def held(seen: calibration.Observer) -> int:
        return sum(value.numel() * value.element_size() for value in vars(seen).values() if isinstance(value, torch.Tensor))

    seen = _observed(method, [torch.randn(8, 3)], INT8, True, axis=1)
    first = held(seen)
    for power in range(12):
        seen.observe(torch.randn(500, 3) * 3.0**power)
    assert held(seen) == first <= 3 * (3 * 2 * 2048 + 3) * 8


# --- percentile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("batches", [1, 7])
def test_percentile_is_numpys_within_a_bin(percentile: float, batches: int) -> None:
    x = _heavy_tailed(1, 7 * 1501)
    values, outside = x.double().numpy(), (100 - percentile) / 100
    for symmetric, reference in (
        (False, np.quantile(values, [outside / 2, 1 - outside / 2], method="inverted_cdf")),
        (True, np.quantile(np.abs(values), 1 - outside, method="inverted_cdf") * np.array([-1, 1])),
    ):
        seen = _observed("percentile", list(x.chunk(batches)), INT8, symmetric, percentile=percentile)
        assert isinstance(seen, Binned)
        reference = np.clip(reference, values.min(), values.max())
        np.testing.assert_allclose([float(bound) for bound in seen.range()], reference, atol=float(seen._width[0]) * 1.001)
        low, high = (float(bound) for bound in seen.range())
        assert np.mean((values < low) | (values > high)) <= outside


@pytest.mark.parametrize("sign", [1, -1])
def test_percentile_of_one_sign_cuts_only_the_far_end(sign: int) -> None:
    x = _heavy_tailed(2).abs() + 0.5
    low, high = sorted(float(bound) * sign for bound in _observed("percentile", [x * sign], UINT8, False, percentile=99).range())
    assert low == float(x.min())
    assert high == pytest.approx(np.quantile(x.numpy(), 0.99, method="inverted_cdf"), abs=float(x.max()) / 1024)


# --- entropy --------------------------------------------------------------------------------------------------------


def _plain_divergence(counts: list[int], kept: int, levels: int) -> float:
    """KL(P || Q) of the slides, word for word; infinite where Q has nothing and P something."""
    p = [float(count) for count in counts[:kept]]
    p[-1] += sum(counts[kept:])
    q = [0.0] * kept
    for level in range(levels):
        first, last = level * kept // levels, (level + 1) * kept // levels
        filled = [place for place in range(first, last) if p[place] > 0]
        for place in filled:
            q[place] = sum(counts[first:last]) / len(filled)
    if not sum(q):
        return math.inf
    divergence = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            divergence += a / sum(p) * math.log(a / sum(p) / (b / sum(q))) if b > 0 else math.inf
    return divergence


@given(
    counts=st.lists(st.integers(0, 3) | st.integers(0, 2000), min_size=8, max_size=64).filter(any),
    levels=st.integers(2, 9),
)
@settings(max_examples=80, deadline=None)
def test_divergence_is_that_of_plain_loops(counts: list[int], levels: int) -> None:
    top = max(place for place, count in enumerate(counts) if count) + 1
    histogram = torch.tensor(counts, dtype=torch.float64)
    if top <= levels:
        assert _least_divergence(histogram, levels) == top
        return
    expected = [_plain_divergence(counts, kept, levels) for kept in range(levels, top + 1)]
    found = _divergence(histogram, torch.arange(levels, top + 1), levels)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert expected[_least_divergence(histogram, levels) - levels] <= min(expected) + 1e-9


@pytest.mark.parametrize(("grid", "symmetric", "levels"), [(INT8, True, 128), (UINT8, False, 256), (Grid(4, signed=False), False, 16)])
def test_entropy_of_values_is_the_plain_search_on_their_histogram(grid: Grid, symmetric: bool, levels: int) -> None:
    x = _heavy_tailed(5, 6000).abs()
    seen = _observed("entropy", list(x.chunk(3)), grid, symmetric, bins=1024)
    assert isinstance(seen, Binned)
    low, high = seen.range()
    width = float(seen._width[0])
    counts = np.bincount(np.minimum(np.floor(x.double().numpy() / width), 1023).astype(int), minlength=1024).tolist()
    kept = range(levels, max(place for place, count in enumerate(counts) if count) + 2)
    best = min(kept, key=lambda i: _plain_divergence(counts, i, levels))
    assert float(low) == 0.0 and float(high) == pytest.approx(min(best * width, float(x.max())), rel=1e-6)


def test_entropy_clips_outliers_on_both_sides_alike_but_not_past_the_values() -> None:
    x = torch.cat([torch.randn(50_000, generator=torch.Generator().manual_seed(0)).clamp(min=-0.2), torch.tensor([60.0])])
    low, high = _observed("entropy", [x], UINT8, False).range()
    assert float(low) == pytest.approx(-0.2) and 2 < float(high) < 30


# --- mean squared error ---------------------------------------------------------------------------------------------


@given(
    x=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40).map(lambda x: torch.tensor(x, dtype=torch.float32)),
    copies=st.integers(1, 30),
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    symmetric=st.booleans(),
    bins=st.sampled_from([16, 256]),
)
@settings(max_examples=60, deadline=None)
def test_mse_is_never_worse_than_minmax_on_its_own_values(x: torch.Tensor, copies: int, bits: int, symmetric: bool, bins: int) -> None:
    grid = Grid(bits, signed=symmetric)
    x = torch.cat([x, x[:1].repeat(copies)])
    chosen = _squared_error(x, *_observed("mse", list(x.split(7)), grid, symmetric, bins=bins).range(), grid, symmetric)
    assert chosen <= _squared_error(x, *_observed("minmax", [x], grid, symmetric).range(), grid, symmetric) * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize(
    ("grid", "symmetric", "gain"),
    [(Grid(2), True, 2), (Grid(4, narrow=True), True, 2), (Grid(4, signed=False), False, 1.5), (INT8, True, 1.02)],
)
def test_mse_finds_nearly_the_best_range(grid: Grid, symmetric: bool, gain: float) -> None:
    x = _heavy_tailed(4, 8000)
    found = _squared_error(x, *_observed("mse", list(x.chunk(4)), grid, symmetric).range(), grid, symmetric)
    low, high, factors = x.min(), x.max(), np.geomspace(1, 0.05, 30).tolist()
    if symmetric:
        tried = [(-torch.maximum(-low, high) * f, torch.maximum(-low, high) * f) for f in factors]
    else:
        tried = [(low * f, high * g) for f in factors[::2] for g in factors[::2]]
    assert found <= 1.05 * min(_squared_error(x, a, b, grid, symmetric) for a, b in tried)
    assert found * gain <= _squared_error(x, low, high, grid, symmetric)


def test_mse_bounds_enclose_the_error_of_the_values() -> None:
    x = torch.stack([_heavy_tailed(6, 3000), torch.rand(3000, generator=torch.Generator().manual_seed(1))])
    for bits, slack in ((3, 1.02), (8, 1.6)):
        grid = Grid(bits, signed=False)
        seen = _observed("mse", [x], grid, False, axis=0)
        assert isinstance(seen, calibration.MeanSquaredError)
        low_C, high_C = seen._low.clamp(max=0), seen._high.clamp(min=0)
        scale, zero_point = (spread(p, 2, 0) for p in parameters(low_C.float(), high_C.float(), grid, False))
        error_C = (fake_quantize(x, scale, zero_point, grid).double() - x.double()).square().sum(1)
        moments, a_CF = seen._filled()
        least_C, most_C = seen._least(moments, a_CF, low_C, high_C), seen._most(moments, low_C, high_C)
        assert bool((least_C <= error_C * (1 + 1e-6)).all() and (error_C <= most_C * (1 + 1e-6)).all())
        assert bool((most_C <= least_C * slack).all())


def test_mse_keeps_minmax_where_steps_are_finer_than_bins() -> None:
    x = _heavy_tailed(8)
    assert [float(b) for b in _observed("mse", [x], Grid(16), True).range()] == [float(x.min()), float(x.max())]
