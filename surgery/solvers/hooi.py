"""Tucker-2 of a batch of convolution kernels by higher-order orthogonal iteration (HOOI).

Kernel W (g, O, I, K) ~ core (g, ro, ri, K) with orthonormal bases out (g, O, ro) and in (g, I, ri).

The start is a sequentially truncated HOSVD (Vannieuwenhoven et al. 2012). Its bases are leading eigenvectors of Gram
matrices ``M M^T`` of unfoldings M, the smaller mode first. If one rank is at least the other times K, that mode loses
nothing, and a start from the other one is optimal at once.

Then come steps, out and in by turns. With one basis fixed, the other moves towards the best subspace of its projected
unfolding. It is close to it already, so that a step is not a new eigendecomposition but a Chebyshev filter of the
present basis, at a fraction of the cost (Zhou and Saad 2007): ``T_p`` of the Gram matrix, scaled so that the
eigenvalues to leave lie within [-1, 1], grows the others. Degree 3 is almost exact, and best for the first and the last
step. Between them degree 2 is ahead of it from the next step on, as over-relaxation is. Gains fall by a steady rate, so
that the last step is known before it is taken: whatever would come after it lowers the error by less than ``tolerance``
of itself. The core comes from what that step has projected already. The kernel lies as (g, O, K, I) in memory, so that
no unfolding needs a copy.

Gram matrices in float32 resolve singular values down to about 3e-4 of the largest. That is ample while the truncated
part is larger. If it is not (a kernel that nearly has this rank), everything is done again in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgery.solvers.chebyshev import filter_basis, filter_degree
from surgery.solvers.gram import leading_subspace, row_gram

__all__ = ["tucker2"]

_FLOAT32_RESIDUAL = 1e-3  # share of the energy
_SMALL = 48  # below, an eigendecomposition costs no more than a filter
_RATE = 0.44  # by which gains fall from step to step on random kernels, where they fall most slowly
_FIRST, _BETWEEN, _LAST = (3, 0.95), (2, 1.0), (3, 0.8)  # degree, and share of the least Ritz value that is cut off


def tucker2(kernel: Tensor, ranks: tuple[int, int], *, sweeps: int = 10, tolerance: float = 1.4e-3) -> list[Tensor]:
    """Return [core (g, ro, ri, K), out basis (g, O, ro), in basis (g, I, ri)] in the kernel's float dtype.

    ``kernel`` is (g, O, I, K) in float32 or float64, ``ranks`` is (ro, ri). ``tolerance`` is relative to the error.
    """
    low, high = torch.aminmax(kernel)
    scale = torch.maximum(-low, high).clamp(min=torch.finfo(kernel.dtype).tiny)
    scaled = kernel.new_empty(kernel.mT.shape)
    torch.div(kernel.mT, scale, out=scaled)  # its squares must neither overflow nor vanish
    factors, residual = _start_and_sweep(scaled, ranks, sweeps, tolerance)
    if kernel.dtype == torch.float32 and residual < _FLOAT32_RESIDUAL:
        scaled = scaled.double()
        factors, _ = _start_and_sweep(scaled, ranks, sweeps, tolerance)
    core, *bases = (factor.to(kernel.dtype) for factor in factors)
    return [(core * scale).mT, *bases]


def _start_and_sweep(
    kernel: Tensor, ranks: tuple[int, int], sweeps: int, tolerance: float
) -> tuple[list[Tensor], float]:
    """Return core (g, ro, K, ri) and bases of a kernel (g, O, K, I), and the share of the energy that they miss."""
    # Invariant: before each step the basis of the other mode is final for this step, and ``missed`` is the share of the
    # energy outside of both bases, which never rises. Steps 0 and 1 are the start. Example: a step that gains
    # 1 % of the error, at a rate of 0.44, leaves 0.44 / 0.56 = 0.8 % to come.
    first = _first_mode(kernel, ranks)
    bases, mode, projected = [kernel, kernel], first, kernel
    missed, to_come, total = math.inf, math.inf, 0.0
    # (O, I) of (g, O, K, I)
    uneven = max(kernel.shape[1::2]) / min(kernel.shape[1::2])  # what a step of the smaller mode says too little by
    for step in range(2 + 2 * sweeps):
        mode = (first + step) % 2
        if step:
            projected = _project(kernel, bases[1 - mode], 1 - mode)
        gram = _gram(projected, mode)
        if step < 2:
            bases[mode] = leading_subspace(gram, ranks[mode])
            total = total or max(float(_trace(gram)), torch.finfo(kernel.dtype).tiny)
            missed = _missed(gram, bases[mode], total) if step else 1.0
            continue
        to_come *= _RATE
        kind = _LAST if to_come <= tolerance else _FIRST if step == 2 else _BETWEEN
        bases[mode] = _improve(gram, bases[mode], *kind)
        before, missed = missed, _missed(gram, bases[mode], total)
        if kind is not _BETWEEN:
            gain = (before - missed) / (2 * missed) if missed > 0 else 0.0  # the error is the root of what is missed
            to_come = gain * _RATE / (1 - _RATE) * uneven
            if to_come <= tolerance:
                break
    return [_project(projected, bases[mode], mode), *bases], missed


def _first_mode(kernel: Tensor, ranks: tuple[int, int]) -> int:
    """Return the mode whose basis alone decides, if one does; else the mode with the smaller Gram matrix."""
    # With the in basis at rank ri, the out unfolding (O, K ri) has at most K ri columns: a larger ro cuts nothing.
    # Example of 3 taps: ranks (6, 2) keep all of the out mode, so that the in basis decides, and is found first.
    _, out, extent, columns = kernel.shape
    rank_out, rank_in = ranks
    if rank_out >= rank_in * extent or rank_in >= rank_out * extent:
        return int(rank_out > rank_in)
    return int(columns < out)


def _project(kernel: Tensor, basis: Tensor, mode: int) -> Tensor:
    """Return (g, O, K, I) with its out mode (0) or its in mode (1) in coordinates of a basis (g, O or I, r)."""
    if mode == 0:
        return (basis.mT @ kernel.flatten(2)).unflatten(2, tuple(kernel.shape[2:]))
    return (kernel.flatten(1, 2) @ basis).unflatten(1, tuple(kernel.shape[1:3]))


def _gram(kernel: Tensor, mode: int) -> Tensor:
    """Return the Gram matrix of the out mode (0) or the in mode (1) of (g, O, K, I); the dtype stays."""
    rows = kernel.flatten(2) if mode == 0 else kernel.flatten(1, 2).mT
    return row_gram(rows)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum()


def _missed(gram: Tensor, basis: Tensor, total: float) -> float:
    # The energy inside of a basis B is tr(B^T G B).
    return max(0.0, 1 - float((basis * (gram @ basis)).sum()) / total)


def _improve(gram: Tensor, basis: Tensor, most: int, share: float) -> Tensor:
    """Move a basis towards the leading eigenvectors of a Gram matrix by a Chebyshev filter."""
    size, rank = basis.shape[-2:]
    if rank == size:
        return basis
    if size <= _SMALL:
        return leading_subspace(gram, rank)
    image = gram @ basis
    # The diagonal of B^T G B. Its least entry is no less than the least Ritz value, and needs no eigendecomposition.
    ritz = (basis * image).sum(-2)
    cut, largest = share * ritz.amin(-1), ritz.amax(-1)
    degree = filter_degree(cut, largest, most)
    return filter_basis(gram, basis, image, cut=cut, degree=degree) if degree else leading_subspace(gram, rank)
