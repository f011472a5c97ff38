"""What a factorization is: a method that turns one operator into a chain at given ranks.

A method says

- which operators it refuses;
- as which tensor it sees their kernel, and how its ranks relate to unfoldings of that tensor, whose singular values
  guide the choice of ranks;
- how to approximate the tensor by cores;
- which shapes the factors have that the cores become, so that costs are known without numbers;
- how to assemble the factors into a chain.

Everything else follows here, once for all methods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from surgery.algebra import Chain, Conv, Embedding, Geometry, Linear, Operator, Shape, Step
from surgery.errors import InputError, RankError, Refusal
from surgery.solvers import gram, reference
from surgery.solvers.gram import singular_values
from surgery.system.memory import check_memory, estimate

__all__ = [
    "Factorization",
    "MatrixFactorization",
    "Ranks",
    "SOLVERS",
    "Spectrum",
    "along_each",
    "only",
    "refuse_channels",
    "spatial_dims",
    "truncated_svd",
]


Ranks = tuple[int, ...]
SOLVERS = ("auto", "als", "pp", "gd", "tensorly")


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
    """One method.

    ``solvers`` are the names of its solvers: "auto" is its own best, "tensorly" the field's reference. ``automatic``
    says whether the method is tried if the user does not name one. Its errors must then follow from spectra, and its
    chains must run fast. ``bound`` says what the error that spectra predict is to the error of the chain: "at most",
    "at least", or "" where both are the same.
    """

    name: ClassVar[str]
    automatic: ClassVar[bool] = False
    solvers: ClassVar[tuple[str, ...]] = ("auto", "tensorly")
    bound: ClassVar[str] = "at most"

    @abstractmethod
    def refuse(self, operator: Operator) -> Refusal | None:
        """Return why this method does not fit the operator; None if it does."""

    @abstractmethod
    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        """Return a name for each rank, in order."""

    @abstractmethod
    def tensor(self, kernel: Tensor) -> Tensor:
        """Return the kernel as the tensor (batch, n_1, .., n_N) that the cores approximate."""

    @abstractmethod
    def matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the unfoldings (batch, m, n) of that tensor whose singular values guide the ranks."""

    @abstractmethod
    def fit(self, tensor: Tensor, ranks: Ranks, solver: str) -> Sequence[Tensor] | Refusal:
        """Return the cores at these ranks, or why no good ones were found."""

    @abstractmethod
    def expand(self, cores: Sequence[Tensor]) -> Tensor:
        """Return the tensor that cores stand for."""

    @abstractmethod
    def axes(self, cores: Sequence[Tensor]) -> tuple[int | None, ...]:
        """Return for each core which of its axes is a mode of the tensor; None for a core without a mode."""

    @abstractmethod
    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return the kernels of the factors, in the shapes that ``shapes`` gives."""

    @abstractmethod
    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        """Return the cores that factors came from: the inverse of ``factors``."""

    @abstractmethod
    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return the kernel shape of each factor, in the order in which they are applied."""

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        """Return the unfoldings (batch, m, n) of a kernel whose singular values guide the ranks."""
        return self.matrices(self.tensor(kernel))

    def solve(self, kernel: Tensor, ranks: Ranks, solver: str) -> tuple[Tensor, ...] | Refusal:
        """Return the kernels of the factors, in the shapes that ``shapes`` gives; or why no good ones were found."""
        cores = self.fit(self.tensor(kernel), ranks, solver)
        return cores if isinstance(cores, Refusal) else self.factors(cores, tuple(kernel.shape), ranks)

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return the geometry of each factor of a convolution."""
        raise NotImplementedError(f"{self.name} does not make convolutions")

    def max_ranks(self, operator: Operator) -> Ranks:
        """Return the full ranks, at which the chain is exact."""
        meta = torch.empty(operator.kernel.shape, device="meta")
        return tuple(min(unfolding.shape[-2:]) for unfolding in self.unfoldings(meta))

    def spectra(self, operator: Operator) -> tuple[Spectrum, ...]:
        """Return the singular values of each unfolding."""
        unfoldings = self.unfoldings(operator.kernel.detach())
        return tuple(Spectrum(singular_values(u), *u.shape[-2:]) for u in unfoldings)

    def settle(self, counts: Ranks, full: Ranks) -> Ranks:
        """Return the ranks that keep these counts of singular values of the unfoldings."""
        return counts

    def counts(self, ranks: Ranks) -> Ranks:
        """Return how many singular values of each unfolding these ranks can keep at most."""
        return ranks

    def check_ranks(self, operator: Operator, ranks: Ranks) -> None:
        """Raise RankError unless the number of ranks is right, and each is between 1 and its full rank."""
        allowed = self.max_ranks(operator)
        fits = len(ranks) == len(allowed) and all(1 <= r <= m for r, m in zip(ranks, allowed, strict=True))
        if not fits:
            got = ",".join(map(str, ranks))
            raise RankError(f"{self.name} cannot take rank {got} here", allowed=self.spans(operator))

    def spans(self, operator: Operator, full: Ranks | None = None) -> str:
        """Return the span of each rank in words, as ``out 1 to 8, in 1 to 6``; up to other than the full ranks."""
        names = self.rank_names(tuple(operator.kernel.shape))
        rows = zip(names, self.max_ranks(operator) if full is None else full, strict=True)
        return ", ".join(f"{name} 1 to {full}" for name, full in rows)

    def factor(self, operator: Operator, ranks: Ranks, *, solver: str = "auto") -> Chain | Refusal:
        """Return the chain of this operator at these ranks, in the operator's dtype; or why no good one was found.

        It is solved in float32 or better, because half precisions have no eigensolver. ``solver`` is one of
        ``solvers``.

        Raises:
            InputError: the method refuses the operator, does not have the solver, or needs more memory than available.
            RankError: a rank is out of bounds.
        """
        if solver not in self.solvers:
            raise InputError(f"{self.name} has no solver {solver!r}", allowed=", ".join(self.solvers))
        if (refusal := self.refuse(operator)) is not None:
            raise InputError(f"{self.name} does not fit this operator: {refusal.reason}")
        self.check_ranks(operator, ranks)
        kernel = operator.kernel.detach()
        check_memory(estimate(self.name, kernel.shape, kernel.element_size()), f"{self.name} of {tuple(kernel.shape)}")
        wide = kernel if kernel.dtype == torch.float64 else kernel.float()
        if not bool(torch.isfinite(wide).all()):
            raise InputError("the weight has values that are not finite", next_step="repair the model first")
        factors = self.solve(wide, ranks, solver)
        if isinstance(factors, Refusal):
            return factors
        return self.assemble(operator, [_own(factor.to(kernel.dtype)) for factor in factors], ranks)

    def skeleton(self, operator: Operator, ranks: Ranks) -> Chain:
        """Return the chain with weights on the meta device, which has the costs but not the numbers."""
        shapes = self.shapes(tuple(operator.kernel.shape), ranks)
        meta = operator.to(device="meta")
        return self.assemble(meta, [torch.empty(s, device="meta", dtype=meta.weight.dtype) for s in shapes], ranks)

    def assemble(self, operator: Operator, factors: Sequence[Tensor], ranks: Ranks) -> Chain:
        """Build the chain from the factors' kernels; the bias goes on the last operator, or in a shift after it."""
        steps: tuple[Step, ...]
        if isinstance(operator, Linear):
            steps = self.linear_steps(operator, factors)
        elif isinstance(operator, Embedding):
            steps = _embedding_steps(operator, factors)
        elif isinstance(operator, Conv):
            steps = self.conv_steps(operator, factors, ranks)
        else:
            raise InputError(f"{type(operator).__name__} is not an operator that factorizations know")
        return Chain(steps, origin=(self.name, ranks)).with_bias(operator.bias)

    def linear_steps(self, operator: Linear, factors: Sequence[Tensor]) -> tuple[Step, ...]:
        """Return the steps that replace a linear layer: by default one layer for each factor."""
        return tuple(Linear(factor[0].contiguous()) for factor in factors)

    def conv_steps(self, operator: Conv, factors: Sequence[Tensor], ranks: Ranks) -> tuple[Step, ...]:
        """Return the steps that replace a convolution: by default one convolution for each factor."""
        geometries = self.geometries(operator.geometry, tuple(operator.kernel.shape), ranks)
        return tuple(Conv.from_kernel(f, g) for f, g in zip(factors, geometries, strict=True))


