"""Random features: directions are orthogonal, even over the sphere and as long as normal vectors, and products estimate the exponential."""

from __future__ import annotations

import pytest
import torch

from vitedge.models.random_features import draw_directions, log_features

MANY = 20_000


def draw(width: int, count: int, seed: int = 0) -> torch.Tensor:
    return draw_directions(width, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "count"), [(4, 4), (8, 3), (4, 11), (64, 64), (1, 5)])
def test_directions_are_orthogonal_within_every_width_of_them(width: int, count: int) -> None:
    directions_KM = draw(width, count)
    assert directions_KM.shape == (width, count) and directions_KM.dtype == torch.float32
    for group in torch.nn.functional.normalize(directions_KM.double(), dim=0).split(width, dim=1):
        torch.testing.assert_close(group.T @ group, torch.eye(group.shape[1], dtype=torch.float64), rtol=0, atol=1e-6)


def test_directions_are_normal_one_by_one() -> None:
    """Mean 0 in every coordinate, which LAPACK's signs alone would not give, and squared lengths as chi-squared has them."""
    directions_KM = draw(4, MANY).double()
    assert directions_KM.mean(1).abs().max() < 0.05
    squares_M = directions_KM.square().sum(0)
    assert abs(float(squares_M.mean()) - 4) < 0.15 and abs(float(squares_M.var()) - 8) < 1


def test_the_same_seed_gives_the_same_directions() -> None:
    assert torch.equal(draw(6, 20, seed=3), draw(6, 20, seed=3))
    assert not torch.equal(draw(6, 20, seed=3), draw(6, 20, seed=4))


def test_products_of_features_estimate_the_exponential_of_a_product() -> None:
    generator = torch.Generator().manual_seed(1)
    q_NK, k_NK = torch.nn.functional.normalize(torch.randn(2, 5, 4, generator=generator, dtype=torch.float64), dim=-1) * 0.7
    directions_KM = draw(4, MANY).double()
    q_NM, k_NM = (log_features(x_NK, directions_KM).exp() / MANY**0.5 for x_NK in (q_NK, k_NK))
    # One estimate's standard deviation is at most 1.8 % of it: sqrt((exp(|q + k|^2) - 1) / M).
    torch.testing.assert_close(q_NM @ k_NM.T, (q_NK @ k_NK.T).exp(), rtol=0.1, atol=0)
