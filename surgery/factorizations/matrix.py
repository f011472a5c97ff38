"""Shared by methods that see a kernel as a batch of matrices: ``M (m, n) ~ left (m, r) right (r, n)``, an SVD."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from surgery.factorizations.base import Factorization, Ranks
from surgery.solvers import gram, reference

__all__ = ["MatrixFactorization", "truncated_svd"]


def truncated_svd(matrix: Tensor, rank: int, solver: str) -> tuple[Tensor, Tensor]:
    """Return left (batch, m, r) and right (batch, r, n) of the truncated SVD."""
    low_rank = reference.low_rank if solver == "tensorly" else gram.low_rank
    return low_rank(matrix, rank)


class MatrixFactorization(Factorization):
    """Base of the methods with one rank, whose cores are left and right."""

    def matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the matrices themselves."""
        return (tensor,)

    def fit(self, tensor: Tensor, ranks: Ranks, solver: str) -> Sequence[Tensor]:
        """Return left and right."""
        return truncated_svd(tensor, ranks[0], solver)

    def expand(self, cores: Sequence[Tensor]) -> Tensor:
        """Return left @ right."""
        return cores[0] @ cores[1]

    def axes(self, cores: Sequence[Tensor]) -> tuple[int | None, ...]:
        """Return the rows of left and the columns of right."""
        return 1, 2
