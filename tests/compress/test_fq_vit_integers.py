"""FQ-ViT's LayerNorm and softmax: integers against integers of Python, and what they stand for against float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitedge.compress._fq_vit_layernorm import ExponentSearch, PowerOfTwoLayerNorm, layer_grid
from vitedge.compress._fq_vit_softmax import IntegerExp, LogIntSoftmax, least_step, log2_weights
from vitedge.numerics import sqnr_db

STEPS = st.floats(least_step(), 40.0)
TOKENS = st.integers(1, 1025)


# LayerNorm inputs. Shapes: S tokens, D channels.


def uneven(seed: int = 0, large: int = 2) -> torch.Tensor:
    """Values of 64 channels, a few of them ten times as large as the others; (400, 64)."""
    x_SD = torch.randn(400, 64, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)
    x_SD[:, :large] *= 10
    return x_SD


def searched(x_SD: torch.Tensor, most: int = 3, bits: int = 8) -> ExponentSearch:
    step, zero_point = layer_grid(x_SD.min(), x_SD.max(), bits, most)
    search = ExponentSearch(step, zero_point, bits, most)
    for part in x_SD.split(150):
        search.observe(part)
    return search


def brute_force(x_SD: torch.Tensor, step: float, zero_point: int, clamp: bool) -> np.ndarray:
    """The paper's argmin of squared errors, in float64 numpy."""
    errors = []
    for exponent in range(4):
        q_SD = np.rint(x_SD.double().numpy() / (2**exponent * step)) + zero_point
        q_SD = np.clip(q_SD, 0, 255) if clamp else q_SD
        errors.append((((q_SD - zero_point) * 2**exponent * step - x_SD.double().numpy()) ** 2).sum(0))
    return np.argmin(errors, 0)


@pytest.mark.parametrize("seed", range(3))
def test_exponents_are_those_of_least_error(seed: int) -> None:
    x_SD = uneven(seed) * torch.exp2(torch.linspace(-4, 0, 64)) + torch.linspace(-1, 2, 64)
    search = searched(x_SD)
    wanted = brute_force(x_SD, search.step, int(search.zero_point), clamp=True)
    assert len(set(wanted)) > 2
    assert search.exponents().tolist() == wanted.tolist()


def test_without_the_clamp_the_finest_step_would_win_everywhere() -> None:
    x_SD = uneven()
    search = searched(x_SD)
    unclamped = brute_force(x_SD, search.step, int(search.zero_point), clamp=False)
    assert unclamped.tolist() == [0] * 64
    assert search.exponents()[:2].tolist() == [3, 3]


def test_a_tenfold_spread_costs_one_step_many_decibels() -> None:
    x_SD = uneven()
    search = searched(x_SD)
    own, whole = search.sqnr_db() or (0.0, 0.0)
    norm = PowerOfTwoLayerNorm.of(nn.LayerNorm(64), search.step, int(search.zero_point), 8, search.exponents())
    integers = norm.inputs(x_SD / (norm.factor * norm.step)) * norm.factor
    assert sqnr_db(x_SD, integers * norm.step) == pytest.approx(own, abs=0.01)
    assert whole == pytest.approx(searched(x_SD, most=0).sqnr_db()[0], abs=0.01)  # type: ignore[index]
    assert own > whole + 10


def test_the_grid_of_a_layer_is_the_papers() -> None:
    low, high = -3.0, 9.0
    step, zero_point = layer_grid(torch.tensor(low), torch.tensor(high), 8, 3)
    assert step == pytest.approx((high - low) / 255 / 8, rel=1e-6)
    assert zero_point == round(-low / (8 * step))


@pytest.mark.parametrize("x_SD", [torch.zeros(5, 4), torch.full((5, 4), 2.0), torch.full((5, 4), -3e37), torch.full((5, 4), 1e-37)])
def test_constant_channels_and_huge_ranges_stay_finite(x_SD: torch.Tensor) -> None:
    x_SD = x_SD.clone()
    x_SD[0, 0] *= -1.5
    search = searched(x_SD)
    exponents = search.exponents()
    assert search.step > 0 and exponents.shape == (4,)
    norm = PowerOfTwoLayerNorm.of(nn.LayerNorm(4, eps=1e-6), search.step, int(search.zero_point), 8, exponents)
    y_SD = norm(x_SD)
    reference_SD = nn.functional.layer_norm(x_SD.double(), (4,), eps=1e-6)
    assert (y_SD - reference_SD).abs().max() < 0.02


