"""Pseudo-inverses by matrix products alone, which every runtime has, where a decomposition is in none.

Both iterations start from `Z = A^T / (||A||_1 ||A||_inf)`: `A Z` is then symmetric with eigenvalues from 0 to 1, so that
the residual `R = I - A Z` is a contraction on what A does not map to 0, and shrinks from there in each iteration by a known rule. What is
left of a singular value s after all of them depends on `1 - s^2 / (||A||_1 ||A||_inf)` alone: the smallest ones are not inverted
in full, which keeps float32 stable. Each matrix has its own start, so that an image's answer does not depend on others in its batch.
Shapes: M rows and columns; any axes before them.
"""

from __future__ import annotations

import torch


def scaled_transpose(a_MM: torch.Tensor) -> torch.Tensor:
    """`A^T / (||A||_1 ||A||_inf)`, the largest column sum times the largest row sum of absolute values."""
    size_MM = a_MM.abs()
    columns = size_MM.sum(-2, keepdim=True).amax(-1, keepdim=True)
    rows = size_MM.sum(-1, keepdim=True).amax(-2, keepdim=True)
    return a_MM.transpose(-2, -1) / columns / rows  # one by one: the product of two small sums may be 0 in float32


def third_order_inverse(a_MM: torch.Tensor, iterations: int) -> torch.Tensor:
    """Approximate pseudo-inverse, `Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4`.

    Xiong et al. 2021, "Nystroemformer" (arXiv:2102.03902), its section on the Moore-Penrose inverse, after Razavi et al. 2014. The
    residual becomes `(3 R^3 + R^4) / 4`. Four products of M^3 multiply-accumulates an iteration, and no identity matrix.

    Args:
        a_MM: The matrices.
        iterations: The paper's is 6, after which singular values down to about a thirtieth of the largest are inverted.
    """
    z_MM = scaled_transpose(a_MM)
    for _ in range(iterations):
        az_MM = a_MM @ z_MM
        inner_MM = 7 * az_MM - az_MM @ az_MM
        outer_MM = 15 * az_MM - az_MM @ inner_MM
        z_MM = 0.25 * (13 * z_MM - z_MM @ outer_MM)
    return z_MM


def newton_raphson_inverse(a_MM: torch.Tensor, iterations: int) -> torch.Tensor:
    """Approximate pseudo-inverse, `Z <- 2 Z - Z A Z`.

    Lu et al. 2021, "SOFT" (arXiv:2110.11945), section 3.2, after Ben-Israel and Cohen 1966. The residual becomes `R^2`. Two
    products of M^3 multiply-accumulates an iteration.

    Args:
        a_MM: The matrices.
        iterations: The paper's is 20, after which singular values down to about a thousandth of the largest are inverted.
    """
    z_MM = scaled_transpose(a_MM)
    for _ in range(iterations):
        z_MM = 2 * z_MM - z_MM @ (a_MM @ z_MM)
    return z_MM
