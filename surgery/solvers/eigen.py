"""Eigenvectors of symmetric matrices, also in float32, where LAPACK's solver may not converge.

Divide and conquer (``syevd``) can fail in float32 if many eigenvalues are zero apart from rounding. In float64 it does
not fail on the same matrix. Every eigendecomposition of a solver therefore comes from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_eigen", "leading_subspace", "symmetric_eigen"]


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (..., n), ascending, and eigenvectors (..., n, n), in the dtype of the matrix.

    This takes three times the memory of the matrix on top of it.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:
        if matrix.dtype == torch.float64:
            raise
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def leading_eigen(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (..., count), descending, and their eigenvectors (..., n, count).

    The matrix is negated in place: the wanted eigenvalues then come first, and no copy has to flip the vectors.
    """
    values, vectors = symmetric_eigen(matrix.neg_())
    return -values[..., :count], vectors[..., :count]


def leading_subspace(matrix: Tensor, count: int) -> Tensor:
    """Return orthonormal eigenvectors (..., n, count) of the largest eigenvalues, in descending order of these."""
    return leading_eigen(matrix.clone(), count)[1]
