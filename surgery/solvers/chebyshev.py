"""Chebyshev filters: a basis moved towards the leading eigenvectors of a symmetric matrix, without solving for them.

For a positive semidefinite G (n x n) whose eigenvalues to leave lie below ``cut``, and a basis B (n x r),

    B  <-  orth(T_p(2 G / cut - 1) B)        cost 2 p n^2 r

where the Chebyshev polynomial T_p stays within [-1, 1] on [0, cut] and grows faster than any other above it. So every
filter brings the basis nearer to the leading subspace by the gain ``T_p(2 lambda / cut - 1)`` of each eigenvalue lambda
kept, against at most 1 of those left (Zhou and Saad 2007, SIAM J. Sci. Comput. 29-4). Exact in the limit only.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["filter_basis", "filter_degree"]

_MAX_GAIN = 1e6  # beyond it float32 loses the smallest of what is kept


def filter_basis(matrix: Tensor, basis: Tensor, image: Tensor, *, cut: Tensor, degree: int) -> Tensor:
    """Return the orthonormal basis (..., n, r) of ``T_degree(2 G / cut - 1) B``.

    ``image`` is ``G B``, which the caller has for his Ritz values, and ``cut`` (...) is the end of what is left.
    """
    half = cut[..., None, None] / 2
    before, filtered = basis, image / half - basis
    for _ in range(degree - 1):
        before, filtered = filtered, (matrix @ (filtered * (2 / half))).sub_(before).sub_(filtered, alpha=2)
    return torch.linalg.qr(filtered).Q


def filter_degree(cut: Tensor, largest: Tensor, most: int) -> int:
    """Return the degree, or 0 where float32 could not hold even the gain ``2 largest / cut - 1`` of 1."""
    if not bool((cut > 0).all()):
        return 0
    gain = float((2 * largest / cut - 1).amax())
    return next((degree for degree in range(most, 0, -1) if 2 ** (degree - 1) * gain**degree < _MAX_GAIN), 0)
