"""``tt``: tensor train, with a rank between each two neighbours in a row of modes.

    Conv     W (O, I, a, b) ~ sum  G1 (I, r1)  G2 (r1, a, r2)  G3 (r2, b, r3)  G4 (r3, O)
             1x1 convolution I -> r1, a x 1 r1 -> r2, 1 x b r2 -> r3, 1x1 r3 -> O
    Linear   W ((p q), (a b)) ~ sum_r  G1 (p, b, r)  G2 (q, a, r)        in = a b, out = p q, both split near the root
             (.., a b) -> (.., a, b) -> linear b -> p r -> (.., p, a r) -> linear a r -> q -> (.., p q)

Convolutions: the chain is plain convolutions only, each with the stride, padding and dilation of its own dimension.
Dimensions of extent 1 have none; a stride along one goes with the first. A 1x1 of a full rank is not needed: with r1 =
I the chain starts with a x 1, with r3 = O it ends with 1 x b; at both it keeps both. Parameters g (I r1 + r1 a r2 + r2
b r3 + r3 O). The train is exact if each rank is that of its unfolding, (I | a b O), (I a | b O), (I a b | O). Below
that it is within a factor of root 3 (of root N - 1 for N modes) of the best train (Oseledets 2011, SIAM J. Sci. Comput.
33-5).

Linear: a TT matrix with two cores, which is the sum of r Kronecker products. An SVD of the permuted (p b) x (q a)
matrix gives the best of its rank (Van Loan and Pitsianis 1993). Parameters r (p b + q a), multiply-accumulates a p r (b
+ q) a row, so that a <= b and p <= q. It is exact at r = min(p b, q a). Novikov et al. 2015 (arXiv 1509.06569).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.algebra import Flatten, Geometry, Linear, Operator, Shape, Step, Transpose, Unflatten
from surgery.errors import Refusal
from surgery.factorizations.base import (
    Factorization,
    Ranks,
    along_each,
    only,
    refuse_channels,
    spatial_dims,
    truncated_svd,
)
from surgery.solvers import reference
from surgery.solvers.train import tensor_train, train_tensor

__all__ = ["Tt", "balanced", "refuse_train"]


class Tt(Factorization):
    """Tensor trains: convolutions along input, kernel dimensions and output; linear layers as TT matrices."""

    name = "tt"

    def refuse(self, operator: Operator) -> Refusal | None:
        """Refuse 1x1 and depthwise convolutions, and linear layers whose numbers of features are prime."""
        return refuse_train(operator)

    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        """Return ("rank",) for linear layers; else "in", one between each two kernel dimensions ("mid"), and "out"."""
        if len(kernel) == 3:
            return ("rank",)
        inner = len(spatial_dims(kernel)) - 1
        return ("in", *(["mid"] if inner == 1 else [f"mid{k + 1}" for k in range(inner)]), "out")

    def tensor(self, kernel: Tensor) -> Tensor:
        """Return (g, I, a, b, O), of the dimensions that extend; W ((p q), (a b)) as (1, p b, q a)."""
        if kernel.dim() == 3:
            # (1, p q, a b) -> (1, p, q, a, b) -> (1, p, b, q, a) -> (1, p b, q a)
            split = kernel.unflatten(2, balanced(kernel.shape[2])).unflatten(1, balanced(kernel.shape[1]))
            return split.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
        extents = [kernel.shape[3 + dim] for dim in spatial_dims(tuple(kernel.shape))]
        return kernel.reshape(*kernel.shape[:3], *extents).movedim(1, -1)

    def matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return (g, I, a b O), (g, I a, b O), (g, I a b, O); for linear layers (1, p b, q a)."""
        return tuple(tensor.flatten(1, k).flatten(2) for k in range(1, tensor.dim() - 1))

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return (1, p r, b) and (1, q, a r); or those of the first 1x1, one for each dimension, and the last 1x1."""
        groups, out, columns, *size = kernel
        if not size:
            # Example of 256 -> 512 at rank 16: 256 = 16 x 16 and 512 = 16 x 32, factors 256 x 16 and
            # 32 x 256, 12,288 numbers.
            (a, b), (p, q), (rank,) = balanced(columns), balanced(out), ranks
            return (1, p * rank, b), (1, q, a * rank)
        # Example of 64 -> 128, 3 x 3: at ranks (16, 24, 32) 16 x 64, 24 x 16 x 3 x 1, 32 x 24 x 1 x 3 and 128 x 32,
        # 8,576 numbers for 73,728; at (64, 24, 32) the first is 24 x 64 x 3 x 1.
        ones = (1,) * len(size)
        reduce, expand = _needs(kernel, ranks)
        ends = ranks if reduce else (columns, *ranks[1:])
        ends = ends if expand else (*ends[:-1], out)
        middle = zip(spatial_dims(kernel), ends[:-1], ends[1:], strict=True)
        return (
            *[(groups, ends[0], columns, *ones)] * reduce,
            *((groups, after, before, *only(size, dim)) for dim, before, after in middle),
            *[(groups, out, ends[-1], *ones)] * expand,
        )

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return that of each dimension for its own convolution, and none for the 1x1 convolutions."""
        pointwise = Geometry.pointwise(geometry.dims)
        reduce, expand = _needs(kernel, ranks)
        return *[pointwise] * reduce, *along_each(geometry, kernel), *[pointwise] * expand

    def fit(self, tensor: Tensor, ranks: Ranks, solver: str) -> Sequence[Tensor]:
        """Return the cores (g, before, n, after) of the train; for linear layers left and right."""
        if tensor.dim() == 3:
            return truncated_svd(tensor, ranks[0], solver)
        train = reference.tensor_train if solver == "tensorly" else tensor_train
        return train(tensor, ranks)

    def expand(self, cores: Sequence[Tensor]) -> Tensor:
        """Return the tensor of the train, or left @ right."""
        return cores[0] @ cores[1] if len(cores) == 2 else train_tensor(cores)

    def axes(self, cores: Sequence[Tensor]) -> tuple[int | None, ...]:
        """Return the middle axes; of left and right the rows and the columns."""
        return (1, 2) if len(cores) == 2 else (2,) * len(cores)

    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return the cores as kernels; a full end goes into its neighbour."""
        parts = _linear_factors(cores, kernel) if len(cores) == 2 else _conv_factors(cores, kernel, ranks)
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes(kernel, ranks), strict=True))

    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        """Return the cores of the train, with unit matrices for ends that were not needed; or left and right."""
        return _linear_cores(factors, kernel) if len(kernel) == 3 else _conv_cores(factors, kernel, ranks)

    def linear_steps(self, operator: Linear, factors: Sequence[Tensor]) -> tuple[Step, ...]:
        """Return the two linear layers with the reshapes around them."""
        in_split, (p, _) = balanced(operator.in_channels), balanced(operator.out_channels)
        first, second = super().linear_steps(operator, factors)
        rank = factors[0].shape[1] // p
        reshapes = Unflatten(-1, (p, rank)), Transpose(-3, -2), Flatten(-2, -1)
        return Unflatten(-1, in_split), first, *reshapes, second, Flatten(-2, -1)


def balanced(n: int) -> tuple[int, int]:
    """Return the two factors of n that are closest to its root, the smaller first.

    >>> balanced(512), balanced(10), balanced(7)
    ((16, 32), (2, 5), (1, 7))
    """
    small = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return small, n // small


def refuse_train(operator: Operator) -> Refusal | None:
    """Refuse linear layers that cannot be split, and other operators with too few modes for a train or a ring.

    A linear layer can be split if its numbers of inputs and outputs are products of two numbers above 1.
    """
    if not isinstance(operator, Linear):
        return refuse_channels(operator)
    for what, n in (("in", operator.in_channels), ("out", operator.out_channels)):
        if balanced(n)[0] == 1:
            return Refusal(f"it has {n} {what}_features, which is not a product of two numbers above 1")
    return None


def _needs(kernel: Shape, ranks: Ranks) -> tuple[bool, bool]:
    """Whether the chain starts with a 1x1 and ends with one; if both ends are full it keeps both."""
    full_in, full_out = ranks[0] == kernel[2], ranks[-1] == kernel[1]
    both = full_in and full_out
    return not full_in or both, not full_out or both


def _conv_factors(cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
    """Return the cores as (g, after, before, extent); a 1x1 that is not needed is multiplied into its neighbour."""
    # Cores (1, I, r1), (r1, a, r2), (r2, b, r3), (r3, O, 1). At r1 = I the first is square: (I, r1) (r1, a, r2) is
    # (I, a, r2), which starts the chain itself. The same holds for the last at r3 = O.
    first, *middle, last = cores
    reduce, expand = _needs(kernel, ranks)
    if not reduce:
        middle[0] = torch.einsum("gir,grns->gins", first[:, 0], middle[0])
    if not expand:
        middle[-1] = torch.einsum("grns,gso->grno", middle[-1], last[..., 0])
    return [first[:, 0].mT] * reduce + [core.movedim(3, 1) for core in middle] + [last[..., 0].mT] * expand


def _conv_cores(factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
    reduce, expand = _needs(kernel, ranks)
    groups, out, columns = kernel[:3]
    ends = [torch.eye(size).to(factors[0]).expand(groups, -1, -1) for size in (columns, out)]
    middle = factors[int(reduce) : len(factors) - int(expand)]
    first = factors[0].flatten(2).mT if reduce else ends[0]
    last = factors[-1].flatten(2).mT if expand else ends[1]
    return [first.unsqueeze(1), *(part.flatten(3).movedim(1, 3) for part in middle), last.unsqueeze(3)]


def _linear_factors(cores: Sequence[Tensor], kernel: Shape) -> list[Tensor]:
    """Return G1 as (1, p, r, b) and G2 as (1, q, a, r)."""
    # (p b, r) -> (p, r, b), rows p r and columns b; (r, q a) -> (q, a, r)
    left, right = cores
    (a, b), (p, q) = balanced(kernel[2]), balanced(kernel[1])
    return [left.unflatten(1, (p, b)).transpose(2, 3), right.mT.unflatten(1, (q, a))]


def _linear_cores(factors: Sequence[Tensor], kernel: Shape) -> list[Tensor]:
    (a, b), (p, q) = balanced(kernel[2]), balanced(kernel[1])
    left = factors[0].reshape(1, p, -1, b).transpose(2, 3).flatten(1, 2)
    return [left, factors[1].reshape(1, q * a, -1).mT]
