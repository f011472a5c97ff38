"""Tensor rings of a batch of tensors: TR-SVD, then alternating least squares (Zhao et al. 2016, arXiv 1606.05535).

    T (g, n_0 .. n_{N-1})  ~  trace of the product of cores (g, r_k, n_k, r_{k+1}),  r_N = r_0

A bond that is full for one of its two cores, as r_k = r_{k-1} n_{k-1} is, constrains nothing: the two modes are treated
as one until the end, when an identity splits their core again.

The start is TR-SVD from the smallest mode that holds both of its ranks (r_k r_{k+1} <= n_k), or from the one closest to
that if there is none. The start is exact if the mode holds just these ranks and each rank after it is full; then
nothing follows. Nothing follows either if a system of equations would have more than 1024 unknowns; then all such modes
are tried. Otherwise come sweeps: each core in turn is the least-squares solution with the others fixed, kept near to
what it was by a ridge at the level of rounding. The tensor is contracted with each half of the ring once a sweep, for
all cores of the other half. Gram matrices of what is fixed come from the cores alone, as products of transfer matrices
(r r) x (s s). A sweep of three cores n x k x n costs 2 n^2 k R at the ends and R^3 for each core, for R = r_k r_{k+1}.

Contractions are in the tensor's dtype, systems of equations in float64. If less than 0.1 % of the energy is left,
float32 contractions would say too little about it, and the sweeps go on in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.solvers.gram import normalised
from surgery.solvers.train import cut

__all__ = ["ring_tensor", "tensor_ring"]

_FLOAT32_RESIDUAL = 1e-3  # share of the energy
_EXACT = 1e-24  # likewise
_LARGEST = 1024  # system of equations
_RIDGE = {torch.float32: 1e-7, torch.float64: 1e-13}  # of the mean eigenvalue of a Gram matrix


def tensor_ring(tensor: Tensor, ranks: Sequence[int], *, sweeps: int = 10, tolerance: float = 1e-3) -> list[Tensor]:
    """Return the cores (g, r_k, n_k, r_{k+1}) of a batch of tensors (g, n_0 .. n_{N-1}), N > 1, in its float dtype.

    ``ranks`` are r_0 .. r_{N-1}. Sweeps end with the first whose gain is below ``tolerance`` of the squared error;
    ``sweeps=0`` is TR-SVD, whose error depends on the signs of singular vectors. Cores have equal norms.
    """
    scaled, scale = normalised(tensor)
    share = scale.double().flatten() ** (1 / len(ranks))
    cores = _even(_ring(scaled, list(ranks), sweeps, tolerance))
    return [(core * share).to(tensor.dtype).contiguous() for core in cores]


def ring_tensor(cores: Sequence[Tensor]) -> Tensor:
    """Return the batch of tensors (g, n_0 .. n_{N-1}) of a ring."""
    first, *others = cores
    rows = first.transpose(1, 2).flatten(2)
    columns = _merged(others).permute(0, 3, 1, 2).flatten(1, 2)
    return (rows @ columns).unflatten(2, tuple(core.shape[2] for core in others))


def _ring(tensor: Tensor, ranks: list[int], sweeps: int, tolerance: float) -> list[Tensor]:
    """Return cores in float64; a pair of modes whose bond is full for one of them is solved for as one."""
    sizes = tensor.shape[1:]
    for k in range(1, len(ranks)) if len(ranks) > 2 else ():
        # Example of ranks (2, 8, 3) and sizes (4, 5, 6): bond 1 has 8 = 2 * 4, and is full. The ring (20, 6) of ranks
        # (2, 3) is solved; its core (2, 20, 3), seen as 8 x 15, is an identity (2, 4, 8) and the rest (8, 5, 3).
        before, after = ranks[k - 1] * sizes[k - 1], sizes[k] * ranks[(k + 1) % len(ranks)]
        if ranks[k] >= min(before, after):
            cores = _ring(tensor.flatten(k, k + 1), ranks[:k] + ranks[k + 1 :], sweeps, tolerance)
            pair = cores[k - 1].flatten(2).reshape(len(tensor), before, after)
            left, right = cut(pair, ranks[k])
            left, right = left.unflatten(1, (-1, sizes[k - 1])), right.unflatten(2, (sizes[k], -1))
            return [*cores[: k - 1], left, right, *cores[k:]]
    return _start_and_sweep(tensor, ranks, sweeps, tolerance)


def _start_and_sweep(tensor: Tensor, ranks: Sequence[int], sweeps: int, tolerance: float) -> list[Tensor]:
    total = float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 or 1.0
    largest = max(before * after for before, after in zip(ranks, [*ranks[1:], ranks[0]], strict=True))
    sweeps = sweeps if largest <= _LARGEST else 0
    cores, missed = _start(tensor, ranks, total, swept=sweeps > 0)
    for _ in range(sweeps):
        if missed <= _EXACT:
            break
        if missed < _FLOAT32_RESIDUAL:
            tensor = tensor.double()
        before = missed
        cores, missed = _sweep(tensor, cores, total)
        if before - missed <= tolerance * missed:
            break
    return cores


def _start(tensor: Tensor, ranks: Sequence[int], total: float, *, swept: bool) -> tuple[list[Tensor], float]:
    """Return the cores of TR-SVD in float64, filled to their ranks, and the share of the energy that they miss."""
    count, sizes = len(ranks), tensor.shape[1:]
    # A mode of room 1 or more holds its two ranks. Where none does, only the roomiest is left to choose.
    room = [size / (ranks[k] * ranks[(k + 1) % count]) for k, size in enumerate(sizes)]
    choices = sorted((k for k in range(count) if room[k] >= min(1.0, max(room))), key=lambda k: sizes[k])
    starts = []
    for first in choices[:1] if swept else choices:
        # A ring has no beginning. Example: of 3 modes from the second, the order is 1, 2, 0, and
        # mode 0 has the core at 2.
        order = [(first + k) % count for k in range(count)]
        cores, lost = _ring_svd(tensor.permute(0, *(1 + k for k in order)), [ranks[k] for k in order])
        starts.append((lost / total, [cores[(k - first) % count] for k in range(count)]))
    lost, cores = min(starts, key=lambda start: start[0])
    return cores, lost


def _ring_svd(tensor: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], float]:
    """Return the cores of TR-SVD from the first mode, algorithm 1 of Zhao et al. 2016, and the energy they lose.

    A first bond that the mode cannot hold is filled with random vectors on one side and zeros on the other. That
    changes nothing, and gives the sweeps something to use.
    """
    # Invariant: the cores so far, times ``rest``, are the tensor cut so far. Example of ranks 2, 3, 2 for 6 x 4 x 5:
    # the matrix 6 x 20 is cut to rank 2 * 3, whose two parts are the bonds; (3 4) x (5 2) to rank 2; and 2 x 5 x 2 is
    # left.
    groups, rows = len(tensor), ranks[1]
    matrix = tensor.flatten(2)
    first = min(ranks[0], -(-min(matrix.shape[1:]) // rows))
    left, rest, lost = _cut(matrix, first * rows)
    cores = [left.unflatten(2, (first, rows)).transpose(1, 2)]
    rest = rest.unflatten(1, (first, rows)).movedim(1, -1)
    for size, rank in zip(tensor.shape[2:-1], ranks[2:], strict=True):
        left, rest, more = _cut(rest.reshape(groups, rows * size, -1), rank)
        cores.append(left.unflatten(1, (rows, size)))
        rows, lost = rank, lost + more
    # A bond cut short is filled: zeros in the last core meet the random vectors in the first, and add nothing.
    cores.append(F.pad(rest.reshape(groups, rows, tensor.shape[-1], first), (0, ranks[0] - first)))
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(groups, ranks[0] - first, *cores[0].shape[2:], generator=generator, device="cpu")
    cores[0] = torch.cat([cores[0], extra.to(tensor) / math.sqrt(tensor.shape[1])], 1)
    return [core.double() for core in cores], lost


def _cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the two sides of a cut, and the energy that it loses."""
    left, rest = cut(matrix, rank)
    if rank >= min(matrix.shape[1:]):
        return left, rest, 0.0
    before, after = (float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in (matrix, rest))
    return left, rest, max(0.0, before - after)


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
    # (g, r_h, columns, r_0)
    chain = _merged(others).to(matrix.dtype)
    # (g, rows, columns) @ (g, columns, r_h r_0) -> (g, rows, r_h r_0) -> (g, r_0, rows, r_h)
    image = matrix @ chain.transpose(1, 2).flatten(2)
    image = image.unflatten(2, (chain.shape[1], chain.shape[3])).permute(0, 3, 1, 2)
    for k, core in enumerate(cores):
        target = _target(image, updated[:k], core.shape[2], updated[k + 1 :]).double()
        gram = _gram([*updated[k + 1 :], *others, *updated[:k]])
        updated[k] = _least_squares(target, gram, core, _RIDGE[matrix.dtype])
        if k == len(cores) - 1:
            # |T - X|^2 = |T|^2 - 2 <X, target> + <X, gram X>
            rows = _rows(updated[k])
            missed = max(0.0, 1 - float((rows * (2 * _rows(target) - gram @ rows)).sum()) / total)
    return updated, missed


