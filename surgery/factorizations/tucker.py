"""``tucker``: Tucker-2, a rank for the output channels and one for the input channels.

    W (O, I, K) ~ core (ro, ri, K)  x_1 U (O, ro)  x_2 V (I, ri)

    Conv   1x1 convolution I -> ri, k x k convolution ri -> ro with the geometry, 1x1 convolution ro -> O

A rank that is full needs no factor: with ri = I the chain is core, 1x1; with ro = O it is 1x1, core. Parameters
g (I ri + ri ro K + ro O). Exact at full ranks. The bias stands on the last operator: a 1x1 convolution sees no padding,
and in the form that ends with the core the bias is where the original had it. Kim et al. 2016 (arXiv 1511.06530).
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.errors import Refusal
from surgery.factorizations.base import Factorization, Ranks
from surgery.factorizations.kernels import refuse_channels
from surgery.operators import Geometry, Operator, Shape
from surgery.solvers import hooi, reference

__all__ = ["Tucker"]


class Tucker(Factorization):
    """Tucker-2 over the channels of a convolution; ranks are (out, in), as the weight's modes."""

    name = "tucker"
    automatic = True

    def refuse(self, operator: Operator) -> Refusal | None:
        """Refuse linear and 1x1 (svd is the same with fewer operators) and depthwise convolutions."""
        return refuse_channels(operator)

    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        """Return ("out", "in")."""
        return ("out", "in")

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """Return (g, O, I K) and (g, I, O K)."""
        return kernel.flatten(2), kernel.transpose(1, 2).flatten(2)

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return the shapes of the reducing 1x1, the core and the expanding 1x1, without those that are not needed."""
        groups, out, columns, *size = kernel
        rank_out, rank_in = ranks
        ones = [1 for _ in size]
        reduce, expand = _needs(kernel, ranks)
        parts = [
            (groups, rank_in, columns, *ones) if reduce else None,
            (groups, rank_out, rank_in, *size),
            (groups, out, rank_out, *ones) if expand else None,
        ]
        return tuple(part for part in parts if part is not None)

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return the whole geometry for the core and none for the 1x1 convolutions."""
        reduce, expand = _needs(kernel, ranks)
        pointwise = Geometry.pointwise(geometry.dims)
        return (pointwise,) * reduce + (geometry,) + (pointwise,) * expand

    def solve(self, kernel: Tensor, ranks: Ranks, solver: str) -> tuple[Tensor, ...]:
        """Return the needed ones of V^T, core and U."""
        rank_out, rank_in = ranks
        tucker2 = reference.tucker2 if solver == "tensorly" else hooi.tucker2
        core, out_basis, in_basis = tucker2(kernel.flatten(3), (rank_out, rank_in))
        reduce, expand = _needs(tuple(kernel.shape), ranks)
        if not expand:
            core = torch.einsum("gor,grik->goik", out_basis, core)
        if not reduce:
            core = torch.einsum("gis,grsk->grik", in_basis, core)
        parts = [in_basis.mT] * reduce + [core] + [out_basis] * expand
        shapes = self.shapes(tuple(kernel.shape), ranks)
        return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def _needs(kernel: Shape, ranks: Ranks) -> tuple[bool, bool]:
    """Whether the chain has a reducing and an expanding 1x1; at both full ranks it keeps both."""
    _, out, columns, *_ = kernel
    full_out, full_in = ranks[0] == out, ranks[1] == columns
    both = full_out and full_in
    return not full_in or both, not full_out or both
