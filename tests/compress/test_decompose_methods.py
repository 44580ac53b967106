"""The decompositions: each against its definition written out, the best there can be, and the equalities between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitedge.compress._decompose import factorize
from vitedge.compress._decompose_methods import METHODS, reconstruction
from vitedge.errors import UsageError

RECTANGULAR = sorted(set(METHODS) - {"evd"})
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SEEDS = st.integers(0, 999)


def numbers(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def product(method: Any, w_OI: np.ndarray, rank: int) -> np.ndarray:
    left_OR, right_RI = reconstruction(method, torch.from_numpy(w_OI), rank)
    assert left_OR.dtype == right_RI.dtype == torch.float64
    assert left_OR.shape == (w_OI.shape[0], rank) and right_RI.shape == (rank, w_OI.shape[1])
    found: np.ndarray = (left_OR @ right_RI).numpy()
    return found


def error(method: str, w_OI: np.ndarray, rank: int) -> float:
    return float(np.linalg.norm(w_OI - product(method, w_OI, rank)))


@given(SIZES, SEEDS)
@settings(max_examples=30, deadline=None)
def test_all_terms_give_the_weight(size: tuple[int, int], seed: int) -> None:
    w_OI = numbers(*size, seed)
    rank = min(size)
    for method in sorted(set(RECTANGULAR) - {"cholesky"}):
        assert error(method, w_OI, rank) <= 1e-10 * np.linalg.norm(w_OI), method
    # The normal equations square the condition number of what they solve with.
    assert error("cholesky", w_OI, rank) <= 1e-13 * np.linalg.cond(w_OI[:, :rank]) ** 2 * np.linalg.norm(w_OI)
    square_NN = numbers(size[0], size[0], seed)
    assert error("evd", square_NN, size[0]) <= 1e-10 * np.linalg.norm(square_NN)


@given(SIZES, st.integers(1, 12), SEEDS)
@settings(max_examples=60, deadline=None)
def test_none_is_nearer_than_svd_whose_error_is_what_it_leaves_out(size: tuple[int, int], rank: int, seed: int) -> None:
    w_OI, rank = numbers(*size, seed), min(rank, *size)
    best = float(np.sqrt((np.linalg.svd(w_OI, compute_uv=False)[rank:] ** 2).sum()))
    assert error("svd", w_OI, rank) == pytest.approx(best, abs=1e-12 * np.linalg.norm(w_OI))
    for method in RECTANGULAR:
        assert error(method, w_OI, rank) >= best - 1e-12 * np.linalg.norm(w_OI), method


@given(SIZES, st.integers(1, 12), SEEDS)
@settings(max_examples=60, deadline=None)
def test_full_is_reduced_and_rank_retaining_is_complete_orthogonal(size: tuple[int, int], rank: int, seed: int) -> None:
    w_OI, rank = numbers(*size, seed), min(rank, *size)
    tolerance = 1e-12 * float(np.linalg.norm(w_OI))
    np.testing.assert_allclose(product("qr", w_OI, rank), product("qr_reduced", w_OI, rank), rtol=0, atol=tolerance)
    np.testing.assert_allclose(product("qr_pivoted", w_OI, rank), product("cod", w_OI, rank), rtol=0, atol=tolerance)
    for method, orthonormal in (("qr", [True, False]), ("qr_pivoted", [True, False]), ("cod", [False, True]), ("svd", [False, True])):
        left_OR, right_RI = reconstruction(method, torch.from_numpy(w_OI), rank)  # type: ignore[arg-type]
        for factor, expected in zip((left_OR.T, right_RI), orthonormal, strict=True):
            if expected:
                torch.testing.assert_close(factor @ factor.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


@given(SIZES, st.integers(1, 12), SEEDS)
@settings(max_examples=60, deadline=None)
def test_qr_is_the_projection_on_the_first_columns(size: tuple[int, int], rank: int, seed: int) -> None:
    """Those columns are kept, and what is left of the others stands at right angles to them."""
    w_OI, rank = numbers(*size, seed), min(rank, *size)
    first_OR, scale = w_OI[:, :rank], float(np.linalg.norm(w_OI))
    kept_OI = product("qr", w_OI, rank)
    np.testing.assert_allclose(kept_OI[:, :rank], first_OR, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(first_OR.T @ (w_OI - kept_OI), 0, atol=1e-12 * scale**2)
    tolerance = 1e-13 * np.linalg.cond(first_OR) ** 2 * scale
    np.testing.assert_allclose(product("cholesky", w_OI, rank), kept_OI, rtol=0, atol=tolerance)


@given(SIZES, st.integers(1, 12), SEEDS)
@settings(max_examples=60, deadline=None)
def test_pivoted_qr_takes_the_column_with_most_left_over_each_time(size: tuple[int, int], rank: int, seed: int) -> None:
    w_OI, rank = numbers(*size, seed), min(rank, *size)
    left_OI = w_OI.copy()
    for _ in range(rank):
        column_O = left_OI[:, np.linalg.norm(left_OI, axis=0).argmax()]
        direction_O = column_O / np.linalg.norm(column_O)
        left_OI = left_OI - np.outer(direction_O, direction_O @ left_OI)
    np.testing.assert_allclose(product("qr_pivoted", w_OI, rank), w_OI - left_OI, rtol=0, atol=1e-9)


@given(SIZES, st.integers(1, 12), SEEDS)
@settings(max_examples=60, deadline=None)
def test_lu_is_gaussian_elimination_so_many_steps_far(size: tuple[int, int], rank: int, seed: int) -> None:
    w_OI, rank = numbers(*size, seed), min(rank, *size)
    left_OI = w_OI.copy()
    for step in range(rank):
        pivot_I = left_OI[np.abs(left_OI[:, step]).argmax()]
        left_OI = left_OI - np.outer(left_OI[:, step] / pivot_I[step], pivot_I)
    np.testing.assert_allclose(product("lu", w_OI, rank), w_OI - left_OI, rtol=0, atol=1e-9)


@given(st.integers(1, 12), st.integers(1, 12), SEEDS)
@settings(max_examples=40, deadline=None)
def test_evd_of_a_symmetric_matrix_is_its_svd(size: int, rank: int, seed: int) -> None:
    w_NN = numbers(size, size, seed)
    w_NN, rank = w_NN + w_NN.T, min(rank, size)
    np.testing.assert_allclose(product("evd", w_NN, rank), product("svd", w_NN, rank), rtol=0, atol=1e-8)


def test_evd_keeps_complex_eigenvalues_in_pairs() -> None:
    """Magnitudes 3 (a pair), 2 and 1: a pair that goes beyond the rank is passed over."""
    basis_NN = np.eye(4) + 0.2 * numbers(4, 4)
    terms = [np.zeros((4, 4)) for _ in range(3)]
    terms[0][:2, :2] = 3 * np.array([[0.6, -0.8], [0.8, 0.6]])
    terms[1][2, 2], terms[2][3, 3] = -2.0, 1.0
    terms = [basis_NN @ term @ np.linalg.inv(basis_NN) for term in terms]
    w_NN = sum(terms)
    for rank, kept in ((1, terms[1]), (2, terms[0]), (3, terms[0] + terms[1]), (4, w_NN)):
        np.testing.assert_allclose(product("evd", w_NN, rank), kept, rtol=0, atol=1e-12)
    pair = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    with pytest.raises(UsageError, match="expected a real eigenvalue, for evd of rank 1, found complex pairs alone"):
        reconstruction("evd", pair, 1)
    two_pairs = torch.block_diag(2 * pair, pair)
    left, right = reconstruction("evd", two_pairs, 3)  # one pair fits, a second does not
    assert len(right) == left.shape[1] == 2
    torch.testing.assert_close(left @ right, torch.block_diag(2 * pair, 0 * pair).double(), rtol=0, atol=1e-12)


def test_normal_equations_lose_digits_where_qr_does_not() -> None:
    """Table 1 of Sun 2023: accuracy of normal equations < QR, on columns with a condition number of a million."""
    left_OK, _ = np.linalg.qr(numbers(20, 8))
    right_KK, _ = np.linalg.qr(numbers(8, 8, 1))
    w_OI = left_OK * np.logspace(0, -6, 8) @ right_KK
    assert error("qr", w_OI, 8) < 1e-14
    assert 1e-13 < error("cholesky", w_OI, 8) < 1e-6


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_that_no_factors_have_is_refused(method: Any, rank: int) -> None:
    with pytest.raises(UsageError, match="expected a rank from 1 to 4") as caught:
        reconstruction(method, torch.eye(4), rank)
    assert "\n" not in str(caught.value)


def test_evd_of_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a square matrix for evd, found 5 x 4"):
        reconstruction("evd", torch.ones(5, 4), 2)


# Whitened by what goes in.


def layer_of(w_OI: np.ndarray) -> nn.Linear:
    layer = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w_OI))
    return layer


def kept(method: Any, w_OI: np.ndarray, rank: int, x_IT: np.ndarray | None) -> np.ndarray:
    """The weight at a rank, whitened by these inputs without damping."""
    root_II = None if x_IT is None else torch.linalg.cholesky(torch.from_numpy(x_IT @ x_IT.T))
    factors = factorize("layer", layer_of(w_OI), method, rank, root_II)
    assert factors.seconds >= 0
    found: np.ndarray = (factors.left_OR @ factors.right_RI).numpy()
    return found


def inputs_of_unlike_reach(inputs: int, seed: int) -> np.ndarray:
    """(I, T): a few directions hold most of them, as of activations."""
    return numbers(inputs, inputs, seed) * np.logspace(0, -1.5, inputs) @ numbers(inputs, 4 * inputs, seed + 1)


@given(st.integers(2, 10), st.integers(2, 10), st.integers(1, 9), SEEDS)
@settings(max_examples=40, deadline=None)
def test_whitened_svd_changes_the_outputs_least(outputs: int, inputs: int, rank: int, seed: int) -> None:
    """Against the best there is: the outputs' own singular values; and against every other method's."""
    w_OI, x_IT = numbers(outputs, inputs, seed), inputs_of_unlike_reach(inputs, seed + 7)
    rank = min(rank, outputs - 1, inputs - 1)
    best = float(np.sqrt((np.linalg.svd(w_OI @ x_IT, compute_uv=False)[rank:] ** 2).sum()))
    found = {m: float(np.linalg.norm((w_OI - kept(m, w_OI, rank, x_IT)) @ x_IT)) for m in ("svd", "qr_pivoted", "lu")}
    plain = float(np.linalg.norm((w_OI - kept("svd", w_OI, rank, None)) @ x_IT))
    tolerance = 1e-9 * float(np.linalg.norm(w_OI @ x_IT))
    assert found["svd"] == pytest.approx(best, abs=tolerance)
    assert min(plain, found["qr_pivoted"], found["lu"]) >= best - tolerance


def test_whitened_svd_is_the_optimum_and_far_better_where_inputs_are_correlated() -> None:
    w_OI, x_II = numbers(12, 8), numbers(8, 8, 1) * np.logspace(0, -2, 8) @ numbers(8, 8, 2)
    u_OK, sigma_K, v_KI = np.linalg.svd(w_OI @ x_II)
    optimum_OI = u_OK[:, :3] * sigma_K[:3] @ v_KI[:3] @ np.linalg.inv(x_II)
    whitened_OI, plain_OI = kept("svd", w_OI, 3, x_II), kept("svd", w_OI, 3, None)
    np.testing.assert_allclose(whitened_OI, optimum_OI, rtol=0, atol=1e-7)
    whitened, plain = (float(np.linalg.norm((w_OI - found) @ x_II)) for found in (whitened_OI, plain_OI))
    assert whitened < 0.5 * plain
    # Of the weight itself it is the other way round: that is what plain SVD is the best for.
    assert np.linalg.norm(w_OI - plain_OI) < np.linalg.norm(w_OI - whitened_OI)


@pytest.mark.parametrize("method", RECTANGULAR)
def test_inputs_alike_in_every_direction_change_nothing(method: Any) -> None:
    w_OI = numbers(9, 6)
    root_II = 2.0 * torch.eye(6, dtype=torch.float64)
    factors = factorize("layer", layer_of(w_OI), method, 3, root_II)
    np.testing.assert_allclose((factors.left_OR @ factors.right_RI).numpy(), product(method, w_OI, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_come_in_the_weights_type_from_float64(dtype: torch.dtype) -> None:
    layer = layer_of(numbers(9, 6)).to(dtype)
    factors = factorize("layer", layer, "svd", 3, None)
    left_OR, right_RI = reconstruction("svd", layer.weight, 3)
    assert torch.equal(factors.left_OR, left_OR.to(dtype)) and torch.equal(factors.right_RI, right_RI.to(dtype))


@pytest.mark.parametrize(
    ("method", "weight"), [("cholesky", [[0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [0.0, 1.0, 1.0]]), ("evd", [[0.0, 1.0], [0.0, 0.0]])]
)
def test_what_a_method_cannot_factor_is_refused_by_name(method: Any, weight: list[list[float]]) -> None:
    """A column of zeros, for the normal equations; a matrix that has no basis of eigenvectors."""
    with pytest.raises(UsageError, match=f"decompose: blocks.7.mlp.fc2: expected a weight that {method} can factor at rank 1") as caught:
        factorize("blocks.7.mlp.fc2", layer_of(np.array(weight)), method, 1, None)
    assert "\n" not in str(caught.value)