def _target(image: Tensor, before: Sequence[Tensor], size: int, after: Sequence[Tensor]) -> Tensor:
    """Return (g, r, size, s): the image (g, r_0, n_0 .. n_h, r_h) of the tensor times all cores of the half but one."""
    groups, first, _, last = image.shape
    left, right = (math.prod(core.shape[2] for core in cores) for cores in (before, after))
    image = image.reshape(groups, first * left, size, right * last)
    if after:
        # (g, r_0 left size, right r_h) @ (g, right r_h, s)
        image = (image.flatten(1, 2) @ _merged(after).to(image.dtype).flatten(2).mT).unflatten(1, (first * left, size))
    if before:
        # (g, r, r_0 left) @ (g, r_0 left, size s)
        image = (_merged(before).to(image.dtype).flatten(1, 2).mT @ image.flatten(2)).unflatten(
            2, tuple(image.shape[2:])
        )
    return image


def _merged(cores: Sequence[Tensor]) -> Tensor:
    """Return cores in a row as one (g, r, n_0 n_1 .., s)."""
    chain = cores[0]
    for core in cores[1:]:
        chain = (chain.flatten(1, 2) @ core.flatten(2)).view(len(core), chain.shape[1], -1, core.shape[3])
    return chain


def _gram(cores: Sequence[Tensor]) -> Tensor:
    """Return the Gram matrix (g, r s, r s) of all cores but one: those after it, round to those before it."""
    # Invariant: ``product`` is the transfer matrix (r r') x (s s') of the cores so far: the sum over their modes of the
    # core times itself. Example of two cores with all ranks 1, vectors a and b: |a|^2, then |a|^2 |b|^2, as the Gram
    # matrix of a (x) b has it.
    transfers = []
    for core in cores:
        rows = _rows(core)
        sizes = core.shape[1], core.shape[3]
        transfers.append((rows @ rows.mT).unflatten(2, sizes).unflatten(1, sizes).transpose(2, 3))
    after, before = cores[0].shape[1], cores[-1].shape[3]
    product = transfers[0].flatten(3).flatten(1, 2)
    for transfer in transfers[1:]:
        product = product @ transfer.flatten(3).flatten(1, 2)
    # (s s') x (r r') becomes (r s) x (r' s'), the order of ``_rows``.
    pairs = product.view(-1, after, after, before, before).permute(0, 3, 1, 4, 2)
    return pairs.reshape(-1, before * after, before * after)


def _rows(core: Tensor) -> Tensor:
    """Return a core (g, r, n, s) as (g, r s, n)."""
    return core.transpose(2, 3).flatten(1, 2)


def _least_squares(target: Tensor, gram: Tensor, core: Tensor, ridge: float) -> Tensor:
    """Return the core that solves ``gram core = target``; where that leaves it open, stay near to the present one."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    weight = (ridge * mean).clamp(min=torch.finfo(gram.dtype).tiny)[:, None, None]
    ridged = gram + weight * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    solved = torch.cholesky_solve(_rows(target) + weight * _rows(core), torch.linalg.cholesky(ridged))
    return solved.unflatten(1, (core.shape[1], core.shape[3])).transpose(2, 3)


def _even(cores: Sequence[Tensor]) -> list[Tensor]:
    """Give all cores the same norm, their geometric mean."""
    norms = torch.stack([torch.linalg.vector_norm(core.flatten(1), dim=1) for core in cores])
    norms = torch.where(norms > 0, norms, 1.0)
    shares = norms.log().mean(0).exp() / norms
    return [core * share[:, None, None, None] for core, share in zip(cores, shares, strict=True)]
