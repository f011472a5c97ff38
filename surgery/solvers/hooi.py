"""Tucker-2 of a batch of convolution kernels by higher-order orthogonal iteration (HOOI).

Kernel W (g, O, I, K) ~ core (g, ro, ri, K) with orthonormal bases out (g, O, ro) and in (g, I, ri).

Start: sequentially truncated HOSVD (Vannieuwenhoven et al. 2012), whose bases are leading eigenvectors of Gram matrices
``M M^T`` of unfoldings M. Where one rank is at least the other times K it loses nothing, and starting from the other
one is optimal at once. Then sweeps: with one basis fixed, the other moves towards the best subspace of its projected
unfolding. It is near it already, so that a step is not a new eigendecomposition but a Chebyshev filter of the present
basis, at a fraction of the cost (Zhou and Saad 2007): ``T_p`` of the Gram matrix, scaled so that the eigenvalues to
leave lie within [-1, 1], grows the others. Degree 2 is as good as an exact step here, and ahead of it after the second
sweep, as over-relaxation is. Gains fall by a steady rate, so sweeps stop when those to come would lower the error by
less than ``tolerance`` of itself.
The kernel lies as (g, O, K, I) in memory, so that no unfolding needs a copy.

Gram matrices in float32 resolve singular values down to about 3e-4 of the largest. That is ample while the truncated
part is larger; where it is not (a kernel that nearly has this rank), all is done again in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgery.solvers.gram import leading_subspace

__all__ = ["tucker2"]

_FLOAT32_RESIDUAL = 1e-3  # share of the energy
_MAX_GAIN = 1e6
_SMALL = 48  # below, an eigendecomposition costs no more than a filter


def tucker2(kernel: Tensor, ranks: tuple[int, int], *, sweeps: int = 10, tolerance: float = 1.5e-3) -> list[Tensor]:
    """Return [core (g, ro, ri, K), out basis (g, O, ro), in basis (g, I, ri)] in the kernel's float dtype.

    ``kernel`` is (g, O, I, K) in float32 or float64, ``ranks`` is (ro, ri). ``tolerance`` is relative to the error.
    """
    low, high = torch.aminmax(kernel)
    scale = torch.maximum(-low, high).clamp(min=torch.finfo(kernel.dtype).tiny)
    scaled = (kernel.mT / scale).contiguous()  # its squares must neither overflow nor vanish
    factors, residual = _start_and_sweep(scaled, ranks, sweeps, tolerance)
    if kernel.dtype == torch.float32 and residual < _FLOAT32_RESIDUAL:
        factors, _ = _start_and_sweep(scaled.double(), ranks, sweeps, tolerance)
    core, out_basis, in_basis = (factor.to(kernel.dtype) for factor in factors)
    return [(core * scale).mT, out_basis, in_basis]


def _start_and_sweep(
    kernel: Tensor, ranks: tuple[int, int], sweeps: int, tolerance: float
) -> tuple[list[Tensor], float]:
    """Return core (g, ro, K, ri) and bases of a kernel (g, O, K, I), and the share of the energy that they miss."""
    rank_out, rank_in = ranks
    if rank_out > rank_in and rank_out >= rank_in * kernel.shape[2]:  # the in basis alone decides: start from it
        swapped = kernel.transpose(1, 3).contiguous()
        (core, in_basis, out_basis), residual = _start_and_sweep(swapped, (rank_in, rank_out), sweeps, tolerance)
        return [core.transpose(1, 3), out_basis, in_basis], residual
    gram = _gram_out(kernel)
    total = max(float(_trace(gram)), torch.finfo(kernel.dtype).tiny)
    out_basis = leading_subspace(gram, rank_out)
    gram = _gram_in(kernel, out_basis)
    in_basis = leading_subspace(gram, rank_in)
    missed = _missed(gram, in_basis, total)
    gained = math.inf
    for _ in range(sweeps):
        out_basis = _improve(_gram_out(_project_in(kernel, in_basis)), out_basis)
        gram = _gram_in(kernel, out_basis)
        in_basis = _improve(gram, in_basis)
        before, missed = missed, _missed(gram, in_basis, total)
        last, gained = gained, before - missed
        rate = min(gained / last, 1.0) if math.isfinite(last) and last > 0 else 0.5
        if gained * rate <= 2 * tolerance * (1 - rate) * missed:  # the error is the root of what is missed
            break
    core = _project_in((out_basis.mT @ kernel.flatten(2)).unflatten(2, tuple(kernel.shape[2:])), in_basis)
    return [core, out_basis, in_basis], missed


def _project_in(kernel: Tensor, basis: Tensor) -> Tensor:
    """Return (g, O, K, ri): the last mode in coordinates of a basis (g, I, ri)."""
    return (kernel.flatten(1, 2) @ basis).unflatten(1, tuple(kernel.shape[1:3]))


def _gram_out(kernel: Tensor) -> Tensor:
    """Return the Gram matrix of the out mode of (g, O, K, I); the dtype stays."""
    unfolding = kernel.flatten(2)
    return unfolding @ unfolding.mT


def _gram_in(kernel: Tensor, out_basis: Tensor) -> Tensor:
    """Return the Gram matrix of the in mode of (g, O, K, I) after the projection of the out mode."""
    unfolding = (out_basis.mT @ kernel.flatten(2)).reshape(len(kernel), -1, kernel.shape[3])
    return unfolding.mT @ unfolding


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum()


def _missed(gram: Tensor, basis: Tensor, total: float) -> float:
    return max(0.0, 1 - float((basis * (gram @ basis)).sum()) / total)


def _improve(gram: Tensor, basis: Tensor) -> Tensor:
    """Move a basis towards the leading eigenvectors of a Gram matrix by a Chebyshev filter."""
    size, rank = basis.shape[-2:]
    if rank == size:
        return basis
    if size <= _SMALL:
        return leading_subspace(gram, rank)
    image = gram @ basis
    ritz = (basis * image).sum(-2)
    cut, largest = ritz.amin(-1), ritz.amax(-1)
    degree = _degree(cut, largest)
    if not degree:
        return leading_subspace(gram, rank)
    half = cut[..., None, None] / 2
    filtered = image / half - basis
    if degree == 2:
        filtered = (gram @ filtered) * (2 / half) - 2 * filtered - basis
    return torch.linalg.qr(filtered).Q


def _degree(cut: Tensor, largest: Tensor) -> int:
    """Return the degree of the filter, 1 or 2; 0 where float32 could not hold even the gain ``2 largest / cut - 1``."""
    if not bool((cut > 0).all()):
        return 0
    gain = float((2 * largest / cut - 1).amax())
    return 2 if 2 * gain**2 < _MAX_GAIN else int(gain < _MAX_GAIN)