def _embedding_steps(operator: Embedding, factors: Sequence[Tensor]) -> tuple[Step, ...]:
    first, *rest = factors
    narrow = replace(operator, weight=first[0].t().contiguous())
    return (narrow, *(Linear(factor[0].contiguous()) for factor in rest))


def _own(factor: Tensor) -> Tensor:
    """Return the factor in its own memory: a view would keep, save and train what it is cut from."""
    alone = factor.is_contiguous() and factor.untyped_storage().nbytes() == factor.nbytes
    return factor if alone else factor.clone(memory_format=torch.contiguous_format)


def spatial_dims(kernel: Shape) -> list[int]:
    """Return the dimensions along which a kernel (g, O, I, *size) extends."""
    return [dim for dim, size in enumerate(kernel[3:]) if size > 1]


def along_each(geometry: Geometry, kernel: Shape) -> list[Geometry]:
    """Return the geometry along each dimension that extends; the first one also has that of those that do not."""
    # A dimension of extent 1 has no factor, but its stride must not be lost. Example: of a 1 x 3 kernel with stride
    # (2, 1), the one factor along dimension 1 has the stride 2 of dimension 0 as well.
    dims = spatial_dims(kernel)
    flat = set(range(geometry.dims)) - set(dims)
    return [geometry.along({dim} | flat if dim == dims[0] else {dim}) for dim in dims]


def only(size: Sequence[int], dim: int) -> Shape:
    """Return the size along one dimension, and 1 along the others."""
    return tuple(n if i == dim else 1 for i, n in enumerate(size))


def refuse_channels(operator: Operator) -> Refusal | None:
    """Refuse linear and 1x1 (svd is the same with fewer operators) and depthwise convolutions."""
    _, out, columns, *size = operator.kernel.shape
    if math.prod(size) == 1:
        return Refusal("it has a single kernel position, where svd is the same with fewer operators")
    if out == 1 and columns == 1:
        return Refusal("it is depthwise: one input and one output channel in each group")
    return None


def truncated_svd(matrix: Tensor, rank: int, solver: str) -> tuple[Tensor, Tensor]:
    """Return left (batch, m, r) and right (batch, r, n) of the truncated SVD."""
    low_rank = reference.low_rank if solver == "tensorly" else gram.low_rank
    return low_rank(matrix, rank)


class MatrixFactorization(Factorization):
    """Base of the methods with one rank, whose cores are left and right."""

    bound = ""

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
