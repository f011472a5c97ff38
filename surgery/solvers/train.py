"""Tensor trains of a batch of tensors by TT-SVD through Gram matrices (Oseledets 2011).

    T (g, n_1 .. n_N)  ~  product of cores (g, r_{k-1}, n_k, r_k),  r_0 = r_N = 1

From left to right, the matrix (r_{k-1} n_k) x (n_{k+1} .. n_N) of what is left is cut to rank r_k: leading eigenvectors
of the Gram matrix of its shorter side span the best subspace, the core is an orthonormal basis, and the coordinates in
it are left. A rank that is full costs no eigendecomposition, and cuts nothing. The squared error is the sum of what the
cuts lose, and the error at most root N - 1 times that of the best train. Cost of a cut of m x n, m <= n: m^2 n + m^3.

Every bond is balanced in the end: the root of each of its singular values is on both sides, which keeps the train as a
whole and trains stably. Gram matrices in float32 resolve singular values down to about 3e-4 of the largest, which is
ample while the cuts lose more than that; where they do not, all is done again in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.solvers.gram import leading_subspace

__all__ = ["cut", "round_train", "tensor_train", "train_tensor"]

_FLOAT32_RESIDUAL = 1e-3  # share of the energy


def tensor_train(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the cores (g, r_{k-1}, n_k, r_k) of a batch of tensors (g, n_1 .. n_N), in its dtype, float32 or float64.

    ``ranks`` are r_1 .. r_{N-1}; one above what a train can use is filled with zeros. TT-SVD, algorithm 1 of
    Oseledets 2011 (SIAM J. Sci. Comput. 33-5).
    """
    scaled, scale = _scaled(tensor)
    cores, values, missed = _cut_all(scaled, ranks)
    if tensor.dtype == torch.float32 and missed < _FLOAT32_RESIDUAL:
        cores, values, _ = _cut_all(scaled.double(), ranks)
    return [core.to(tensor.dtype) for core in _balanced(cores, values, scale)]


def round_train(cores: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Return the train cut to lower ranks r_1 .. r_{N-1}, without forming its tensor; in float64 inside.

    Right cores made orthonormal by QR, then cuts from left to right: algorithm 2 of Oseledets 2011. Cost N n r^3.
    """
    pairs = [_scaled(core.double()) for core in cores]
    parts, scale = [part for part, _ in pairs], torch.ones_like(pairs[0][1])
    for _, factor in pairs:
        scale = scale * factor
    for k in range(len(parts) - 1, 0, -1):
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
        left, rest = torch.eye(rows, dtype=matrix.dtype).expand(len(matrix), -1, -1), matrix
    elif kept == columns:
        left, rest = torch.linalg.qr(matrix)
    elif rows <= columns:
        left = _leading(matrix @ matrix.mT, kept)
        rest = left.mT @ matrix
    else:
        right = _leading(matrix.mT @ matrix, kept)
        left, rest = torch.linalg.qr(matrix @ right)
        rest = rest @ right.mT
    empty = rank - kept
    return F.pad(left, (0, empty)), F.pad(rest, (0, 0, 0, empty))


def _leading(gram: Tensor, rank: int) -> Tensor:
    try:
        return leading_subspace(gram, rank)
    except RuntimeError:  # float32 may not converge where many eigenvalues are zero but for rounding
        return leading_subspace(gram.double(), rank).to(gram.dtype)


def _scaled(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tensor over its largest entry, and that: squares must neither overflow nor vanish."""
    low, high = torch.aminmax(tensor)
    scale = torch.maximum(-low, high).clamp(min=torch.finfo(tensor.dtype).tiny)
    return tensor / scale, scale


def _cut_all(tensor: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], list[Tensor], float]:
    """Return cores, orthonormal but for the last, the singular values of bonds, and the share of the energy lost."""
    groups, *sizes = tensor.shape
    cores, values, rest, rows, lossy = [], [], tensor.flatten(1).unsqueeze(1), 1, False
    for size, rank in zip(sizes, ranks, strict=False):
        matrix = rest.reshape(groups, rows * size, -1)
        lossy |= rank < min(matrix.shape[1:])
        left, rest = cut(matrix, rank)
        cores.append(left.unflatten(1, (rows, size)))
        values.append(torch.linalg.vector_norm(rest, dim=2))
        rows = rank
    cores.append(rest.reshape(groups, rows, sizes[-1], 1))
    if not lossy:
        return cores, values, 1.0
    energies = [float(torch.linalg.vector_norm(part)) ** 2 for part in (rest, tensor)]
    return cores, values, 1 - energies[0] / energies[1] if energies[1] else 0.0


def _balanced(cores: Sequence[Tensor], values: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Put the root of each singular value of a bond on both sides, and an equal share of the scale in each core."""
    share = scale ** (1 / len(cores))
    roots = [torch.where(value > 0, value, 1.0).sqrt() for value in values]
    parts = [core * share for core in cores]
    for k, root in enumerate(roots):
        parts[k] = parts[k] * root[:, None, None]
        parts[k + 1] = parts[k + 1] / root[:, :, None, None]
    return parts
