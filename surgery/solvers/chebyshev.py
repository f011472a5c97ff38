"""Chebyshev filters: a basis moved towards the leading eigenvectors of a symmetric matrix, without solving for them.

For a positive semidefinite G (n x n) whose eigenvalues to leave lie below ``cut``, and a basis B (n x r),

    B  <-  orth(T_p(2 G / cut - 1) B)        cost 2 p n^2 r

where the Chebyshev polynomial T_p stays within [-1, 1] on [0, cut] and grows faster than any other above it. Every
filter brings the basis nearer to the leading subspace: it multiplies the part along an eigenvalue lambda to keep by
``T_p(2 lambda / cut - 1)``, and the parts to leave by at most 1 (Zhou and Saad 2007, SIAM J. Sci. Comput. 29-4). The
result is exact in the limit only.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["filter_basis", "filter_degree"]

_MAX_GAIN = 1e6  # beyond it float32 loses the smallest of what is kept


def filter_basis(matrix: Tensor, basis: Tensor, image: Tensor, *, cut: Tensor, degree: int) -> Tensor:
    """Return the orthonormal basis (..., n, r) of ``T_degree(2 G / cut - 1) B``.

    ``image`` is ``G B``, which the caller has already for the Ritz values. ``cut`` (...) is the upper end of the
    eigenvalues to leave.
    """
    # Invariant: with X = G / half - 1, ``before`` is T_(k-1)(X) B and ``filtered`` is T_k(X) B. The recurrence is
    # T_(k+1) = 2 X T_k - T_(k-1). Example: for cut = 2 the eigenvalue 4 has X = 3 and grows by T_2(3) = 2 * 9 - 1 = 17,
    # while all eigenvalues in [0, 2] have X in [-1, 1] and do not grow.
    half = cut[..., None, None] / 2
    before, filtered = basis, image / half - basis
    for _ in range(degree - 1):
        before, filtered = filtered, (matrix @ (filtered * (2 / half))).sub_(before).sub_(filtered, alpha=2)
    return torch.linalg.qr(filtered).Q


def filter_degree(cut: Tensor, largest: Tensor, most: int) -> int:
    """Return the highest usable degree; 0 if float32 cannot hold even the gain ``2 largest / cut - 1`` of degree 1."""
    if not bool((cut > 0).all()):
        return 0
    # For x >= 1, T_p(x) <= 2^(p-1) x^p. Example: T_2(3) = 17 <= 2 * 9 = 18.
    gain = float((2 * largest / cut - 1).amax())
    return next((degree for degree in range(most, 0, -1) if 2 ** (degree - 1) * gain**degree < _MAX_GAIN), 0)
