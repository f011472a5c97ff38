"""Tucker-2 of a batch of convolution kernels by higher-order orthogonal iteration (HOOI).

Kernel W (g, O, I, K) ~ core (g, ro, ri, K) with orthonormal bases out (g, O, ro) and in (g, I, ri).

Start: sequentially truncated HOSVD (Vannieuwenhoven et al. 2012). Where one rank is at least the other times K it loses
nothing, and starting from the other one is optimal at once. Then sweeps: with one basis fixed, the other moves to the
best subspace of its projected unfolding M, the leading eigenvectors of the Gram matrix ``M M^T``; no step lowers the
captured energy. Sweeps stop when one lowers the error by less than ``tolerance`` of itself.

Gram matrices in float32 resolve singular values down to about 3e-4 of the largest. That is ample while the truncated
part is larger; where it is not (a kernel that nearly has this rank), all is done again in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.solvers.gram import leading_subspace

__all__ = ["tucker2"]

_FLOAT32_RESIDUAL = 1e-3  # share of the energy


def tucker2(kernel: Tensor, ranks: tuple[int, int], *, sweeps: int = 10, tolerance: float = 2e-3) -> list[Tensor]:
    """Return [core (g, ro, ri, K), out basis (g, O, ro), in basis (g, I, ri)] in the kernel's float dtype.

    ``kernel`` is (g, O, I, K) in float32 or float64, ``ranks`` is (ro, ri). ``tolerance`` is relative to the error.
    """
    scale = kernel.abs().amax().clamp(min=torch.finfo(kernel.dtype).tiny)
    scaled = kernel / scale  # its squares must neither overflow nor vanish
    factors, residual = _start_and_sweep(scaled, ranks, sweeps, tolerance)
    if kernel.dtype == torch.float32 and residual < _FLOAT32_RESIDUAL:
        factors, _ = _start_and_sweep(scaled.double(), ranks, sweeps, tolerance)
    core, out_basis, in_basis = (factor.to(kernel.dtype) for factor in factors)
    return [core * scale, out_basis, in_basis]


def _start_and_sweep(
    kernel: Tensor, ranks: tuple[int, int], sweeps: int, tolerance: float
) -> tuple[list[Tensor], float]:
    """Return the factors, and the share of the energy that they miss."""
    rank_out, rank_in = ranks
    swapped = kernel.transpose(1, 2).contiguous()
    if rank_out > rank_in and rank_out >= rank_in * kernel.shape[3]:  # the in basis alone decides: start from it
        (core, in_basis, out_basis), residual = _start_and_sweep(swapped, (rank_in, rank_out), sweeps, tolerance)
        return [core.transpose(1, 2), out_basis, in_basis], residual
    total = max(float(torch.linalg.vector_norm(kernel) ** 2), torch.finfo(kernel.dtype).tiny)
    out_basis = _best(kernel.flatten(2), rank_out)
    unfolding = _project(kernel, out_basis)
    in_basis = _best(unfolding, rank_in)
    projected = in_basis.mT @ unfolding
    missed = _missed(projected, total)
    for _ in range(sweeps):
        out_basis = _best(_project(swapped, in_basis), rank_out)
        unfolding = _project(kernel, out_basis)
        in_basis = _best(unfolding, rank_in)
        projected = in_basis.mT @ unfolding
        before, missed = missed, _missed(projected, total)
        if before - missed <= 2 * tolerance * before:  # the error is the root of what is missed
            break
    core = projected.unflatten(2, (rank_out, -1)).transpose(1, 2)
    return [core, out_basis, in_basis], missed


def _best(unfolding: Tensor, rank: int) -> Tensor:
    """Return the basis that captures most of the unfolding; its Gram matrix stays in the unfolding's dtype."""
    return leading_subspace(unfolding @ unfolding.mT, rank)


def _missed(projected: Tensor, total: float) -> float:
    return max(0.0, 1 - float(torch.linalg.vector_norm(projected) ** 2) / total)


def _project(kernel: Tensor, basis: Tensor) -> Tensor:
    """Project the first mode of (g, A, B, K) onto a basis (g, A, r); return (g, B, r K)."""
    projected = (basis.mT @ kernel.flatten(2)).unflatten(2, tuple(kernel.shape[2:]))
    return projected.transpose(1, 2).flatten(2)
