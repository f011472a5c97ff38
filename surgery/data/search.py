"""The search for the factors of one operator that are best under a metric, for any factorization.

``svd`` has a closed form (``surgery.solvers.weighted``). Every other method starts twice: from its plain factors, and
from those of the kernel whose channels are whitened, ``S^T W R`` with R the Cholesky factor of the moment of the input
channels and S that of the sensitivity of the output channels; the factor that reads the input takes R^-1 back, and the
one that writes the output S^-T. From the better start Gauss-Newton steps go on in these coordinates, under the whole
metric; under that of channels (x) taps where there are many columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice

import torch
from torch import Tensor

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.algebra.steps import Branches
from surgery.errors import CheckError, Refusal
from surgery.factorizations import Factorization, Ranks
from surgery.solvers.weighted import Metric, equal_norms, low_rank, refine, times_channels, triangles

__all__ = ["Problem", "composed", "search"]

_JOINT = 2304  # columns; above, each step under the whole moment takes seconds
_EFFORT = ((576, 8, 16), (1152, 4, 16), (_JOINT, 1, 8))  # columns up to which so many steps of so many iterations pay
_LEAST_EFFORT = (1, 4)


def composed(chain: Chain, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the kernel of a chain, composed in this dtype."""
    composed = chain.with_bias(None).to(dtype=dtype).compose()
    if isinstance(composed, Refusal):
        raise CheckError(f"a factorization made a chain that is not one operator: {composed.reason}")
    return composed.kernel


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be fitted, under which metric of inputs and sensitivity of outputs (groups, O, O), and how.

    ``solver`` is that of the starts, ``ridge`` what is added to the diagonals of metric and sensitivity, relative to
    their means. Coordinates are found in float64, factors in ``dtype``.
    """

    method: Factorization
    operator: Operator
    ranks: Ranks
    metric: Metric
    sensitivity: Tensor | None
    solver: str
    ridge: float

    @property
    def dtype(self) -> torch.dtype:
        """What factors are searched in: float64 for weights of it, else float32, enough to improve errors by."""
        return torch.float64 if self.operator.weight.dtype == torch.float64 else torch.float32

    @property
    def kernel(self) -> Tensor:
        """The operator's kernel, in float64."""
        return self.operator.kernel.detach().double()

    def chain(self, factors: Sequence[Tensor]) -> Chain:
        """Return the chain in the operator's dtype, with its bias."""
        dtype = self.operator.weight.dtype
        own = [factor.to(dtype).clone(memory_format=torch.contiguous_format) for factor in factors]
        return self.method.assemble(self.operator, own, self.ranks)

    def build(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the kernel that the factors make."""
        dtype = factors[0].dtype
        bare = self.operator.with_bias(None).to(dtype=dtype)
        return composed(self.method.assemble(bare, factors, self.ranks), dtype)

    @cached_property
    def _rows(self) -> list[int]:
        """How many factors each product has: one, or one for each branch."""
        skeleton = self.method.skeleton(self.operator, self.ranks)
        first = skeleton.steps[0]
        return [len(row) for row in first.rows] if isinstance(first, Branches) else [len(skeleton.operators)]

    @cached_property
    def readers(self) -> frozenset[int]:
        """Which factors read the operator's input, all of its channels as they are."""
        first = self.method.skeleton(self.operator, self.ranks).steps[0]
        starts = accumulate(self._rows[:-1], initial=0)
        return frozenset(starts if isinstance(first, Operator | Branches) else ())

    @cached_property
    def writes(self) -> bool:
        """Whether the last factor alone writes the output channels as they are."""
        last = self.method.skeleton(self.operator, self.ranks).steps[-1]
        shape = self.method.shapes(tuple(self.operator.kernel.shape), self.ranks)[-1]
        return isinstance(last, Operator) and tuple(shape[:2]) == tuple(self.operator.kernel.shape[:2])

    def balanced(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return the factors with equal norms in each product."""
        rest = iter(factors)
        return [factor for length in self._rows for factor in equal_norms(list(islice(rest, length)))]


@dataclass(frozen=True, eq=False)
class _Coordinates:
    """Multipliers of the output channels and of the input channels (dense, or diagonal ones), and their inverses."""

    out: tuple[Tensor, Tensor]
    channels: tuple[Tensor, Tensor]

    def enter(self, kernel: Tensor) -> Tensor:
        """Return ``S^T W R``."""
        return _on_out(_on_channels(kernel, self.channels[0]), self.out[0])

    def move(self, problem: Problem, factors: Sequence[Tensor], way: int) -> list[Tensor]:
        """Multiply the factors that read and write the channels: into these coordinates (0) or out of them (1)."""
        moved = [_on_channels(f, self.channels[way]) if i in problem.readers else f for i, f in enumerate(factors)]
        if problem.writes:
            moved[-1] = _on_out(moved[-1], self.out[way])
        return moved


def _coordinates(problem: Problem, metric: Metric) -> _Coordinates:
    """Return coordinates in which the channels are as white as the method lets them be."""
    groups, out, channels = problem.kernel.shape[:3]
    ones = [problem.kernel.new_ones(groups, size, dtype=torch.float64) for size in (out, channels)]
    left, right = (ones[0], ones[0]), (ones[1], ones[1])
    if problem.writes and problem.sensitivity is not None:
        lower, inverse = triangles(problem.sensitivity, problem.ridge)
        left = (lower, inverse) if lower.dim() == 2 else (lower.mT, inverse.mT)
    if problem.readers and problem.method.name != "svd":  # its closed form needs none
        right = triangles(metric.channels, problem.ridge)
    return _Coordinates(left, right)


def search(problem: Problem, plain: Chain | Refusal) -> Chain | None:
    """Return the chain in closed form, or found from the better start; None if there is no start."""
    metric = problem.metric.regularised(problem.ridge)
    coordinates = _coordinates(problem, metric)
    target = coordinates.enter(problem.kernel)
    metric = metric.whitened(coordinates.channels[1])
    if problem.method.name == "svd":
        return problem.chain(coordinates.move(problem, _svd(problem, target, metric), 1))
    target = target.to(problem.dtype)
    if problem.dtype != torch.float64:
        metric = metric.narrow()
    if metric.factors[0].shape[-1] > _JOINT:
        metric = metric.separated()
    starts = []
    if isinstance(plain, Chain):
        starts.append(coordinates.move(problem, [operator.kernel.double() for operator in plain.operators], 0))
    if problem.readers:
        found = problem.method.solve(target, problem.ranks, problem.solver)
        starts += [] if isinstance(found, Refusal) else [list(found)]
    if not starts:
        return None
    starts = [[factor.to(problem.dtype) for factor in factors] for factors in starts]
    start = min(starts, key=lambda factors: float(metric.energy((problem.build(factors) - target).flatten(2))))
    columns = problem.kernel[0, 0].numel()
    steps, iterations = next(((s, i) for most, s, i in _EFFORT if columns <= most), _LEAST_EFFORT)
    factors = refine(problem.build, problem.balanced(start), target, metric, steps=steps, iterations=iterations)
    wide = [factor.double() for factor in factors]
    return problem.chain(problem.balanced(coordinates.move(problem, wide, 1)))


def _svd(problem: Problem, target: Tensor, metric: Metric) -> list[Tensor]:
    shapes = problem.method.shapes(tuple(target.shape), problem.ranks)
    left, right = low_rank(target.flatten(2), problem.ranks[0], metric)
    return [right.reshape(shapes[0]), left.reshape(shapes[1])]


def _on_channels(kernel: Tensor, factor: Tensor) -> Tensor:
    """Return a kernel (groups, O, I, *size) with its input channels multiplied."""
    return times_channels(kernel.flatten(2), factor, kernel[0, 0, 0].numel()).reshape(kernel.shape)


def _on_out(kernel: Tensor, factor: Tensor) -> Tensor:
    """Return a kernel (groups, O, I, *size) with its output channels multiplied."""
    flat = kernel.flatten(2)
    return (flat * factor.unsqueeze(-1) if factor.dim() == 2 else factor @ flat).reshape(kernel.shape)
