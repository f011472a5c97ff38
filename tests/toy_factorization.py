"""A toy factorization, in one file: the SVD of a linear layer's transposed weight.

W (O, I)^T ~ U (I, r) V (r, O)        I -> r by U^T, then r -> O by V^T
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from surgery.algebra import Linear, Operator, Shape
from surgery.errors import Refusal
from surgery.factorizations.base import MatrixFactorization, Ranks

__all__ = ["Turned"]


class Turned(MatrixFactorization):
    """Truncated SVD of a transposed weight."""

    name = "turned"

    def refuse(self, operator: Operator) -> Refusal | None:
        return None if type(operator) is Linear else Refusal("it is not a linear layer")

    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        return ("rank",)

    def tensor(self, kernel: Tensor) -> Tensor:
        return kernel.transpose(1, 2)

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        groups, out, columns = kernel
        return (groups, ranks[0], columns), (groups, out, ranks[0])

    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        return cores[0].transpose(1, 2), cores[1].transpose(1, 2)

    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        return [factors[0].transpose(1, 2), factors[1].transpose(1, 2)]
