"""``cp``: canonical polyadic decomposition, a sum of r products of vectors, with one rank r for all modes.

    W (O, I, a, b) ~ sum_r  U (O, r)  V (I, r)  A (a, r)  B (b, r)

    Conv   1x1 convolution I -> r, a x 1 depthwise on r, 1 x b depthwise on r, 1x1 convolution r -> O

Each depthwise convolution has the stride, padding and dilation of its own dimension. Dimensions of extent 1 need none;
a stride along one goes with the first convolution. Parameters g r (I + a + b + O).

The method is exact at the product of all extents but the largest, with unit vectors in the other modes. Below that rank
the solvers are alternating least squares (``solver="als"``, the default), pairwise perturbation (``"pp"``) and the
over-parameterised gradient method (``"gd"``). The best approximation of a rank need not exist. If components grow
without bound and cancel, even under a ridge, the result is a refusal with this reason. Lebedev et al. 2015 (arXiv
1412.6553). Linear layers and 1x1 convolutions are two-way: there the method would be svd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.algebra import Geometry, Operator, Shape
from surgery.errors import Refusal
from surgery.factorizations.base import Factorization, Ranks, along_each, only, refuse_channels, spatial_dims
from surgery.solvers import reference
from surgery.solvers.cp import cp

__all__ = ["Cp"]


class Cp(Factorization):
    """CP of convolutions."""

    name = "cp"
    bound = "at least"
    solvers = ("auto", "als", "pp", "gd", "tensorly")

    def refuse(self, operator: Operator) -> Refusal | None:
        """Refuse operators with only two modes, and depthwise convolutions."""
        return refuse_channels(operator)

    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        """Return ("rank",)."""
        return ("rank",)

    def tensor(self, kernel: Tensor) -> Tensor:
        """Return (g, O, I, a, b), of the dimensions that extend."""
        extents = [kernel.shape[3 + dim] for dim in spatial_dims(tuple(kernel.shape))]
        return kernel.reshape(*kernel.shape[:3], *extents)

    def matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return (g, O, I K) and (g, I, O K): the rank is at least that of both (Elhoushi et al. 2019 use EVBMF so)."""
        return tensor.flatten(2), tensor.transpose(1, 2).flatten(2)

    def max_ranks(self, operator: Operator) -> Ranks:
        """Return the product of all extents but the largest."""
        shape = operator.kernel.shape[1:]
        return (math.prod(shape) // max(shape),)

    def settle(self, counts: Ranks, full: Ranks) -> Ranks:
        """Return the larger of the two."""
        return (max(counts),)

    def counts(self, ranks: Ranks) -> Ranks:
        """Return the rank for both unfoldings."""
        return ranks * 2

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return the shapes of the first 1x1, a depthwise convolution for each dimension, and the last 1x1."""
        # Example of 64 -> 128, 3 x 3, at rank 32: 32 x 64, twice 32 x 3 and 128 x 32, 6,336 numbers for 73,728.
        groups, out, columns, *size = kernel
        (rank,) = ranks
        ones = (1,) * len(size)
        depthwise = [(groups * rank, 1, 1, *only(size, dim)) for dim in spatial_dims(kernel)]
        return (groups, rank, columns, *ones), *depthwise, (groups, out, rank, *ones)

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return the part of each dimension for its depthwise convolution; 1x1 convolutions have a trivial geometry."""
        pointwise = Geometry.pointwise(geometry.dims)
        return pointwise, *along_each(geometry, kernel), pointwise

    def fit(self, tensor: Tensor, ranks: Ranks, solver: str) -> Sequence[Tensor] | Refusal:
        """Return a matrix (g, n, r) for each mode, or why they are degenerate."""
        (rank,), shape = ranks, tensor.shape[1:]
        if rank == math.prod(shape) // max(shape):
            return _unit_factors(tensor)
        if solver == "tensorly":
            return reference.cp(tensor, rank)
        found = cp(tensor, rank, method="als" if solver == "auto" else solver)
        return Refusal(found.reason) if found.degenerate else found.factors

    def expand(self, cores: Sequence[Tensor]) -> Tensor:
        """Return the sum of the products of columns."""
        # Invariant: ``product`` is (g, n_1 .. n_k, r), the Khatri-Rao product so far; the last core sums over r.
        product = cores[0]
        for core in cores[1:]:
            product = (
                (product[..., None, :] * core[:, None]).flatten(1, 2) if core is not cores[-1] else product @ core.mT
            )
        return product.unflatten(1, [core.shape[1] for core in cores[:-1]])

    def axes(self, cores: Sequence[Tensor]) -> tuple[int | None, ...]:
        """Return the rows of each matrix."""
        return (1,) * len(cores)

    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return the factors of the inputs, of each dimension and of the outputs."""
        # (g, I, r) -> (g, r, I); (g, a, r) -> (g, r, a) -> (g r, a)
        out, columns, *extents = cores
        parts = [columns.mT, *(extent.mT.flatten(0, 1) for extent in extents), out]
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes(kernel, ranks), strict=True))

    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        """Return the matrices of outputs, inputs and dimensions."""
        columns, *extents, out = factors
        rows = [extent.reshape(kernel[0], ranks[0], -1).mT for extent in extents]
        return [out.flatten(2), columns.flatten(2).mT, *rows]


def _unit_factors(tensor: Tensor) -> list[Tensor]:
    """Return the exact factors: unit vectors in all modes but the largest, which has the fibres of the tensor."""
    # T = sum over the places p of all modes but the largest: unit vectors there, the fibre at p in the largest mode.
    # Example of 2 x 2 x 3: components (0, 0), (0, 1), (1, 0), (1, 1), the second being e_0 o e_1 o T[0, 1, :].
    groups, *shape = tensor.shape
    largest = shape.index(max(shape))
    others = [mode for mode in range(len(shape)) if mode != largest]
    fibres = tensor.movedim(largest + 1, 1).flatten(2)
    places = torch.unravel_index(torch.arange(fibres.shape[2], device=tensor.device), [shape[mode] for mode in others])
    eyes = [
        torch.eye(shape[mode], dtype=tensor.dtype, device=tensor.device)[:, place]
        for mode, place in zip(others, places, strict=True)
    ]
    factors = [eye.expand(groups, -1, -1) for eye in eyes]
    factors.insert(largest, fibres)
    return factors
