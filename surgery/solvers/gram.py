"""Truncated SVD of a batch of matrices through Gram matrices: ``M ~ left @ right``.

For M (m x n, m <= n) the leading eigenvectors U of the Gram matrix ``M M^T`` (m x m) span the best rank-r subspace
(Eckart-Young), and ``M ~ U (U^T M)`` is a projection, exact whatever the accuracy of small eigenvalues. No n x n matrix
and no full set of singular vectors of the long side is ever built: the cost is m^2 n + m^3.

float64 input is solved in float64, and so are small matrices. Gram matrices in float32 resolve singular values down to
about 3e-4 of the largest, which is ample while the truncated part has more energy than rounding. If less is truncated,
the vectors that are resolved are improved by a step of orthogonal iteration, ``orth(M (M^T U))``, which does not square
the matrix twice. They are then taken out of the matrix; the rest has its own scale, and the same is done to it. In this
way float32 suffices to its own accuracy, in half of the time and memory of float64.

Up to a quarter of the full rank, a random start and Chebyshev filters of the float32 Gram matrix replace its
eigendecomposition (Halko et al. 2011), at m^2 r for each product. A few more columns than r speed this up. It stops
when what is still to come, by the rate at which gains fall, is below a two-thousandth of the missed energy.

Matrices are brought to a scale at which the squares of entries neither overflow nor vanish, whatever the unit of a
weight.

Divide and conquer (``syevd``) can fail in float32 if many eigenvalues are zero apart from rounding. In float64 it does
not fail on the same matrix. Every eigendecomposition of a solver therefore comes from here.
"""

from __future__ import annotations

import math

import torch
from scipy.linalg import eigh, eigvalsh
from torch import Tensor

from surgery.solvers.chebyshev import filter_basis, filter_degree
from surgery.solvers.threads import torchs_threads
from surgery.system.mapped import drop_pages

__all__ = [
    "gram",
    "leading_eigen",
    "leading_subspace",
    "left_subspace",
    "low_rank",
    "normalised",
    "row_gram",
    "singular_values",
    "symmetric_eigen",
]

_SAFE = 2.0**-40, 2.0**40  # largest entries for which sums of squares are far from the ends of float32


def normalised(tensor: Tensor, *, groups: int = 0) -> tuple[Tensor, Tensor]:
    """Return the tensor over its largest magnitude, and that magnitude; or the tensor itself, not a copy, and 1.

    The second is returned if the squares are within range as they are. The first ``groups`` axes have their own scales:
    the magnitude has one entry for each group, and extent 1 elsewhere.
    """
    axes = tuple(range(groups, tensor.dim()))
    low, high = tensor.amin(axes, keepdim=True), tensor.amax(axes, keepdim=True)
    peak = torch.maximum(-low, high)
    if all(value == 0 or _SAFE[0] < value < _SAFE[1] for value in peak.flatten().tolist()):
        return tensor, torch.ones_like(peak)
    peak.clamp_(min=torch.finfo(tensor.dtype).tiny)
    return tensor / peak, peak


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

    The matrix is overwritten. It is negated: the wanted eigenvalues come first then, and no copy flips the vectors.
    """
    matrix.neg_()
    values, vectors = _overwriting(matrix) if _is_large(matrix) else symmetric_eigen(matrix)
    return -values[..., :count], vectors[..., :count]


def _is_large(matrix: Tensor) -> bool:
    """Whether a matrix in float64 is so large that a decomposition has to take its place, for torch makes a copy."""
    size = matrix.shape[-1]
    one = matrix.numel() == size**2 and matrix.is_contiguous()
    return one and size >= _OVERWRITTEN and matrix.dtype == torch.float64 and matrix.device.type == "cpu"


def _overwriting(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``symmetric_eigen`` does, in the memory of the matrix and twice as much."""
    size = matrix.shape[-1]
    # The transpose is the same matrix, in the order of LAPACK.
    with torchs_threads():
        found = eigh(matrix.detach().view(size, size).numpy().T, overwrite_a=True, check_finite=False, driver="evd")
    values, vectors = map(torch.from_numpy, found)
    return values.view(matrix.shape[:-1]), vectors.expand(matrix.shape)


def leading_subspace(matrix: Tensor, count: int) -> Tensor:
    """Return orthonormal eigenvectors (..., n, count) of the largest eigenvalues, in descending order of these."""
    return leading_eigen(matrix.clone(), count)[1]


