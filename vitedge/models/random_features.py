"""Positive orthogonal random features: vectors whose inner products estimate `exp(q . k)` without bias.

Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv:2009.14794): lemma 1 has
`exp(q . k) = E[exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)]` for a normal w, and section 2.4 draws the w orthogonal, with the
lengths of normal vectors, which keeps each of them normal and lowers the variance. Shapes: N tokens, K width, M features.
"""

from __future__ import annotations

import math

import torch


def draw_directions(width: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """The vectors w as columns, float32 (K, M): orthogonal within every K of them, each as long as a normal vector is.

    Args:
        width: K.
        count: M.
        generator: Gives the random numbers, on the CPU.
    """
    groups = math.ceil(count / width)
    q_GKK, r_GKK = torch.linalg.qr(torch.randn(groups, width, width, generator=generator, dtype=torch.float64))
    # LAPACK's choice of signs is no random one: with those of R's diagonal taken out, directions are even over the sphere.
    q_GKK = q_GKK * torch.where(r_GKK.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :]
    directions_KM = q_GKK.permute(1, 0, 2).reshape(width, groups * width)[:, :count]
    lengths_M = torch.linalg.vector_norm(torch.randn(width, count, generator=generator, dtype=torch.float64), dim=0)
    return (directions_KM * lengths_M).float()


def log_features(x_NK: torch.Tensor, directions_KM: torch.Tensor) -> torch.Tensor:
    """`w . x - |x|^2 / 2`, the logarithms of the features but for the factor `1 / sqrt(M)`; any axes before N."""
    return x_NK @ directions_KM - 0.5 * x_NK.square().sum(-1, keepdim=True)
