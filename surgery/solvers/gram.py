"""Truncated SVD of a batch of matrices through Gram matrices: ``M ~ left @ right``.

For M (m x n, m <= n) the leading eigenvectors U of the Gram matrix ``M M^T`` (m x m) span the best rank-r subspace
(Eckart-Young), and ``M ~ U (U^T M)`` is a projection, exact whatever the accuracy of small eigenvalues. It never builds
an n x n matrix or a full set of singular vectors of the long side: cost m^2 n + m^3.

float64 input is solved in float64. For float32 input float32 is ample while the truncated part has more energy than
rounding: Gram matrices in float32 resolve singular values down to about 3e-4 of the largest. Where less is truncated,
all is done again in float64, as it is at once where the matrix is small.

Up to a quarter of the full rank a random start and Chebyshev filters of the float32 Gram matrix take the place of its
eigendecomposition (Halko et al. 2011; Zhou and Saad 2007), at m^2 r for each product: ``T_p`` of the matrix, scaled so
that the eigenvalues to leave lie within [-1, 1], grows the others. A few more columns than r speed it up. It stops when
what is still to come, by the rate at which gains fall, is below a two-thousandth of the missed energy.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram", "leading_subspace", "low_rank", "singular_values"]

_FLOAT32_RESIDUAL = 3e-4  # share of the energy
_SMALL = 64  # up to here float64 costs no more
_FILTERED = 192  # up to here an eigendecomposition costs no more than filters
_DEGREE, _SHARE = 3, 0.95  # of a filter: the degree, and the share of the least Ritz value that is cut off
_MAX_GAIN = 1e6
_STEPS = 8
_TO_COME, _MAX_RATE = 5e-4, 0.9


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

    In the matrix's dtype, float32 or float64: of the best approximation's error, that of float64 is 1 up to rounding,
    and that of float32 at most about 1.001. Balanced: the square root of each singular value is on both sides (Elhoushi
    et al. 2019 and later work do so for stable training).
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        right, left = low_rank(matrix.mT, rank)
        return left.mT, right.mT
    low, high = matrix.amin((-2, -1), keepdim=True), matrix.amax((-2, -1), keepdim=True)
    peak = torch.maximum(-low, high).clamp(min=torch.finfo(matrix.dtype).tiny)  # squares must not overflow or vanish
    basis = _left_subspace(matrix, peak, rank)
    projected = basis.mT @ (matrix / peak).to(basis.dtype)
    values = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
    root = torch.where(values > 0, values, 1).sqrt()
    grown = peak.to(basis.dtype).sqrt()
    return (basis * (root.mT * grown)).to(matrix.dtype), (projected * (grown / root)).to(matrix.dtype)


def _left_subspace(matrix: Tensor, peak: Tensor, rank: int) -> Tensor:
    """Return leading left singular vectors (..., m, r); in float64 where they are asked for or float32 cannot do."""
    size = matrix.shape[-2]
    if matrix.dtype == torch.float32 and rank < size > _SMALL:
        vectors, missed = _float32_subspace(matrix, peak, rank)
        if missed >= _FLOAT32_RESIDUAL:
            return vectors
        del vectors
    return _leading(gram(matrix / peak), rank)[1]


def _float32_subspace(matrix: Tensor, peak: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return leading left singular vectors (..., m, r), and the least share of the energy that any of them misses."""
    size = matrix.shape[-2]
    scaled = matrix / peak
    gram_matrix = scaled @ scaled.mT
    del scaled  # the largest of what an eigendecomposition would find in memory
    total = gram_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    find = _filtered if size > _FILTERED and 4 * rank <= size else _leading
    values, vectors = find(gram_matrix, rank)
    missed = torch.where(total > 0, (total - values.sum(-1)) / total, 1)
    return vectors, float(missed.amin())


def _leading(gram_matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (..., r), descending, and their eigenvectors (..., m, r); spoils the matrix."""
    values, vectors = torch.linalg.eigh(gram_matrix.neg_())
    return -values[..., :rank], vectors[..., :rank]


def _filtered(gram_matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return nearly the largest eigenvalues and their eigenvectors, as ``_leading`` does, by Chebyshev filters."""
    size = gram_matrix.shape[-1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, rank + max(8, rank // 4), generator=generator).to(gram_matrix)
    basis = torch.linalg.qr(gram_matrix @ start).Q
    total = gram_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    kept, gain = torch.zeros_like(total), torch.zeros_like(total)
    for step in range(_STEPS):
        image = gram_matrix @ basis
        ritz, turn = _leading(basis.mT @ image, basis.shape[-1])
        before, gain = gain, ritz[..., :rank].sum(-1) - kept
        kept = kept + gain
        rate = (gain / before).clamp(0, _MAX_RATE)
        if step > 1 and bool((gain * rate <= _TO_COME * (1 - rate) * (total - kept)).all()):
            return ritz[..., :rank], basis @ turn[..., :rank]
        degree = _degree(_SHARE * ritz[..., -1], ritz[..., 0])
        if not degree:
            break
        basis = _filter(gram_matrix, basis, image, _SHARE * ritz[..., -1], degree)
    return _leading(gram_matrix, rank)


def _filter(gram_matrix: Tensor, basis: Tensor, image: Tensor, cut: Tensor, degree: int) -> Tensor:
    """Return an orthonormal basis of ``T_degree(2 G / cut - 1)`` applied to a basis whose image under G is known."""
    half = cut[..., None, None] / 2
    before, filtered = basis, image / half - basis
    for _ in range(degree - 1):
        before, filtered = filtered, 2 * (gram_matrix @ (filtered / half) - filtered) - before
    return torch.linalg.qr(filtered).Q


def _degree(cut: Tensor, largest: Tensor) -> int:
    """Return the degree of the filter; 0 where float32 could not hold even the gain ``2 largest / cut - 1`` of 1."""
    if not bool((cut > 0).all()):
        return 0
    gain = float((2 * largest / cut - 1).amax())
    return next((degree for degree in range(_DEGREE, 0, -1) if 2 ** (degree - 1) * gain**degree < _MAX_GAIN), 0)
