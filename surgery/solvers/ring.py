"""Tensor rings of a batch of tensors: TR-SVD, then alternating least squares (Zhao et al. 2016, arXiv 1606.05535).

    T (g, n_0 .. n_{N-1})  ~  trace of the product of cores (g, r_k, n_k, r_{k+1}),  r_N = r_0

Start: TR-SVD from each mode that holds the ranks beside it (r_k r_{k+1} <= n_k; where none does, from the nearest to
it), and the best of them. It is exact where a mode holds just these and each rank after it is full; then nothing
follows. Otherwise sweeps: each core in turn is the least-squares solution with the others fixed, kept near to what it
was by a ridge at the level of rounding. The tensor is contracted with each half of the ring once a sweep, for all
cores of the other half; Gram matrices of what is fixed come from the cores alone, as products of transfer matrices (r
r) x (s s). Cost of a sweep of three cores n x k x n: 2 n^2 k R at the ends, R^3 for each core, for R = r_k r_{k+1}. A
core with R above 1024 stays as it is, and where transfer matrices would be too large there is no sweep.

Contractions are in the tensor's dtype, all else in float64. Where float32 would leave less than 0.1 % of the energy,
all is done again in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.solvers.train import cut

__all__ = ["ring_tensor", "tensor_ring"]

_FLOAT32_RESIDUAL = 1e-3  # share of the energy
_EXACT = 1e-24  # likewise
_RIDGE = {torch.float32: 1e-7, torch.float64: 1e-13}  # of the mean eigenvalue of a Gram matrix
_LARGEST = 1024
_MOST = 2**14  # the largest product of three ranks for which transfer matrices are multiplied


def tensor_ring(tensor: Tensor, ranks: Sequence[int], *, sweeps: int = 30, tolerance: float = 1e-3) -> list[Tensor]:
    """Return the cores (g, r_k, n_k, r_{k+1}) of a batch of tensors (g, n_0 .. n_{N-1}), N > 1, in its float dtype.

    ``ranks`` are r_0 .. r_{N-1}. Sweeps end with the first whose gain is below ``tolerance`` of the squared error;
    ``sweeps=0`` is TR-SVD, whose error depends on the signs of singular vectors. Cores have equal norms.
    """
    low, high = torch.aminmax(tensor)
    scale = torch.maximum(-low, high).clamp(min=torch.finfo(tensor.dtype).tiny)
    scaled = tensor / scale  # its squares must neither overflow nor vanish
    cores, missed = _start_and_sweep(scaled, ranks, sweeps, tolerance)
    if tensor.dtype == torch.float32 and missed < _FLOAT32_RESIDUAL:
        cores, _ = _start_and_sweep(scaled.double(), ranks, sweeps, tolerance)
    share = scale.double() ** (1 / len(cores))
    return [(core * share).to(tensor.dtype).contiguous() for core in _even(cores)]


def ring_tensor(cores: Sequence[Tensor]) -> Tensor:
    """Return the batch of tensors (g, n_0 .. n_{N-1}) of a ring."""
    first, *others = cores
    rows = first.transpose(1, 2).flatten(2)
    columns = _merged(others).permute(0, 3, 1, 2).flatten(1, 2)
    return (rows @ columns).unflatten(2, tuple(core.shape[2] for core in others))


def _start_and_sweep(tensor: Tensor, ranks: Sequence[int], sweeps: int, tolerance: float) -> tuple[list[Tensor], float]:
    """Return cores in float64, and the share of the energy that they miss."""
    total = float(torch.linalg.vector_norm(tensor)) ** 2 or 1.0
    cores, missed = _start(tensor, ranks, total)
    if math.prod(sorted(ranks)[-3:]) > _MOST:
        return cores, missed
    for _ in range(sweeps):
        if missed <= _EXACT:
            break
        before = missed
        cores, missed = _sweep(tensor, cores, total)
        if before - missed <= tolerance * missed:
            break
    return cores, missed


def _start(tensor: Tensor, ranks: Sequence[int], total: float) -> tuple[list[Tensor], float]:
    modes = range(len(ranks))
    room = [size / (ranks[k] * ranks[(k + 1) % len(ranks)]) for k, size in enumerate(tensor.shape[1:])]
    starts = []
    for first in modes:
        if room[first] >= min(1.0, max(room)):
            order = [(first + k) % len(ranks) for k in modes]
            cores = _ring_svd(tensor.permute(0, *(1 + k for k in order)), [ranks[k] for k in order])
            starts.append([cores[(k - first) % len(ranks)].double() for k in modes])
    losses = [float(torch.linalg.vector_norm(ring_tensor(cores) - tensor)) ** 2 / total for cores in starts]
    best = losses.index(min(losses))
    return starts[best], losses[best]


def _ring_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the cores of TR-SVD from the first mode, algorithm 1 of Zhao et al. 2016."""
    groups, first, rows = len(tensor), ranks[0], ranks[1]
    left, rest = cut(tensor.flatten(2), first * rows)
    cores = [left.unflatten(2, (first, rows)).transpose(1, 2)]
    rest = rest.unflatten(1, (first, rows)).movedim(1, -1)
    for size, rank in zip(tensor.shape[2:-1], ranks[2:], strict=True):
        left, rest = cut(rest.reshape(groups, rows * size, -1), rank)
        cores.append(left.unflatten(1, (rows, size)))
        rows = rank
    return [*cores, rest.reshape(groups, rows, tensor.shape[-1], first)]


