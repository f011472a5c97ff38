"""What a factorization is: a method that turns one operator into a chain at given ranks.

A method says which operators it refuses, how its ranks relate to unfoldings of the kernel (whose singular values
guide rank selection), the shapes of its factors (so that costs are known without numbers), how to find the factors
and how to assemble them into a chain. Everything else follows here, once for all methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from surgery.chain import Chain
from surgery.errors import InputError, RankError, Refusal
from surgery.operators import Conv, Geometry, Linear, Operator, Shape
from surgery.solvers.gram import singular_values

__all__ = ["SOLVERS", "Factorization", "Ranks", "Spectrum"]

Ranks = tuple[int, ...]
SOLVERS = ("gram", "tensorly")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values (groups, n), descending, of an unfolding of ``rows`` x ``columns`` in each group."""

    values: Tensor
    rows: int
    columns: int

    @property
    def pooled(self) -> Tensor:
        """Root of the sum of squares over the groups: what one rank for all groups keeps or loses."""
        return torch.linalg.vector_norm(self.values, dim=0)


class Factorization(ABC):
    """One method; ``rank_names`` has a name for each of its ranks, in order."""

    name: ClassVar[str]
    rank_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def refuse(self, operator: Operator) -> Refusal | None:
        """Return why this method does not fit the operator, or None if it does."""

    @abstractmethod
    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """Return one batch of matrices (groups, m, n) for each rank; the rank is at most min(m, n)."""

    @abstractmethod
    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return the kernel shape of each factor, in the order in which they are applied."""

    @abstractmethod
    def solve(self, kernel: Tensor, ranks: Ranks, solver: str) -> tuple[Tensor, ...]:
        """Return the kernels of the factors, of the shapes that ``shapes`` says."""

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return the geometry of each factor of a convolution."""
        raise NotImplementedError(f"{self.name} has no convolutions")

    def max_ranks(self, operator: Operator) -> Ranks:
        """Return the full rank of each unfolding, at which the chain is exact."""
        meta = torch.empty(operator.kernel.shape, device="meta")
        return tuple(min(unfolding.shape[-2:]) for unfolding in self.unfoldings(meta))

    def spectra(self, operator: Operator) -> tuple[Spectrum, ...]:
        """Return the singular values of each unfolding."""
        unfoldings = self.unfoldings(operator.kernel.detach())
        return tuple(Spectrum(singular_values(u), *u.shape[-2:]) for u in unfoldings)

    def check_ranks(self, operator: Operator, ranks: Ranks) -> None:
        """Raise RankError unless there is one rank for each unfolding, between 1 and its full rank."""
        allowed = self.max_ranks(operator)
        fits = len(ranks) == len(allowed) and all(1 <= r <= m for r, m in zip(ranks, allowed, strict=True))
        if not fits:
            got = ",".join(map(str, ranks))
            spans = ", ".join(f"{name} 1 to {m}" for name, m in zip(self.rank_names, allowed, strict=True))
            raise RankError(f"{self.name} cannot take rank {got} here", allowed=spans)

    def factor(self, operator: Operator, ranks: Ranks, *, solver: str = "gram") -> Chain:
        """Return the chain of this operator at these ranks, in the operator's dtype.

        Solved in float32 or better (half precisions have no eigensolver). ``solver`` is "gram" (ours) or "tensorly".

        Raises:
            InputError: the method refuses the operator, or the solver is unknown.
            RankError: a rank out of bounds.
        """
        if solver not in SOLVERS:
            raise InputError(f"unknown solver {solver!r}", allowed=", ".join(SOLVERS))
        if (refusal := self.refuse(operator)) is not None:
            raise InputError(f"{self.name} does not fit this operator: {refusal.reason}")
        self.check_ranks(operator, ranks)
        kernel = operator.kernel.detach()
        wide = kernel if kernel.dtype == torch.float64 else kernel.float()
        if not bool(torch.isfinite(wide).all()):
            raise InputError("the weight has values that are not finite", next_step="repair the model first")
        factors = self.solve(wide, ranks, solver)
        return self.assemble(operator, [factor.to(kernel.dtype) for factor in factors], ranks)

    def skeleton(self, operator: Operator, ranks: Ranks) -> Chain:
        """Return the chain with weights on the meta device: its costs without its numbers."""
        shapes = self.shapes(tuple(operator.kernel.shape), ranks)
        meta = operator.to(device="meta")
        return self.assemble(meta, [torch.empty(s, device="meta", dtype=meta.weight.dtype) for s in shapes], ranks)

    def assemble(self, operator: Operator, factors: Sequence[Tensor], ranks: Ranks) -> Chain:
        """Build the chain from the factors' kernels; the bias goes on the last operator, if there is one."""
        biases = [None] * (len(factors) - 1) + [operator.bias]
        if isinstance(operator, Linear):
            return Chain(tuple(Linear(f[0].contiguous(), bias=b) for f, b in zip(factors, biases, strict=True)))
        if not isinstance(operator, Conv):
            raise InputError(f"no factorization knows {type(operator).__name__}")
        geometries = self.geometries(operator.geometry, tuple(operator.kernel.shape), ranks)
        rows = zip(factors, geometries, biases, strict=True)
        return Chain(tuple(Conv.from_kernel(f, g, b) for f, g, b in rows))
