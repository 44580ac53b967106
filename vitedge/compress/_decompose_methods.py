"""The decompositions: a weight as the product of two thin matrices, by LAPACK, in float64 on the CPU.

What each method keeps, and where in Sun 2023 it stands, says `vitedge.compress.decompose`.
Shapes: O rows of a weight, I columns, K = min(O, I), R rank, N rows and columns of a square one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vitedge.errors import UsageError

if TYPE_CHECKING:
    from vitedge.compress.decompose import Method

Pair = tuple[torch.Tensor, torch.Tensor]
EIGEN_TOLERANCE = 1e-6  # of a matrix, that its eigenvalues and eigenvectors may miss it by


def reconstruction(method: Method, w_OI: torch.Tensor, rank: int) -> Pair:
    """Factors (O, R) and (R, I), float64, whose product the method has for a weight at that rank.

    Args:
        method: One of `METHODS`.
        w_OI: Finite.
        rank: 1 to min(O, I). For evd the most: a complex pair that goes beyond it is left out.

    Raises:
        UsageError: Another rank; for evd, a matrix that is not square, or rank 1 where every eigenvalue is complex.
        torch.linalg.LinAlgError: The method cannot factor the matrix: for cholesky the first R columns are dependent, for evd
            the eigenvectors.
    """
    outputs, inputs = w_OI.shape
    if not 1 <= rank <= min(outputs, inputs):
        raise UsageError(
            "decompose", expected=f"a rank from 1 to {min(outputs, inputs)}", found=str(rank), fix=f"choose one for {outputs} x {inputs}"
        )
    return METHODS[method](w_OI.detach().double().cpu(), rank)


def _svd(w_OI: torch.Tensor, rank: int) -> Pair:
    u_OK, sigma_K, v_KI = torch.linalg.svd(w_OI, full_matrices=False)
    return u_OK[:, :rank] * sigma_K[:rank], v_KI[:rank]


def _qr(w_OI: torch.Tensor, rank: int) -> Pair:
    q_OO, r_OI = torch.linalg.qr(w_OI, mode="complete")
    return q_OO[:, :rank], r_OI[:rank]


def _qr_reduced(w_OI: torch.Tensor, rank: int) -> Pair:
    q_OK, r_KI = torch.linalg.qr(w_OI, mode="reduced")
    return q_OK[:, :rank], r_KI[:rank]


def _qr_pivoted(w_OI: torch.Tensor, rank: int) -> Pair:
    """`W[:, order] = Q R`, by LAPACK's geqp3, which torch does not offer; the columns of R go back to their places."""
    from scipy.linalg import qr

    q_OK, r_KI, order_I = (torch.from_numpy(found.copy()) for found in qr(w_OI.numpy(), mode="economic", pivoting=True))
    right_RI = torch.empty_like(r_KI[:rank])
    right_RI[:, order_I.long()] = r_KI[:rank]
    return q_OK[:, :rank], right_RI


def _cod(w_OI: torch.Tensor, rank: int) -> Pair:
    """From the pivoted QR cut at its rank: `[R_1 S]^T = Z R_2`, and so `[R_1 S] = L Z^T` with L the transposed R_2."""
    q_OR, right_RI = _qr_pivoted(w_OI, rank)
    z_IR, r_RR = torch.linalg.qr(right_RI.T, mode="reduced")
    return q_OR @ r_RR.T, z_IR.T


def _lu(w_OI: torch.Tensor, rank: int) -> Pair:
    p_OO, l_OK, u_KI = torch.linalg.lu(w_OI)
    return (p_OO @ l_OK)[:, :rank], u_KI[:rank]


def _cholesky(w_OI: torch.Tensor, rank: int) -> Pair:
    """`C^T C = L L^T` for the first columns C: `Q = C L^-T` has orthonormal columns, and `Q^T W = L^-1 C^T W`."""
    first_OR = w_OI[:, :rank]
    normal_RI = first_OR.T @ w_OI
    l_RR = torch.linalg.cholesky(normal_RI[:, :rank])
    left_OR = torch.linalg.solve_triangular(l_RR.T, first_OR, upper=True, left=False)
    return left_OR, torch.linalg.solve_triangular(l_RR, normal_RI, upper=False)


def _evd(w_NN: torch.Tensor, rank: int) -> Pair:
    """A complex pair `l v w^T + its conjugate` is real: `2 (Re v Re(l w)^T - Im v Im(l w)^T)`, of rank 2."""
    if w_NN.shape[0] != w_NN.shape[1]:
        raise UsageError(
            "decompose", expected="a square matrix for evd", found=f"{w_NN.shape[0]} x {w_NN.shape[1]}", fix="choose another method"
        )
    values_N, vectors_NN = torch.linalg.eig(w_NN)
    rows_NN = values_N[:, None] * torch.linalg.inv(vectors_NN)
    # Eigenvectors that should be parallel come out a hair apart, so that inverting them need not fail.
    if not torch.linalg.matrix_norm((vectors_NN @ rows_NN).real - w_NN) <= EIGEN_TOLERANCE * torch.linalg.matrix_norm(w_NN):
        raise torch.linalg.LinAlgError("the eigenvectors are no basis: the matrix is not diagonalizable")
    left: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    for k in values_N.abs().argsort(descending=True, stable=True).tolist():
        imaginary = float(values_N[k].imag)
        if imaginary < 0 or len(left) + (2 if imaginary else 1) > rank:  # a pair is taken with the eigenvalue above the real axis
            continue
        left.append(vectors_NN[:, k].real)
        right.append(rows_NN[k].real * (2 if imaginary else 1))
        if imaginary:
            left.append(vectors_NN[:, k].imag)
            right.append(rows_NN[k].imag * -2)
    if not left:
        raise UsageError(
            "decompose", expected="a real eigenvalue, for evd of rank 1", found="complex pairs alone", fix="choose rank 2 or more"
        )
    return torch.stack(left, 1), torch.stack(right)


METHODS: dict[str, Callable[[torch.Tensor, int], Pair]] = {
    "svd": _svd,
    "qr": _qr,
    "qr_reduced": _qr_reduced,
    "qr_pivoted": _qr_pivoted,
    "cod": _cod,
    "lu": _lu,
    "cholesky": _cholesky,
    "evd": _evd,
}