_MISSED = 3e-4  # share of the energy that float32 Gram matrices are sure to see
_RESOLVED = 1e-4  # share of the largest eigenvalue, likewise
_ROUNDING = 1e-13  # share of the energy that float32 matrices do not have
_SMALL = 64  # up to here float64 costs no more
_FILTERED = 192  # up to here an eigendecomposition costs no more than filters
_OVERWRITTEN = 1024  # from this size on, memory counts
_HALVES = 256  # from half of this size on, a quarter of a Gram matrix is copied from its mirror image
_BLOCK = 2**20  # entries that are cast to float64 at once
_DEGREE, _SHARE = 3, 0.95  # of a filter: the degree, and the share of the least Ritz value that is cut off
_STEPS = 8
_TO_COME, _MAX_RATE = 5e-4, 0.9


def gram(matrix: Tensor) -> Tensor:
    """Return ``M M^T`` in float64 for a batch of matrices (..., m, n); only some columns are cast at a time."""
    # M M^T is the sum of B B^T over blocks B of columns; a block of the batch has at most _BLOCK entries.
    columns = max(1, _BLOCK * matrix.shape[-1] // max(1, matrix.numel()))
    if matrix.dtype == torch.float64 or columns >= matrix.shape[-1]:
        matrix = matrix.double()
        return matrix @ matrix.mT
    *batch, rows, _ = matrix.shape
    total = matrix.new_zeros(math.prod(batch), rows, rows, dtype=torch.float64)
    for block in matrix.split(columns, dim=-1):
        wide = block.double().reshape(len(total), rows, -1)
        total.baddbmm_(wide, wide.mT)  # in place: the product by itself would be as large again
    return total.view(*batch, rows, rows)


def row_gram(matrix: Tensor) -> Tensor:
    """Return ``M M^T`` in the dtype of M, for a batch (..., m, n); a quarter of a large one is a mirror image."""
    size = matrix.shape[-2]
    half = size // 2
    if half < _HALVES:
        return matrix @ matrix.mT
    upper, lower = matrix[..., :half, :], matrix[..., half:, :]
    product = matrix.new_empty(*matrix.shape[:-1], size)
    product[..., :half, :half] = upper @ upper.mT
    product[..., half:, half:] = lower @ lower.mT
    product[..., half:, :half] = lower @ upper.mT
    product[..., :half, half:] = product[..., half:, :half].mT
    return product


def singular_values(matrix: Tensor) -> Tensor:
    """Return all min(m, n) singular values, descending, in float64, for a batch (..., m, n).

    Values below about 1e-8 of the largest are noise of the Gram matrix; those below 0 are set to 0.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.mT
    squares = gram(matrix)
    drop_pages()  # of the matrix, where it stands in a file
    return _eigenvalues(squares).clamp(min=0).sqrt().flip(-1)


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Return the eigenvalues (..., n), ascending; a large matrix is overwritten."""
    if not _is_large(matrix):
        return torch.linalg.eigvalsh(matrix)
    size = matrix.shape[-1]
    with torchs_threads():
        found = eigvalsh(matrix.detach().view(size, size).numpy().T, overwrite_a=True, check_finite=False, driver="evd")
    return torch.from_numpy(found).view(matrix.shape[:-1])


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (left, right) of shapes (..., m, rank), (..., rank, n) whose product is the best rank-r approximation.

    Both are in the matrix's dtype. The error over that of the best approximation is 1 up to rounding in float64, and at
    most about 1.001 in float32. The factors are balanced: the square root of each singular value is on both sides
    (Elhoushi et al. 2019 and later work do so for stable training).
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        right, left = low_rank(matrix.mT, rank)
        return left.mT, right.mT
    if matrix.dtype != torch.float64 and matrix.shape[-2] <= _SMALL:
        left, right = low_rank(matrix.double(), rank)
        return left.to(matrix.dtype), right.to(matrix.dtype)
    scaled, peak = normalised(matrix, groups=matrix.dim() - 2)
    basis = left_subspace(scaled, rank)
    projected = basis.mT @ scaled
    values = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
    # A singular value of 4 puts 2 on each side. The scale that was divided out goes back in the same way.
    root = torch.where(values > 0, values, 1).sqrt()
    grown = peak.sqrt()
    return basis * (root.mT * grown), projected.mul_(grown / root)


def left_subspace(matrix: Tensor, rank: int) -> Tensor:
    """Return leading left singular vectors (..., m, rank) of a batch (..., m, n), m <= n, in its dtype.

    The squares of its entries must be within the dtype's range.
    """
    size = matrix.shape[-2]
    if matrix.dtype == torch.float64 or size <= _SMALL:
        return leading_eigen(gram(matrix), rank)[1].to(matrix.dtype)
    if rank == size:
        return leading_eigen(row_gram(matrix), rank)[1]
    squares = matrix @ matrix.mT  # whose blocks would cost as much memory again
    drop_pages()  # as above
    vectors, resolved = _subspace(squares, rank)
    return vectors if resolved is None else _deflated(matrix, vectors, resolved)


def _deflated(matrix: Tensor, vectors: Tensor, resolved: int) -> Tensor:
    """Return all leading vectors, given rough ones of which a Gram matrix has resolved only the first few."""
    # Invariant: ``basis`` is orthonormal and accurate, and ``rest`` is what is orthogonal to it. Example: of singular
    # values 1, 1e-2, 1e-6 and 1e-7 a float32 Gram matrix resolves two; the rest has the largest value 1e-6, so that its
    # own Gram matrix resolves the other two.
    rank, energy, basis = vectors.shape[-1], _squares(matrix), vectors[..., :0]
    while True:
        rest = _without(matrix, basis)
        improved = torch.linalg.qr(rest @ (rest.mT @ vectors[..., :resolved])).Q
        basis, vectors = torch.linalg.qr(torch.cat([basis, improved], -1)).Q, vectors[..., resolved:]
        if basis.shape[-1] == rank:
            return basis
        rest = _without(matrix, basis)
        if bool((_squares(rest) <= _ROUNDING * energy).all()):
            break
        rest = row_gram(rest)
        vectors, found = _subspace(rest, rank - basis.shape[-1])
        if found is None:
            break
        resolved = found
    return torch.linalg.qr(torch.cat([basis, vectors], -1)).Q


def _without(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return what is orthogonal to a basis of columns; the matrix itself if the basis is empty."""
    return matrix - basis @ (basis.mT @ matrix) if basis.shape[-1] else matrix


def _squares(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1)).square()


def _subspace(gram_matrix: Tensor, rank: int) -> tuple[Tensor, int | None]:
    """Return leading eigenvectors, and how many of them are resolved; None if all are close enough to the best."""
    size = gram_matrix.shape[-1]
    total = gram_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    find = _filtered if size > _FILTERED and 4 * rank <= size else leading_eigen
    values, vectors = find(gram_matrix, rank)
    # The trace is the sum of all eigenvalues, so that the energy missed needs only those that were found.
    missed = torch.where(total > 0, (total - values.sum(-1)) / total, 1)
    if bool((missed >= _MISSED).all()):
        return vectors, None
    sure = (values > _RESOLVED * values[..., :1]).sum(-1).masked_fill(missed >= _MISSED, rank)
    return vectors.clone(), max(1, int(sure.amin()))  # a clone, since the others of an eigendecomposition go with it


def _filtered(gram_matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return nearly the largest eigenvalues and their eigenvectors, as ``leading_eigen`` does, by Chebyshev filters."""
    size = gram_matrix.shape[-1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, rank + max(8, rank // 4), generator=generator, device="cpu").to(gram_matrix)
    basis = torch.linalg.qr(gram_matrix @ start).Q
    total = gram_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    kept, gain = torch.zeros_like(total), torch.zeros_like(total)
    # Invariant: ``kept`` is the energy that the best r Ritz vectors hold. Gains fall by a steady rate q, so
    # that gain * q / (1 - q) is still to come. Example: gains of 8, then 4 have q = 1/2, and 2 + 1 + ... = 4 to come.
    for step in range(_STEPS):
        image = gram_matrix @ basis
        ritz, turn = leading_eigen(basis.mT @ image, basis.shape[-1])
        before, gain = gain, ritz[..., :rank].sum(-1) - kept
        kept = kept + gain
        rate = (gain / before).clamp(0, _MAX_RATE)
        missed = torch.maximum(total - kept, _MISSED * total)
        if step > 1 and bool((gain * rate <= _TO_COME * (1 - rate) * missed).all()):
            return ritz[..., :rank], basis @ turn[..., :rank]
        cut = _SHARE * ritz[..., -1]
        degree = filter_degree(cut, ritz[..., 0], _DEGREE)
        if not degree:
            break
        basis = filter_basis(gram_matrix, basis, image, cut=cut, degree=degree)
    return leading_eigen(gram_matrix, rank)
