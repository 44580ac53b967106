"""Pseudo-inverses by products: residuals shrink by the stated rules, singular matrices come out right, float32 bears many iterations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitedge.models.pseudo_inverse import newton_raphson_inverse, scaled_transpose, third_order_inverse

Inverse = Callable[[torch.Tensor, int], torch.Tensor]
THIRD_ORDER_LIMIT, NEWTON_RAPHSON_LIMIT = 12, 24  # of the techniques' settings


def rows_of_softmax(seed: int, size: int, sharpness: float) -> torch.Tensor:
    """Float64 (size, size), positive with rows that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(size, size, generator=generator, dtype=torch.float64)).softmax(-1)


def residual(a_MM: torch.Tensor, z_MM: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(a_MM), dtype=torch.float64) - a_MM @ z_MM


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 7), sharpness=st.floats(0.1, 5))
def test_the_start_is_a_contraction(seed: int, size: int, sharpness: float) -> None:
    a_MM = rows_of_softmax(seed, size, sharpness)
    start_MM = residual(a_MM, scaled_transpose(a_MM))
    torch.testing.assert_close(start_MM, start_MM.T, rtol=0, atol=1e-12)
    eigenvalues_M = torch.linalg.eigvalsh(start_MM)
    assert eigenvalues_M.min() >= -1e-12 and eigenvalues_M.max() <= 1 + 1e-12


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 7), sharpness=st.floats(0.1, 5), done=st.integers(0, 4))
def test_each_iteration_shrinks_the_residual_by_its_rule(seed: int, size: int, sharpness: float, done: int) -> None:
    a_MM = rows_of_softmax(seed, size, sharpness)
    before, after = (residual(a_MM, third_order_inverse(a_MM, iterations)) for iterations in (done, done + 1))
    cube = before @ before @ before
    torch.testing.assert_close(after, (3 * cube + cube @ before) / 4, rtol=0, atol=1e-9)
    before, after = (residual(a_MM, newton_raphson_inverse(a_MM, iterations)) for iterations in (done, done + 1))
    torch.testing.assert_close(after, before @ before, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("inverse", "iterations"), [(third_order_inverse, 12), (newton_raphson_inverse, 20)])
def test_a_matrix_without_full_rank_gets_its_pseudo_inverse(inverse: Inverse, iterations: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left_MM, right_MM = (torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    a_MM = left_MM @ torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)) @ right_MM
    wanted_MM = right_MM.T @ torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64)) @ left_MM.T
    torch.testing.assert_close(inverse(a_MM, iterations), wanted_MM, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inverse", [third_order_inverse, newton_raphson_inverse])
def test_a_matrix_does_not_depend_on_those_beside_it(inverse: Inverse) -> None:
    first, second = rows_of_softmax(1, 5, 2.0), 100 * rows_of_softmax(2, 5, 1.0)
    both = inverse(torch.stack([first, second])[None], 6)
    torch.testing.assert_close(both[0, 0], inverse(first, 6), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(both[0, 1], inverse(second, 6), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("inverse", "limit"), [(third_order_inverse, THIRD_ORDER_LIMIT), (newton_raphson_inverse, NEWTON_RAPHSON_LIMIT)])
def test_float32_bears_as_many_iterations_as_settings_allow(inverse: Inverse, limit: int) -> None:
    """On a matrix of which most singular values are far below what float32 can tell from 0."""
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(64, 2, generator=generator)
    a_MM = (x_MK @ x_MK.T).softmax(-1)
    z_MM = inverse(a_MM, limit)
    assert z_MM.isfinite().all()
    assert float((a_MM @ z_MM @ a_MM - a_MM).abs().max()) < 0.05
