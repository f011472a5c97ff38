"""``tucker``: Tucker-2, a rank for the output channels and one for the input channels.

    W (O, I, K) ~ core (ro, ri, K)  x_1 U (O, ro)  x_2 V (I, ri)

    Conv   1x1 convolution I -> ri, k x k convolution ri -> ro with the geometry, 1x1 convolution ro -> O

A full rank needs no factor: with ri = I the chain is core, 1x1; with ro = O it is 1x1, core. Parameters g (I ri +
ri ro K + ro O). The method is exact at full ranks. The bias is on the last operator: a 1x1 convolution sees no padding,
and in the form that ends with the core, the bias is where the original had it. Kim et al. 2016 (arXiv 1511.06530).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.algebra import Geometry, Operator, Shape
from surgery.errors import Refusal
from surgery.factorizations.base import Factorization, Ranks, refuse_channels
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

    def tensor(self, kernel: Tensor) -> Tensor:
        """Return (g, O, I, K)."""
        return kernel.flatten(3)

    def matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return (g, O, I K) and (g, I, O K)."""
        return tensor.flatten(2), tensor.transpose(1, 2).flatten(2)

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return the shapes of the reducing 1x1, the core and the expanding 1x1, without those that are not needed."""
        # Example of 64 -> 128, 3 x 3: at ranks (32, 16) 16 x 64, 32 x 16 x 3 x 3 and 128 x 32, 9,728 numbers for
        # 73,728; at (128, 16) 16 x 64 and 128 x 16 x 3 x 3.
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
        """Return the whole geometry for the core, and a trivial one for the 1x1 convolutions."""
        reduce, expand = _needs(kernel, ranks)
        pointwise = Geometry.pointwise(geometry.dims)
        return (pointwise,) * reduce + (geometry,) + (pointwise,) * expand

    def fit(self, tensor: Tensor, ranks: Ranks, solver: str) -> Sequence[Tensor]:
        """Return core (g, ro, ri, K), U (g, O, ro) and V (g, I, ri)."""
        rank_out, rank_in = ranks
        tucker2 = reference.tucker2 if solver == "tensorly" else hooi.tucker2
        return tucker2(tensor, (rank_out, rank_in))

    def expand(self, cores: Sequence[Tensor]) -> Tensor:
        """Return core x_1 U x_2 V."""
        return torch.einsum("grsk,gor,gis->goik", *cores)

    def axes(self, cores: Sequence[Tensor]) -> tuple[int | None, ...]:
        """Return the rows of U and V; the core has K, which stays as it is."""
        return None, 1, 1

    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return those of V^T, core and U that are needed; the others are multiplied into the core."""
        # At a full rank the basis is square: core x_1 U has O in the place of ro, core x_2 V has I in the place of ri.
        core, out_basis, in_basis = cores
        reduce, expand = _needs(kernel, ranks)
        if not expand:
            core = torch.einsum("gor,grik->goik", out_basis, core)
        if not reduce:
            core = torch.einsum("gis,grsk->grik", in_basis, core)
        parts = [in_basis.mT] * reduce + [core] + [out_basis] * expand
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes(kernel, ranks), strict=True))

    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        """Return core, U and V; unit matrices stand for factors that were not needed."""
        reduce, expand = _needs(kernel, ranks)
        core = factors[int(reduce)].flatten(3)
        eyes = [torch.eye(size).to(core).expand(len(core), -1, -1) for size in kernel[1:3]]
        out_basis = factors[-1].flatten(2) if expand else eyes[0]
        return [core, out_basis, factors[0].flatten(2).mT if reduce else eyes[1]]


def _needs(kernel: Shape, ranks: Ranks) -> tuple[bool, bool]:
    """Whether the chain has a reducing and an expanding 1x1; if both ranks are full it keeps both."""
    _, out, columns, *_ = kernel
    full_out, full_in = ranks[0] == out, ranks[1] == columns
    both = full_out and full_in
    return not full_in or both, not full_out or both
