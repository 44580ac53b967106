"""Ranks: the rules against their definitions tried out one by one, and what is spread over layers against every other way to."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vitedge.compress._decompose_ranks import allot, choose_ranks, energy_rank, largest_rank, spectrum, weighed, weights
from vitedge.compress.decompose import Config
from vitedge.errors import UsageError

SHAPES = {"a": (48, 16), "b": (16, 16), "c": (64, 16)}


def choose(shapes: dict[str, tuple[int, int]], squares: dict[str, list[float]] | None = None, **config: Any) -> dict[str, int | None]:
    energies = {name: torch.tensor(values, dtype=torch.float64) for name, values in (squares or {}).items()}
    return choose_ranks(Config(**config), shapes, energies)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_largest_rank_is_the_last_with_fewer_weights(outputs: int, inputs: int) -> None:
    smaller = [rank for rank in range(1, outputs * inputs + 1) if rank * (outputs + inputs) < outputs * inputs]
    assert largest_rank((outputs, inputs)) == max(smaller, default=0)
    assert weights((outputs, inputs), None) == outputs * inputs and weights((outputs, inputs), 3) == 3 * (outputs + inputs)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.floats(0.01, 0.99))
@settings(max_examples=80, deadline=None)
def test_the_energy_rank_is_the_least_that_reaches_it(squares: list[int], energy: float) -> None:
    squares = sorted(squares, reverse=True)
    shares = [sum(squares[:rank]) - energy * sum(squares) for rank in range(1, len(squares) + 1)]
    assume(all(abs(share) > 1e-6 for share in shares) or sum(squares) == 0)
    expected = next(rank for rank, share in enumerate(shares, 1) if share >= 0)
    assert energy_rank(torch.tensor(squares, dtype=torch.float64), energy) == expected


def test_the_spectrum_is_that_of_what_is_decomposed() -> None:
    generator = np.random.default_rng(0)
    w_OI, root_II = generator.normal(size=(5, 4)), np.tril(generator.normal(size=(4, 4)))
    plain = spectrum(torch.from_numpy(w_OI).float(), None)
    assert plain.dtype == torch.float64
    np.testing.assert_allclose(plain.numpy(), np.linalg.svd(w_OI.astype(np.float32).astype(float), compute_uv=False) ** 2, rtol=1e-10)
    found = spectrum(torch.from_numpy(w_OI), torch.from_numpy(root_II)).numpy()
    np.testing.assert_allclose(found, np.linalg.svd(w_OI @ root_II, compute_uv=False) ** 2, rtol=1e-8)


@given(st.floats(0.1, 0.99), st.integers(4, 60), st.integers(4, 60))
@settings(max_examples=60, deadline=None)
def test_a_ratio_is_the_most_that_the_factors_have(ratio: float, outputs: int, inputs: int) -> None:
    assume(ratio * outputs * inputs >= (outputs + inputs) * (1 + 1e-9))
    (rank,) = choose({"layer": (outputs, inputs)}, ratio=ratio).values()
    assert rank is not None and rank >= 1
    assert rank * (outputs + inputs) <= ratio * outputs * inputs * (1 + 1e-12)
    assert (rank + 1) * (outputs + inputs) > ratio * outputs * inputs * (1 - 1e-12)


def test_a_number_an_energy_and_what_would_be_larger() -> None:
    assert choose(SHAPES, rank=7) == {"a": 7, "b": 7, "c": 7}
    # 8 (16 + 16) are as many weights as 16 x 16 has: not fewer.
    assert choose(SHAPES, rank=8) == {"a": 8, "b": None, "c": 8}
    assert choose(SHAPES, rank=7, larger="refuse") == {"a": 7, "b": 7, "c": 7}
    squares = {"a": [8.0, 1.0, 1.0], "b": [1.0] * 16, "c": [5.0, 4.0, 1.0]}
    assert choose(SHAPES, squares, energy=0.79) == {"a": 1, "b": None, "c": 2}
    assert choose(SHAPES, squares, energy=0.85) == {"a": 2, "b": None, "c": 2}
    # Of a layer with one output no factors are smaller, whatever the ratio.
    assert choose({"one": (1, 30), "b": (16, 16)}, ratio=0.7) == {"one": None, "b": 5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rank": 8, "larger": "refuse"},
            "decompose: b: expected a rank of 7 or less, with which factors have fewer weights than 256, found 8, with which they "
            "have 256; lower decompose's rank, ratio or energy, or leave the layer out of decompose.layers",
        ),
        ({"rank": 13}, "decompose: a: expected a rank of 11 or less, with which factors have fewer weights than 768, found 13"),
        ({"rank": 13, "allot": "sensitivity"}, "decompose: a: expected a rank of 11 or less"),
        ({"ratio": 0.1}, "decompose: b: expected a ratio that leaves its 16 x 16 weights a rank, found 0.1, which is less than rank 1; "),
    ],
)
def test_what_gives_no_smaller_layers_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(SHAPES, **config)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# Spread over layers.


def spectra(shape: tuple[int, int], count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(seed)
    squares = np.sort(generator.exponential(size=(count, min(shape))) ** generator.uniform(0.5, 3, (count, 1)))[:, ::-1].copy()
    return {f"layer{index}": torch.from_numpy(values) for index, values in enumerate(squares)}


def energy_kept(energies: dict[str, torch.Tensor], ranks: dict[str, int | None]) -> float:
    return sum(float(squares[: ranks[name]].sum()) for name, squares in energies.items())


@given(st.integers(0, 999), st.integers(3, 10))
@settings(max_examples=40, deadline=None)
def test_no_other_way_to_spread_the_ranks_keeps_more(seed: int, total: int) -> None:
    shape = (20, 20)  # 9 is the largest rank, which three layers of 10 together cannot pass
    energies = spectra(shape, 3, seed)
    shapes = dict.fromkeys(energies, shape)
    ranks = allot(shapes, energies, total * 40 + 39)
    others = [ranks for ranks in itertools.product(range(1, 9), repeat=3) if sum(ranks) <= total]
    best = max(energy_kept(energies, dict(zip(energies, ranks, strict=True))) for ranks in others)
    assert sum(weights(shape, rank) for rank in ranks.values()) == total * 40
    assert energy_kept(energies, ranks) == pytest.approx(best, rel=1e-12)


def test_equal_energies_and_those_in_units_of_the_loss_are_weighed_unlike() -> None:
    """Two layers of one shape, the second of a hundredth of the energy: alike by shares, without a rank to spare by the loss."""
    squares = torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.0] * 16, dtype=torch.float64)
    shapes, energies = {"loud": (20, 20), "quiet": (20, 20)}, {"loud": squares, "quiet": squares / 100}
    config: dict[str, Any] = {"ratio": 0.3}  # rank 3 each
    assert choose_ranks(Config(allot="sensitivity", **config), shapes, energies) == {"loud": 3, "quiet": 3}
    assert choose_ranks(Config(allot="loss", **config), shapes, energies) == {"loud": 4, "quiet": 2}
    # A hundred times the squared gradient makes up for it.
    evened = weighed(energies, {"loud": 1.0, "quiet": 100.0})
    assert choose_ranks(Config(allot="loss", **config), shapes, evened) == {"loud": 3, "quiet": 3}


def test_a_layer_that_needs_it_becomes_whole_and_one_that_does_not_gives_it_up() -> None:
    energies = {"steep": torch.tensor([1.0] + [1e-12] * 19, dtype=torch.float64), "flat": torch.ones(20, dtype=torch.float64)}
    shapes = dict.fromkeys(energies, (20, 20))
    assert allot(shapes, energies, 40 + 400) == {"steep": 1, "flat": None}
    assert allot(shapes, energies, 40 + 399) == {"steep": 1, "flat": 9}
    assert allot(shapes, energies, 80) == {"steep": 1, "flat": 1}


def test_a_layer_too_small_for_factors_stays_whole_and_one_of_zeros_at_rank_1() -> None:
    energies = {
        "thin": torch.ones(1, dtype=torch.float64),
        "zeros": torch.zeros(20, dtype=torch.float64),
        "wide": torch.ones(20, dtype=torch.float64),
    }
    shapes = {"thin": (1, 30), "zeros": (20, 20), "wide": (20, 20)}
    assert allot(shapes, energies, 30 + 40 + 5 * 40) == {"thin": None, "zeros": 1, "wide": 5}


@given(st.integers(0, 99), st.floats(0.2, 0.9))
@settings(max_examples=30, deadline=None)
def test_sensitivity_takes_no_more_weights_than_each_layers_own_ratio(seed: int, ratio: float) -> None:
    shapes = {"layer0": (48, 16), "layer1": (16, 16), "layer2": (16, 64)}
    energies = {name: spectra(shape, 1, seed + i)["layer0"] for i, (name, shape) in enumerate(shapes.items())}
    uniform = choose_ranks(Config(ratio=ratio), shapes, energies)
    spread = choose_ranks(Config(ratio=ratio, allot="sensitivity"), shapes, energies)
    counts = [sum(weights(shapes[name], rank) for name, rank in ranks.items()) for ranks in (uniform, spread)]
    assert list(spread) == list(shapes) and counts[1] <= counts[0]
    # What is left over is too little for one more rank anywhere.
    steps = [min(sum(shapes[n]), weights(shapes[n], None) - weights(shapes[n], r)) for n, r in spread.items() if r is not None]
    assert counts[0] - counts[1] < min(steps)