def made_norm(step: float, eps: float, features: int = 192) -> PowerOfTwoLayerNorm:
    generator = torch.Generator().manual_seed(4)
    norm = nn.LayerNorm(features, eps=eps)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(features, generator=generator))
        norm.bias.copy_(torch.randn(features, generator=generator))
    return PowerOfTwoLayerNorm.of(norm, step, 101, 8, torch.arange(features) % 4)


def integers_of(norm: PowerOfTwoLayerNorm, x: torch.Tensor) -> np.ndarray:
    """The paper's (X_q - z) << a, in int64."""
    exponents = np.arange(norm.features) % 4
    divisor = (norm.step * 2.0**exponents).astype(np.float32)
    q = np.clip(np.rint(x.numpy() / divisor).astype(np.int64) + 101, 0, 255)
    return (q - 101) << exponents


@pytest.mark.parametrize(("step", "eps"), [(0.013, 1e-6), (1e-4, 1e-6), (7.0, 1e-5)])
def test_layer_norm_is_that_of_the_integers(step: float, eps: float) -> None:
    norm = made_norm(step, eps)
    x = torch.randn(50, 192, generator=torch.Generator().manual_seed(5)) * step * 200
    integers = integers_of(norm, x)
    assert np.array_equal((norm.inputs(x / (norm.factor * norm.step)) * norm.factor).detach().numpy(), integers)
    # Sums of integers and of their squares are exact in int64, as they are in an accelerator.
    count, total, squares = 192, integers.sum(-1), (integers**2).sum(-1)
    variance = (count * squares - total**2) / count**2
    normed = (integers - (total / count)[:, None]) / np.sqrt(variance + eps / step**2)[:, None]
    wanted = normed * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()
    of_values = nn.functional.layer_norm(
        torch.from_numpy(integers * step), (192,), norm.weight.detach().double(), norm.bias.detach().double(), eps
    )
    assert np.abs(wanted - of_values.numpy()).max() < 1e-9
    # 192 squares are summed in float32: half of 192 x 2^-24 of the deviation, times weights and values of up to 4 each.
    assert np.abs(norm(x).detach().numpy() - wanted).max() < 192 * 2**-25 * 16


# Softmax.


