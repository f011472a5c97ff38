"""Tensor trains of a batch of tensors by TT-SVD through Gram matrices (Oseledets 2011).

    T (g, n_1 .. n_N)  ~  product of cores (g, r_{k-1}, n_k, r_k),  r_0 = r_N = 1

From left to right, the matrix (r_{k-1} n_k) x (n_{k+1} .. n_N) of what is left is cut to rank r_k. Leading eigenvectors
of the Gram matrix of its shorter side span the best subspace; the core is an orthonormal basis of it, and the
coordinates in that basis are what is left. A full rank costs no eigendecomposition and cuts nothing. The squared error
is the sum of what the cuts lose, and the error is at most root N - 1 times that of the best train. A cut of m x n,
m <= n, costs m^2 n + m^3.

Every bond is balanced in the end: the root of each of its singular values is on both sides. This leaves the whole train
as it is, and trains stably. The computation is in the tensor's dtype throughout (see ``gram.left_subspace``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.solvers.gram import left_subspace, normalised

__all__ = ["cut", "round_train", "tensor_train", "train_tensor"]


def tensor_train(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the cores (g, r_{k-1}, n_k, r_k) of a batch of tensors (g, n_1 .. n_N), in its dtype, float32 or float64.

    ``ranks`` are r_1 .. r_{N-1}; a rank above what a train can use is filled with zeros. This is TT-SVD, algorithm 1 of
    Oseledets 2011 (SIAM J. Sci. Comput. 33-5).
    """
    scaled, scale = normalised(tensor)
    cores, values = _cut_all(scaled, ranks)
    return _balanced(cores, values, scale.flatten())


def round_train(cores: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Return the train cut to lower ranks r_1 .. r_{N-1}, without forming its tensor; in float64 inside.

    The right cores are made orthonormal by QR, then cut from left to right: algorithm 2 of Oseledets 2011. The cost is
    N n r^3.
    """
    # Invariant of the cuts: cores before k have orthonormal columns and those after k orthonormal rows, so that a cut
    # of core k alone is the best cut of the whole tensor at its bond.
    pairs = [normalised(core.double()) for core in cores]
    parts, scale = [part for part, _ in pairs], torch.ones_like(pairs[0][1])
    for _, factor in pairs:
        scale = scale * factor
    for k in range(len(parts) - 1, 0, -1):
        # The core (g, r, n s) is R^T Q^T: the orthonormal rows stay, and R^T moves into the core before it.
        q, r = torch.linalg.qr(parts[k].flatten(2).mT)
        parts[k] = q.mT.unflatten(2, tuple(parts[k].shape[2:]))
        parts[k - 1] = parts[k - 1] @ r.mT.unsqueeze(1)
    values = []
    for k, rank in enumerate(ranks):
        left, rest = cut(parts[k].flatten(1, 2), rank)
        values.append(torch.linalg.vector_norm(rest, dim=2))
        parts[k] = left.unflatten(1, tuple(parts[k].shape[1:3]))
        parts[k + 1] = (rest @ parts[k + 1].flatten(2)).unflatten(2, tuple(parts[k + 1].shape[2:]))
    return [part.to(cores[0].dtype) for part in _balanced(parts, values, scale)]


def train_tensor(cores: Sequence[Tensor]) -> Tensor:
    """Return the batch of tensors (g, n_1 .. n_N) of a train."""
    product = cores[0].flatten(1, 2)
    for core in cores[1:]:
        product = (product @ core.flatten(2)).view(len(product), -1, core.shape[3])
    return product.view(len(product), *(core.shape[2] for core in cores))


def cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (left, rest) of shapes (g, m, rank), (g, rank, n) with ``left @ rest`` the best approximation of the rank.

    ``left`` has orthonormal columns, and both are zero beyond what m and n allow.
    """
    rows, columns = matrix.shape[1:]
    kept = min(rank, rows, columns)
    if kept == rows:
        left, rest = torch.eye(rows, dtype=matrix.dtype, device=matrix.device).expand(len(matrix), -1, -1), matrix
    elif kept == columns:
        left, rest = torch.linalg.qr(matrix)
    elif rows <= columns:
        left = left_subspace(matrix, kept)
        rest = left.mT @ matrix
    else:
        right = left_subspace(matrix.mT, kept)
        # M ~ (M V) V^T = Q (R V^T), so that the left side is orthonormal although V came from the right.
        left, rest = torch.linalg.qr(matrix @ right)
        rest = rest @ right.mT
    empty = rank - kept
    return F.pad(left, (0, empty)), F.pad(rest, (0, 0, 0, empty))


def _cut_all(tensor: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return cores, all orthonormal except the last, and the singular values of the bonds."""
    # Invariant: the cores so far, times ``rest`` (g, r_k, n_{k+1} .. n_N), are the tensor cut at the bonds so far.
    # Example of 4 x 5 x 6 at ranks 2 and 3: 4 x 30 becomes (4 x 2)(2 x 30), then (2 5) x 6 becomes (10 x 3)(3 x 6).
    groups, *sizes = tensor.shape
    cores, values, rest, rows = [], [], tensor, 1
    for size, rank in zip(sizes, ranks, strict=False):
        left, rest = cut(rest.reshape(groups, rows * size, -1), rank)
        cores.append(left.unflatten(1, (rows, size)))
        values.append(torch.linalg.vector_norm(rest, dim=2))
        rows = rank
    return [*cores, rest.reshape(groups, rows, sizes[-1], 1)], values


def _balanced(cores: Sequence[Tensor], values: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Put the root of each singular value of a bond on both sides, and an equal share of the scale in each core."""
    share = scale ** (1 / len(cores))
    roots = [torch.where(value > 0, value, 1.0).sqrt() for value in values]
    parts = [core * share for core in cores]
    for k, root in enumerate(roots):
        parts[k] = parts[k] * root[:, None, None]
        parts[k + 1] = parts[k + 1] / root[:, :, None, None]
    return parts
