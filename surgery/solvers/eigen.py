"""Eigenvectors of symmetric matrices, in float32 too, where LAPACK's solver may not converge.

Divide and conquer (``syevd``) can fail in float32 where many eigenvalues are zero but for rounding; in float64 it does
not on the same matrix. So every eigendecomposition of a solver comes from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_eigen", "leading_subspace", "symmetric_eigen"]


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (..., n), ascending, and eigenvectors (..., n, n), in the dtype of the matrix.

    Takes 3 times the memory of a matrix beside it.
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

    Negates the matrix in place: its eigenvalues ascend then, and no copy of the vectors has to flip them.
    """
    values, vectors = symmetric_eigen(matrix.neg_())
    return -values[..., :count], vectors[..., :count]


def leading_subspace(matrix: Tensor, count: int) -> Tensor:
    """Return orthonormal eigenvectors (..., n, count) of the largest eigenvalues, in descending order of these."""
    return leading_eigen(matrix.clone(), count)[1]