def exponential(exp: IntegerExp, distance: int) -> int:
    """i-exp in Python's integers."""
    units = distance << exp.shift
    q = min(units // exp.ln2, exp.last)
    r = q * exp.ln2 - units if q < exp.last else 0
    z = (r + exp.b) ** 2 + exp.c
    return z << (exp.rise - q) if exp.rise >= q else z >> (q - exp.rise)


def code(e: int, total: int, bits: int) -> int:
    """The largest code k whose comparison 128 sum >= 181 e 2^(k - 1) holds, in Python's integers."""
    return max(k for k in range(2**bits) if 256 * total >= 181 * e * 2**k)


def softmax_codes(softmax: LogIntSoftmax, scores: torch.Tensor) -> np.ndarray:
    q = np.clip(np.rint(scores.numpy() / np.float32(softmax.step)).astype(int) + softmax.zero_point, 0, 255).reshape(-1, scores.shape[-1])
    codes = []
    for row in q.tolist():
        e = [exponential(softmax.exp, max(row) - value) for value in row]
        codes.append([code(value, sum(e), softmax.bits) for value in e])
    return np.array(codes).reshape(scores.shape)


@given(STEPS, TOKENS)
@settings(deadline=None, max_examples=60)
def test_every_integer_of_the_softmax_is_exact_in_float32(step: float, tokens: int) -> None:
    exp = IntegerExp.of(step, tokens)
    assert all(isinstance(value, int) for value in astuple(exp))
    assert exp.b**2 + exp.c < 2**24
    assert tokens * 2**exp.bits <= 2**24 and 181 * 2**exp.bits <= 2**24
    wanted = [exponential(exp, d) for d in range(256)]
    assert exp(torch.arange(256.0)).tolist() == wanted
    assert 2 ** (exp.bits - 1) <= wanted[0] <= 2**exp.bits
    assert max(b - a for a, b in itertools.pairwise(wanted)) <= wanted[0] * 4e-3


@pytest.mark.parametrize("step", [least_step(), 0.003, 0.02, 0.1, 0.37, 1.0, 5.0])
def test_the_exponential_is_as_near_as_its_polynomial(step: float) -> None:
    exp = IntegerExp.of(step, 197)
    found = exp(torch.arange(256.0)).double().numpy()
    distance = np.arange(256) * step
    # I-BERT's 1.9e-3 twice, as the value at 0 has it too; half a unit in b and in c; ln 2 in whole units, q of them; the shift's rest.
    q = np.floor(distance / math.log(2))
    relative = 2 * 1.9e-3 / 0.5 + 2 / exp.b + q * 0.5 / exp.ln2
    assert (np.abs(found / found[0] - np.exp(-distance)) <= np.exp(-distance) * relative + 1 / found[0]).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_codes_are_rounded_logarithms(bits: int) -> None:
    generator = np.random.default_rng(bits)
    e = np.concatenate([generator.integers(1, 2**16, 2000), 2 ** generator.integers(0, 16, 500)])
    total = e + generator.integers(0, 2 ** generator.integers(1, 24, len(e)))
    total = np.minimum(total, 2**24)
    weights = log2_weights(torch.from_numpy(e).float(), torch.from_numpy(total).float(), bits).double().numpy()
    exact = np.log2(total / e)
    unsure = np.abs(exact % 1 - 0.5) < 2e-4
    codes = -np.log2(weights)
    assert unsure.mean() < 0.01
    assert np.array_equal(codes[~unsure], np.clip(np.rint(exact), 0, 2**bits - 1)[~unsure])
    assert codes.tolist() == [code(int(a), int(b), bits) for a, b in zip(e, total, strict=True)]


def test_an_exponential_of_zero_has_the_last_code() -> None:
    weights = log2_weights(torch.tensor([65536.0, 0.0]), torch.tensor(65536.0), 4)
    assert weights.tolist() == [1.0, 2.0**-15]


@pytest.mark.parametrize("reach", [0.5, 4.0, 20.0, 300.0])
def test_softmax_is_within_half_a_code_of_float64(reach: float) -> None:
    scores = torch.rand(40, 50, generator=torch.Generator().manual_seed(6)) * reach - reach / 2
    softmax = LogIntSoftmax(max(reach / 255, least_step()), 128, 50)
    codes = -torch.log2(softmax(scores)).double().numpy()
    assert np.array_equal(codes, softmax_codes(softmax, scores))
    q = (torch.clamp(torch.round(scores / softmax.step) + 128, 0, 255) - 128).double()
    attention = torch.softmax(q * softmax.step, -1).numpy()
    exact = -np.log2(attention)
    # Half a code, the polynomial in numerator and sum, 181/128 for the root, ln 2 in whole units, and the shift's rest.
    units = exact * 0.5 / softmax.exp.ln2
    slack = 0.5 + 0.02 + 2e-4 + units + np.log2(1 + 1 / np.maximum(attention * 2**softmax.exp.bits - 1, 1))
    seen = exact < 14
    assert seen.any() and (np.abs(codes - exact) <= slack)[seen].all()
    assert (codes[~seen] >= 12).all()


def test_equal_scores_get_equal_weights() -> None:
    softmax = LogIntSoftmax(least_step(), 0, 16)
    assert torch.equal(softmax(torch.zeros(1, 1, 2, 16)), torch.full((1, 1, 2, 16), 1 / 16))


def test_normalized_rows_are_powers_of_two_below_their_greatest() -> None:
    scores = torch.rand(40, 50, generator=torch.Generator().manual_seed(9)) * 12
    softmax = LogIntSoftmax(12 / 255, 0, 50, normalize=True)
    assert softmax.exp.greatest == exponential(softmax.exp, 0)
    weights = softmax(scores).double()
    assert torch.allclose(weights.sum(-1), torch.ones(40, dtype=torch.float64), atol=1e-6)
    codes = torch.log2(weights.amax(-1, keepdim=True) / weights).numpy()
    q = torch.round(scores / softmax.step).double()
    exact = (q.amax(-1, keepdim=True) - q).numpy() * softmax.step / math.log(2)
    assert np.abs(codes - codes.round()).max() < 1e-6 and codes.max() >= 14.5
    near = np.abs(exact % 1 - 0.5) < 0.03 + exact * 0.5 / softmax.exp.ln2
    assert near.mean() < 0.2 and np.array_equal(codes.round()[~near & (exact < 11)], exact.round()[~near & (exact < 11)])
    paper = LogIntSoftmax(12 / 255, 0, 50)(scores).double()
    wanted = torch.softmax(q * softmax.step, -1)
    assert sqnr_db(wanted, weights) > sqnr_db(wanted, paper) + 1
