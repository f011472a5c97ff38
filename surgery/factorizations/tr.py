"""``tr``: tensor ring, a closed row of cores.

    Conv     W (O, K, I) ~ sum  Go (n, O, s)  Gk (s, K, r)  Gi (r, I, n)             K kernel positions together
             1x1 convolution I -> r n, k x k convolution r -> s on each of n, 1x1 convolution s n -> O
    Linear   W ((p q), (a b)) ~ sum  Gb (t, b, u)  Ga (u, a, v)  Gp (v, p, w)  Gq (w, q, t)
             (.., a, b) -> b -> t u -> (.., t, a u) -> a u -> v -> v -> p w -> (.., p, t w) -> t w -> q -> (.., p q)

Convolutions: the channels (r n) are split, and a convolution over one more dimension, of extent 1 along n, takes r to
s with the geometry of the original. This works for one or two dimensions only. A ring of n = 1 is a Tucker-2.
Parameters g (I r n + s r K + s n O); the multiply-accumulates of the middle are n times its parameters a position.

Linear: in = a b and out = p q, both split near the root; four linear layers and two transposes. Parameters t b u +
u a v + v p w + w q t.

Full ranks are those of an exact TR-SVD with the fewest parameters: the two bonds of one core hold its mode and are
about equal, as in n s = O, and each bond after them is full for what is left. They do not bound what a ring can use:
any one rank may be traded for the others. Below full ranks, cores come from TR-SVD and alternating least squares. Ranks
from singular values are those at which the ring of the truncated HOSVD is exact, so that it loses no more than the
HOSVD. Zhao et al. 2016 (arXiv 1606.05535); Wang et al. 2018, "Wide Compression: Tensor Ring Nets" (CVPR).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.algebra import Conv, Flatten, Geometry, Linear, Operator, Shape, Step, Transpose, Unflatten
from surgery.errors import Refusal
from surgery.factorizations.base import Factorization, Ranks
from surgery.factorizations.tt import balanced, refuse_train
from surgery.solvers import reference
from surgery.solvers.ring import ring_tensor, tensor_ring

__all__ = ["Tr"]


class Tr(Factorization):
    """Tensor rings: convolutions over output, kernel and input; linear layers over two factors of each side."""

    name = "tr"
    bound = "at least"

    def refuse(self, operator: Operator) -> Refusal | None:
        """Refuse whatever tt refuses, and convolutions over three dimensions."""
        if operator.spatial_dims > 2:
            return Refusal("it is a convolution over three dimensions, whose ring needs one over four")
        return refuse_train(operator)

    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        """Return ("ring", "out", "in"), or ("ring", "in", "mid", "out") for linear layers."""
        return ("ring", "in", "mid", "out") if len(kernel) == 3 else ("ring", "out", "in")

    def tensor(self, kernel: Tensor) -> Tensor:
        """Return W (g, O, I, *k) as (g, O, K, I), and W ((p q), (a b)) as (1, b, a, p, q)."""
        if kernel.dim() > 3:
            return kernel.flatten(3).transpose(2, 3)
        # (1, p q, a b) -> (1, p, q, a, b) -> (1, b, a, p, q)
        split = kernel.unflatten(2, balanced(kernel.shape[2])).unflatten(1, balanced(kernel.shape[1]))
        return split.permute(0, 4, 3, 1, 2)

    def matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return a matrix of each mode against the others; a ring's rank there is at most the product of its bonds."""
        return tuple(tensor.movedim(k, 1).flatten(2) for k in range(1, tensor.dim()))

    def max_ranks(self, operator: Operator) -> Ranks:
        """Return (n, s, r) or (t, u, v, w) at which TR-SVD is exact."""
        meta = torch.empty(operator.kernel.shape, device="meta")
        return _exact(tuple(self.tensor(meta).shape[1:]))[1]

    def settle(self, counts: Ranks, full: Ranks) -> Ranks:
        """Return the cheapest ranks for which TR-SVD of a tensor whose modes have these sizes is exact."""
        within = [r for r in _all_exact(counts) if all(rank <= most for rank, most in zip(r, full, strict=True))]
        return min(within, key=lambda ranks: _parameters(counts, ranks), default=full)

    def counts(self, ranks: Ranks) -> Ranks:
        """Return the product of the two bonds of each core."""
        return tuple(before * after for before, after in zip(ranks, (*ranks[1:], ranks[0]), strict=True))

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return (g, r n, I, 1..), (g, s, r, 1, *k), (g, O, s n, 1..); n = 1 does not need its own dimension."""
        groups, out, columns, *size = kernel
        if not size:
            # Example of 256 -> 512 at ranks (2, 4, 8, 4): 8 x 16, 8 x 64, 64 x 8 and 32 x 8, 1,408 numbers for 131,072.
            (a, b), (p, q), (t, u, v, w) = balanced(columns), balanced(out), ranks
            return (1, t * u, b), (1, v, a * u), (1, p * w, v), (1, q, t * w)
        # Example of 64 -> 128, 3 x 3, at ranks (4, 8, 4): 16 x 64, 8 x 4 x 1 x 3 x 3 and 128 x 32,
        # 5,408 numbers for 73,728.
        (n, s, r), ones = ranks, (1,) * len(size)
        return (groups, r * n, columns, *ones), (groups, s, r, *_inner(n), *size), (groups, out, s * n, *ones)

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return a trivial geometry for the 1x1 convolutions, and the whole one, trivial along n, for the middle."""
        inner = _inner(ranks[0])
        middle = Geometry(
            stride=(*inner, *geometry.stride),
            padding=(*((0, 0) for _ in inner), *geometry.padding),
            dilation=(*inner, *geometry.dilation),
            output_padding=(*(0 for _ in inner), *geometry.output_padding),
            transposed=geometry.transposed,
            padding_mode=geometry.padding_mode,
        )
        pointwise = Geometry.pointwise(geometry.dims)
        return pointwise, middle, pointwise

    def fit(self, tensor: Tensor, ranks: Ranks, solver: str) -> Sequence[Tensor]:
        """Return the cores (g, before, n, after) of the ring."""
        return _reference(tensor, ranks) if solver == "tensorly" else tensor_ring(tensor, ranks)

    def expand(self, cores: Sequence[Tensor]) -> Tensor:
        """Return the tensor of the ring."""
        return ring_tensor(cores)

    def axes(self, cores: Sequence[Tensor]) -> tuple[int | None, ...]:
        """Return the middle axes."""
        return (2,) * len(cores)

    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return the cores as kernels."""
        if len(kernel) == 3:
            # (t, b, u) -> (t u, b); (u, a, v) -> (v, a u); (v, p, w) -> (p w, v); (w, q, t) -> (q, t w)
            b, a, p, q = cores
            parts = [b.transpose(2, 3), a.permute(0, 3, 2, 1), p.permute(0, 2, 3, 1), q.permute(0, 2, 3, 1)]
        else:
            # (r, I, n) -> (r n, I); (s, K, r) -> (s, r, K); (n, O, s) -> (O, s n)
            out, middle, columns = cores
            parts = [columns.transpose(2, 3), middle.transpose(2, 3), out.permute(0, 2, 3, 1)]
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes(kernel, ranks), strict=True))

    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        """Return the cores of the ring."""
        if len(kernel) == 3:
            (a, b), (p, q), (t, u, v, w) = balanced(kernel[2]), balanced(kernel[1]), ranks
            shapes = (1, t, u, b), (1, v, a, u), (1, p, w, v), (1, q, t, w)
            orders = (0, 1, 3, 2), (0, 3, 2, 1), (0, 3, 1, 2), (0, 3, 1, 2)
            rows = zip(factors, shapes, orders, strict=True)
            return [factor.reshape(shape).permute(order) for factor, shape, order in rows]
        groups, out, columns = kernel[:3]
        (n, s, r), (first, middle, last) = ranks, factors
        ring = [first.reshape(groups, r, n, columns), middle.reshape(groups, s, r, -1)]
        ends = [core.transpose(2, 3) for core in ring]
        return [last.reshape(groups, out, s, n).permute(0, 3, 1, 2), ends[1], ends[0]]

    def linear_steps(self, operator: Linear, factors: Sequence[Tensor]) -> tuple[Step, ...]:
        """Return the four linear layers with the reshapes around them."""
        (a, b), (p, _) = balanced(operator.in_channels), balanced(operator.out_channels)
        first, second, third, fourth = super().linear_steps(operator, factors)
        # (.., a, b) -> (.., a, t u) -> (.., a, t, u) -> (.., t, a u) -> (.., t, v) -> (.., t, p w) -> (.., t, p, w) ->
        # (.., p, t w) -> (.., p, q). The bond t is an axis from the first layer to the last, which closes the ring.
        u, w = factors[1].shape[2] // a, factors[2].shape[1] // p
        swap = Transpose(-3, -2), Flatten(-2, -1)
        contract = Unflatten(-1, (a, b)), first, Unflatten(-1, (factors[0].shape[1] // u, u)), *swap, second
        return *contract, third, Unflatten(-1, (p, w)), *swap, fourth, Flatten(-2, -1)

    def conv_steps(self, operator: Conv, factors: Sequence[Tensor], ranks: Ranks) -> tuple[Step, ...]:
        """Return the three convolutions; for n > 1, the second stands inside the split of the channels into (r, n)."""
        first, middle, last = super().conv_steps(operator, factors, ranks)
        (n, _, r), dims = ranks, operator.geometry.dims
        if n == 1:
            return first, middle, last
        return first, Unflatten(-dims - 1, (operator.groups * r, n)), middle, Flatten(-dims - 2, -dims - 1), last


def _inner(n: int) -> Shape:
    return (1,) if n > 1 else ()


def _turn(row: Shape, by: int) -> Shape:
    """Return the row from ``by`` on, then the entries before that."""
    return row[by:] + row[:by]


def _exact(sizes: Shape) -> tuple[int, Ranks]:
    """Return a mode and the ranks at which TR-SVD from it is exact, with the fewest parameters of all modes."""
    # A mode needs bonds whose product is the rank of its unfolding, at most the smaller side of n x (all others).
    held = [min(size, math.prod(sizes) // size) for size in sizes]
    # Example of (128, 9, 64): from the last mode, 64 = 8 x 8, with the ranks (8, 72, 8).
    choices = [(first, _later_full(sizes, first, balanced(held[first]))) for first in range(len(sizes))]
    return min(choices, key=lambda choice: _parameters(sizes, choice[1]))


def _all_exact(sizes: Shape) -> list[Ranks]:
    """Return the ranks at which TR-SVD is exact, from each mode and for each split of the mode into its two ranks."""
    pairs = [(k, n, -(-size // n)) for k, size in enumerate(sizes) for n in range(1, size + 1)]
    return [_later_full(sizes, k, (before, after)) for k, before, after in pairs]


def _later_full(sizes: Shape, first: int, bonds: tuple[int, int]) -> Ranks:
    """Return the ranks with the two bonds of a mode given, and each after them full for what TR-SVD has left.

    >>> _later_full((6, 4, 5), 0, (2, 3))  # 2 x 3 hold the 6; then min(3 * 4, 5 * 2) = 10
    (2, 3, 10)
    """
    turned, ranks = _turn(sizes, first), list(bonds)
    for k in range(1, len(sizes) - 1):
        ranks.append(min(ranks[-1] * turned[k], math.prod(turned[k + 1 :]) * ranks[0]))
    return _turn(tuple(ranks), -first)


def _parameters(sizes: Shape, ranks: Ranks) -> int:
    return sum(size * before * after for size, before, after in zip(sizes, ranks, _turn(ranks, 1), strict=True))


def _reference(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Return TensorLy's cores, from the mode at which it is exact at full ranks."""
    first, _ = _exact(tuple(tensor.shape[1:]))
    order = _turn(tuple(range(len(ranks))), first)
    cores = reference.tensor_ring(tensor.permute(0, *(1 + k for k in order)), _turn(ranks, first))
    return [cores[order.index(k)] for k in range(len(ranks))]
