"""Truncated SVD of a batch of matrices through Gram matrices: ``M ~ left @ right``.

For M (m x n, m <= n) the leading eigenvectors U of the Gram matrix ``M M^T`` (m x m, accumulated in float64) span the
best rank-r subspace (Eckart-Young), and ``M ~ U (U^T M)`` is an exact projection whatever the accuracy of small
eigenvalues. It never builds an n x n matrix or a full set of singular vectors of the long side: cost m^2 n + m^3.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram", "leading_subspace", "low_rank", "singular_values"]


def gram(matrix: Tensor) -> Tensor:
    """Return ``M M^T`` in float64 for a batch of matrices (..., m, n)."""
    matrix = matrix.double()
    return matrix @ matrix.mT


def singular_values(matrix: Tensor) -> Tensor:
    """Return all min(m, n) singular values, descending, in float64, for a batch (..., m, n).

    Values below about 1e-8 of the largest are noise of the Gram matrix, and clamped at 0 from below.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.mT
    return torch.linalg.eigvalsh(gram(matrix)).clamp(min=0).sqrt().flip(-1)


def leading_subspace(gram_matrix: Tensor, rank: int) -> Tensor:
    """Return orthonormal eigenvectors (..., m, rank) of the largest eigenvalues of a batch of Gram matrices.

    In descending order of the eigenvalues: those of the negative matrix ascend, so that no copy has to flip them.
    """
    vectors: Tensor = torch.linalg.eigh(-gram_matrix).eigenvectors
    return vectors[..., :rank]


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (left, right) of shapes (..., m, rank), (..., rank, n) whose product is the best rank-r approximation.

    Balanced: the square root of each singular value is on both sides (Elhoushi et al. 2019 and later work do so for
    stable training). Computed in float64 and given back in float64; the caller casts.
    """
    matrix = matrix.double()
    if matrix.shape[-2] > matrix.shape[-1]:
        right, left = low_rank(matrix.mT, rank)
        return left.mT, right.mT
    basis = leading_subspace(gram(matrix), rank)
    projected = basis.mT @ matrix
    scale = torch.linalg.vector_norm(projected, dim=-1, keepdim=True).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return basis * scale.mT, projected / scale
