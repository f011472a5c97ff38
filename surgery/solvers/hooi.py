"""Tucker-2 of a batch of convolution kernels by higher-order orthogonal iteration (HOOI).

Kernel W (g, O, I, K) ~ core (g, ro, ri, K) with orthonormal bases out (g, O, ro) and in (g, I, ri).

Start: sequentially truncated HOSVD (Vannieuwenhoven et al. 2012), each basis from a float64 Gram matrix. Where one rank
is at least the other times K it loses nothing, and starting from the other one is optimal at once. Then sweeps: with
one basis fixed, the other moves on its projected unfolding M. Up to 128 channels it moves to the best subspace; beyond,
by two steps of orthogonal iteration, ``basis <- qr(M (M^T basis))``: products and a thin QR in place of a Gram matrix
and an eigendecomposition. Neither lowers the captured energy; sweeps stop when it grows by less than ``tolerance`` of
the total. On random 256-channel kernels, the hardest, two steps end 0.05 % above the error of exact ones, one 0.1 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.solvers.gram import gram, leading_subspace

__all__ = ["tucker2"]

_EXACT_UP_TO = 128
_STEPS = 2


def tucker2(kernel: Tensor, ranks: tuple[int, int], *, sweeps: int = 10, tolerance: float = 1e-4) -> list[Tensor]:
    """Return [core (g, ro, ri, K), out basis (g, O, ro), in basis (g, I, ri)] in the kernel's float dtype.

    ``kernel`` is (g, O, I, K) in float32 or float64, ``ranks`` is (ro, ri).
    """
    rank_out, rank_in = ranks
    scale = kernel.abs().amax().clamp(min=torch.finfo(kernel.dtype).tiny)
    kernel = kernel / scale  # its squares must neither overflow nor vanish
    if rank_out > rank_in and rank_out >= rank_in * kernel.shape[3]:  # the in basis alone decides: start from it
        core, in_basis, out_basis = tucker2(
            kernel.transpose(1, 2), (rank_in, rank_out), sweeps=sweeps, tolerance=tolerance
        )
        return [core.transpose(1, 2) * scale, out_basis, in_basis]
    out_basis = leading_subspace(gram(kernel.flatten(2)), rank_out).to(kernel.dtype)
    in_unfolding = _unfold_in(kernel, out_basis)
    in_basis = leading_subspace(gram(in_unfolding), rank_in).to(kernel.dtype)
    total = float(torch.linalg.vector_norm(kernel) ** 2)
    energy = _energy(in_basis.mT @ in_unfolding)
    for _ in range(sweeps):
        out_basis = _improve(_unfold_out(kernel, in_basis), out_basis)
        in_unfolding = _unfold_in(kernel, out_basis)
        in_basis = _improve(in_unfolding, in_basis)
        before, energy = energy, _energy(in_basis.mT @ in_unfolding)
        if energy - before <= tolerance * total:
            break
    core = (in_basis.mT @ in_unfolding).unflatten(2, (rank_out, -1)).transpose(1, 2)
    return [core * scale, out_basis, in_basis]


def _energy(projected: Tensor) -> float:
    return float(torch.linalg.vector_norm(projected) ** 2)


def _unfold_out(kernel: Tensor, in_basis: Tensor) -> Tensor:
    """Project the input channels: (g, O, ri K)."""
    return torch.einsum("goik,gir->gork", kernel, in_basis).flatten(2)


def _unfold_in(kernel: Tensor, out_basis: Tensor) -> Tensor:
    """Project the output channels: (g, I, ro K)."""
    projected = (out_basis.mT @ kernel.flatten(2)).unflatten(2, tuple(kernel.shape[2:]))
    return projected.transpose(1, 2).flatten(2)


def _improve(unfolding: Tensor, basis: Tensor) -> Tensor:
    """Move the basis to the best subspace, or by steps of orthogonal iteration where that is costly."""
    if unfolding.shape[-2] <= _EXACT_UP_TO:
        return leading_subspace(gram(unfolding), basis.shape[-1]).to(basis.dtype)
    for _ in range(_STEPS):
        basis = torch.linalg.qr(unfolding @ (unfolding.mT @ basis)).Q
    return basis