def _sweep(tensor: Tensor, cores: list[Tensor], total: float) -> tuple[list[Tensor], float]:
    half = (len(cores) + 1) // 2
    matrix = tensor.flatten(half + 1).flatten(1, half)
    first, _ = _sweep_half(matrix, cores[:half], cores[half:], total)
    second, missed = _sweep_half(matrix.mT, cores[half:], first, total)
    return _even([*first, *second]), missed


def _sweep_half(
    matrix: Tensor, cores: Sequence[Tensor], others: Sequence[Tensor], total: float
) -> tuple[list[Tensor], float]:
    """Update the cores of the rows of a matrix; the others are those of its columns. Return the energy missed too."""
    updated, missed = list(cores), 1.0
    chain = _merged(others).to(matrix.dtype)
    image = matrix @ chain.transpose(1, 2).flatten(2)
    image = image.double().unflatten(2, (chain.shape[1], chain.shape[3])).permute(0, 3, 1, 2)
    for k, core in enumerate(cores):
        target = _target(image, updated[:k], core.shape[2], updated[k + 1 :])
        gram = _gram([*updated[k + 1 :], *others, *updated[:k]])
        if gram.shape[1] <= _LARGEST:
            updated[k] = _least_squares(target, gram, core, _RIDGE[matrix.dtype])
        rows = _rows(updated[k])
        missed = max(0.0, 1 - float((rows * (2 * _rows(target) - gram @ rows)).sum()) / total)
    return updated, missed


def _target(image: Tensor, before: Sequence[Tensor], size: int, after: Sequence[Tensor]) -> Tensor:
    """Return (g, r, size, s): the image (g, r_0, n_0 .. n_h, r_h) of the tensor times the cores beside one of them."""
    groups, first, _, last = image.shape
    left, right = (math.prod(core.shape[2] for core in cores) for cores in (before, after))
    image = image.reshape(groups, first * left, size, right * last)
    if after:
        image = (image.flatten(1, 2) @ _merged(after).flatten(2).mT).unflatten(1, (first * left, size))
    if before:
        image = (_merged(before).flatten(1, 2).mT @ image.flatten(2)).unflatten(2, tuple(image.shape[2:]))
    return image


def _merged(cores: Sequence[Tensor]) -> Tensor:
    """Return cores in a row as one (g, r, n_0 n_1 .., s)."""
    chain = cores[0]
    for core in cores[1:]:
        chain = (chain.flatten(1, 2) @ core.flatten(2)).view(len(core), chain.shape[1], -1, core.shape[3])
    return chain


def _gram(cores: Sequence[Tensor]) -> Tensor:
    """Return the Gram matrix (g, r s, r s) of all cores but one: those after it, round to those before it."""
    transfers = []
    for core in cores:
        rows = _rows(core)
        sizes = core.shape[1], core.shape[3]
        transfers.append((rows @ rows.mT).unflatten(2, sizes).unflatten(1, sizes).transpose(2, 3))
    after, before = cores[0].shape[1], cores[-1].shape[3]
    product = transfers[0].flatten(3).flatten(1, 2)
    for transfer in transfers[1:]:
        product = product @ transfer.flatten(3).flatten(1, 2)
    pairs = product.view(-1, after, after, before, before).permute(0, 3, 1, 4, 2)
    return pairs.reshape(-1, before * after, before * after)


def _rows(core: Tensor) -> Tensor:
    """Return a core (g, r, n, s) as (g, r s, n)."""
    return core.transpose(2, 3).flatten(1, 2)


def _least_squares(target: Tensor, gram: Tensor, core: Tensor, ridge: float) -> Tensor:
    """Return the core that solves ``gram core = target``, near to the present one where that leaves it open."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    weight = (ridge * mean).clamp(min=torch.finfo(gram.dtype).tiny)[:, None, None]
    ridged = gram + weight * torch.eye(gram.shape[1], dtype=gram.dtype)
    solved = torch.cholesky_solve(_rows(target) + weight * _rows(core), torch.linalg.cholesky(ridged))
    return solved.unflatten(1, (core.shape[1], core.shape[3])).transpose(2, 3)


def _even(cores: Sequence[Tensor]) -> list[Tensor]:
    """Give all cores the same norm, their geometric mean."""
    norms = torch.stack([torch.linalg.vector_norm(core.flatten(1), dim=1) for core in cores])
    norms = torch.where(norms > 0, norms, 1.0)
    shares = norms.log().mean(0).exp() / norms
    return [core * share[:, None, None, None] for core, share in zip(cores, shares, strict=True)]
