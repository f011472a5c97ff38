"""Tucker-2 of a batch of convolution kernels by higher-order orthogonal iteration (HOOI).

Kernel W (g, O, I, K) ~ core (g, ro, ri, K) with orthonormal bases out (g, O, ro) and in (g, I, ri).

Start: sequentially truncated HOSVD (Vannieuwenhoven et al. 2012), each basis from a float64 Gram matrix. Then sweeps:
with one basis fixed, the other moves by one step of orthogonal iteration on its projected unfolding M, that is
``basis <- qr(M (M^T basis))``: two products and a thin QR in place of a Gram matrix and an eigendecomposition. A step
never lowers the captured energy; sweeps stop when the energy grows by less than ``tolerance`` of the total.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.solvers.gram import gram, leading_subspace

__all__ = ["tucker2"]


def tucker2(kernel: Tensor, ranks: tuple[int, int], *, sweeps: int = 10, tolerance: float = 1e-4) -> list[Tensor]:
    """Return [core (g, ro, ri, K), out basis (g, O, ro), in basis (g, I, ri)] in the kernel's float dtype.

    ``kernel`` is (g, O, I, K) in float32 or float64, ``ranks`` is (ro, ri).
    """
    rank_out, rank_in = ranks
    out_basis = leading_subspace(gram(kernel.flatten(2)), rank_out).to(kernel.dtype)
    in_unfolding = _unfold_in(kernel, out_basis)
    in_basis = leading_subspace(gram(in_unfolding), rank_in).to(kernel.dtype)
    total = float(torch.linalg.vector_norm(kernel) ** 2)
    energy = _energy(in_basis.mT @ in_unfolding)
    for _ in range(sweeps):
        out_basis = _orthogonal_step(_unfold_out(kernel, in_basis), out_basis)
        in_unfolding = _unfold_in(kernel, out_basis)
        in_basis = _orthogonal_step(in_unfolding, in_basis)
        before, energy = energy, _energy(in_basis.mT @ in_unfolding)
        if energy - before <= tolerance * total:
            break
    core = (in_basis.mT @ in_unfolding).unflatten(2, (rank_out, -1)).transpose(1, 2)
    return [core, out_basis, in_basis]


def _energy(projected: Tensor) -> float:
    return float(torch.linalg.vector_norm(projected) ** 2)


def _unfold_out(kernel: Tensor, in_basis: Tensor) -> Tensor:
    """Project the input channels: (g, O, ri K)."""
    return torch.einsum("goik,gir->gork", kernel, in_basis).flatten(2)


def _unfold_in(kernel: Tensor, out_basis: Tensor) -> Tensor:
    """Project the output channels: (g, I, ro K)."""
    projected = (out_basis.mT @ kernel.flatten(2)).unflatten(2, tuple(kernel.shape[2:]))
    return projected.transpose(1, 2).flatten(2)


def _orthogonal_step(unfolding: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration on ``unfolding unfolding^T``."""
    moved: Tensor = torch.linalg.qr(unfolding @ (unfolding.mT @ basis)).Q
    return moved
