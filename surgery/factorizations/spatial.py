"""``spatial``: one rank r between the first kernel dimension and the others.

    W (O, I, a, b) ~ sum_r  V (r, I, a)  U (O, r, b)        the unfolding is (O b) x (I a)

    Conv   a x 1 convolution I -> r, then 1 x b convolution r -> O   (3-d: a x 1 x 1, then 1 x b x c)

Stride, padding, dilation and output padding go with the dimension that they belong to. They are therefore exact even if
they differ between dimensions; padding modes are separable, too. Parameters g (I a r + r O b). The method is exact at
r = min(O b, I a). It is the second scheme of Jaderberg et al. 2014 (arXiv 1405.3866), in the closed form of Tai et al.
2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from surgery.algebra import Geometry, Operator, Shape
from surgery.errors import Refusal
from surgery.factorizations.base import MatrixFactorization, Ranks

__all__ = ["Spatial"]


class Spatial(MatrixFactorization):
    """Truncated SVD between the kernel's dimensions."""

    name = "spatial"
    automatic = True

    def refuse(self, operator: Operator) -> Refusal | None:
        """Refuse kernels that do not extend along the first and another dimension."""
        size = operator.kernel.shape[3:]
        if sum(k > 1 for k in size) < 2 or size[0] == 1:
            shape = "x".join(map(str, size)) or "none"
            return Refusal(f"its kernel does not extend along its first and another dimension (kernel: {shape})")
        return None

    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        """Return ("rank",)."""
        return ("rank",)

    def tensor(self, kernel: Tensor) -> Tensor:
        """Return (g, O b, I a)."""
        # (g, O, I, a, b) -> (g, O, b, I, a) -> (g, O b, I a)
        rows = kernel.flatten(4).permute(0, 1, 4, 2, 3)
        return rows.flatten(3).flatten(1, 2)

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return (g, r, I, a, 1) and (g, O, r, 1, b)."""
        # Example of 64 -> 128, 3 x 3, at rank 32: 32 x 64 x 3 x 1 and 128 x 32 x 1 x 3, 18,432 numbers for 73,728.
        groups, out, columns, first, *rest = kernel
        return (groups, ranks[0], columns, first, *(1 for _ in rest)), (groups, out, ranks[0], 1, *rest)

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return the part of the first dimension, then that of the others."""
        return geometry.along({0}), geometry.along(range(1, geometry.dims))

    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return right and left as kernels."""
        first, second = self.shapes(kernel, ranks)
        # (g, O b, r) -> (g, O, b, r) -> (g, O, r, b)
        left = cores[0].unflatten(1, (kernel[1], math.prod(kernel[4:]))).transpose(2, 3)
        return cores[1].reshape(first), left.reshape(second)

    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        """Return left and right."""
        # (g, O, r, b) -> (g, O, b, r) -> (g, O b, r); (g, r, I, a) -> (g, r, I a)
        return [factors[1].flatten(3).transpose(2, 3).flatten(1, 2), factors[0].flatten(2)]
