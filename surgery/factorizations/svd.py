"""``svd``: one rank r between all inputs of an output and the output channels.

    W (O, I, K) ~ U (O, r) V (r, I K)        K kernel positions; K = 1 for a linear layer

    Linear   I -> r, then r -> O
    Conv     k x k convolution I -> r with the stride, padding and dilation, then 1x1 convolution r -> O

Parameters g (I K r + r O) for g groups of I inputs and O outputs; best when r is well below O I K / (O + I K).
The method is exact at r = min(O, I K) (Eckart-Young: the truncation is the best rank-r approximation). The 1x1
convolution sees no padding, so that a bias on it is exact. This is the channel form of Zhang et al. 2015 (arXiv
1505.06798).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from surgery.algebra import Geometry, Operator, Shape
from surgery.errors import Refusal
from surgery.factorizations.base import MatrixFactorization, Ranks

__all__ = ["Svd"]


class Svd(MatrixFactorization):
    """Truncated SVD of linear layers and, over the channels, of convolutions."""

    name = "svd"
    automatic = True

    def refuse(self, operator: Operator) -> Refusal | None:
        """Refuse operators whose full rank is 1, such as depthwise convolutions."""
        if self.max_ranks(operator) == (1,):
            return Refusal("its weight has rank 1 already (one output, or one input position, in each group)")
        return None

    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        """Return ("rank",)."""
        return ("rank",)

    def tensor(self, kernel: Tensor) -> Tensor:
        """Return (g, O, I K)."""
        return kernel.flatten(2)

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return (g, r, I, *k) and (g, O, r, 1...)."""
        # Example of a convolution 64 -> 128 of 3 x 3, 73,728 numbers, at rank 16: 16 x 64 x 3 x 3 and 128 x 16, 11,264.
        groups, out, columns, *size = kernel
        return (groups, ranks[0], columns, *size), (groups, out, ranks[0], *(1 for _ in size))

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return the whole geometry, then a trivial one."""
        return geometry, Geometry.pointwise(geometry.dims)

    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return right and left as kernels."""
        first, second = self.shapes(kernel, ranks)
        return cores[1].reshape(first), cores[0].reshape(second)

    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        """Return left and right."""
        return [factors[1].flatten(2), factors[0].flatten(2)]
