"""Data-aware factors: the chain whose *output* on the calibration data is nearest to the operator's.

``fit`` minimises tr(G (W - W') C (W - W')^T) over the chains of given ranks. C is the second moment of the inputs, with
a ridge. G is the sensitivity of the model's output where it was collected, so that errors go where they matter least,
and the identity elsewhere. G counts in chains whose last operator alone writes the output channels.

If the operator has a bias, the bias absorbs the mean: b' = b + (W - W') m keeps the mean of the output over all
positions, and C is the covariance. (Where a convolution pads, the mean of a patch near the border differs from the mean
inside; m is the mean over all patches.) An operator without a bias gets none; if a normalisation that is re-estimated
follows, that absorbs the mean, and ``centred=True`` says so.

The search runs in coordinates S^T W R in which G = S S^T and the channels of C are as near to the identity as the
method's factors can absorb. For ``svd`` the minimum has a closed form there. Other methods start from the better of the
plain chain and the method's solution in these coordinates, and are refined step by step. The result is never worse than
the plain chain by this measure, and is the plain chain where that is as good, or at full ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice

import torch
from torch import Tensor

from surgery.algebra import Branches, Chain, Operator
from surgery.data.moments import Moments
from surgery.errors import CheckError, Refusal
from surgery.factorizations import Factorization, Ranks
from surgery.solvers.weighted import (
    Root,
    SecondMoment,
    equal_norms,
    low_rank,
    refine,
    root_of,
    times_channels,
    times_rows,
)

__all__ = ["Problem", "RIDGE", "composed", "correct_bias", "fit", "output_error", "search", "squared_error"]


_JOINT = 2304  # the largest n for which C stays one matrix; above it, each step takes seconds
_EFFORT = ((576, 8, 16), (1152, 4, 16), (_JOINT, 1, 8))  # (largest n, steps, iterations of a step) that pay off
_LEAST_EFFORT = (1, 4)  # steps and iterations for a larger n


def composed(chain: Chain, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the kernel (groups, O, I, *size) that a chain composes to, computed in this dtype."""
    composed = chain.with_bias(None).to(dtype=dtype).compose()
    if isinstance(composed, Refusal):
        raise CheckError(f"a factorization made a chain that is not one operator: {composed.reason}")
    return composed.kernel


@dataclass(frozen=True, eq=False)
class Problem:
    """An operator to factor at given ranks, under a metric of inputs and a sensitivity of outputs, if there is one.

    ``solver`` solves for the starts. The metric has its ridge; ``ridge`` is added to the diagonal of the sensitivity,
    relative to its mean. Coordinates are computed in float64, and factors are searched in ``dtype``.
    """

    method: Factorization
    operator: Operator
    ranks: Ranks
    metric: SecondMoment
    sensitivity: Tensor | None
    solver: str
    ridge: float

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the search: float64 for float64 weights, else float32, which is enough to lower errors."""
        return torch.float64 if self.operator.weight.dtype == torch.float64 else torch.float32

    @property
    def kernel(self) -> Tensor:
        """The operator's kernel, in float64."""
        return self.operator.kernel.detach().double()

    def chain(self, factors: Sequence[Tensor]) -> Chain:
        """Return the chain of these factors in the operator's dtype, with the operator's bias."""
        dtype = self.operator.weight.dtype
        own = [factor.to(dtype).clone(memory_format=torch.contiguous_format) for factor in factors]
        return self.method.assemble(self.operator, own, self.ranks)

    def build(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the kernel that the factors compose to, in their dtype."""
        dtype = factors[0].dtype
        bare = self.operator.with_bias(None).to(dtype=dtype)
        return composed(self.method.assemble(bare, factors, self.ranks), dtype)

    @cached_property
    def _lengths(self) -> list[int]:
        """How many factors each row of the chain has: one row, or one for each branch."""
        skeleton = self.method.skeleton(self.operator, self.ranks)
        first = skeleton.steps[0]
        return [len(row) for row in first.rows] if isinstance(first, Branches) else [len(skeleton.operators)]

    @cached_property
    def readers(self) -> frozenset[int]:
        """The indices of the factors that read the operator's input channels directly."""
        # They are the first of each row. If the chain starts with a reshape, no factor reads the channels directly.
        first = self.method.skeleton(self.operator, self.ranks).steps[0]
        # Example of rows with 2, 2 and 2 factors: the first of each are the factors 0, 2 and 4.
        starts = accumulate(self._lengths[:-1], initial=0)
        return frozenset(starts if isinstance(first, Operator | Branches) else ())

    @cached_property
    def writes(self) -> bool:
        """Whether the last factor alone writes the operator's output channels."""
        last = self.method.skeleton(self.operator, self.ranks).steps[-1]
        shape = self.method.shapes(tuple(self.operator.kernel.shape), self.ranks)[-1]
        return isinstance(last, Operator) and tuple(shape[:2]) == tuple(self.operator.kernel.shape[:2])

    def balanced(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return the factors, rescaled to equal norms within each row of the chain."""
        rest = iter(factors)
        return [factor for length in self._lengths for factor in equal_norms(list(islice(rest, length)))]


@dataclass(frozen=True, eq=False)
class _Coordinates:
    """The root S of the sensitivity, and multipliers R and R^-1 of the input channels; None where nothing takes it."""

    out: Root | None
    channels: tuple[Tensor, Tensor] | None

    def enter(self, kernel: Tensor) -> Tensor:
        """Return ``S^T W R``."""
        return self._on_out(kernel if self.channels is None else _on_channels(kernel, self.channels[0]), 0)

    def move(self, problem: Problem, factors: Sequence[Tensor], way: int) -> list[Tensor]:
        """Return the factors with their channels multiplied: into these coordinates (``way`` 0) or back out (1)."""
        moved = list(factors)
        if self.channels is not None:
            for index in problem.readers:
                moved[index] = _on_channels(moved[index], self.channels[way])
        if problem.writes:
            moved[-1] = self._on_out(moved[-1], way)
        return moved

    def _on_out(self, kernel: Tensor, way: int) -> Tensor:
        """Return a kernel (groups, O, I, *size) with its output channels multiplied by S^T or, back, by S^-T."""
        if self.out is None:
            return kernel
        flat = kernel.flatten(2)
        return (self.out.solve_turned(flat) if way else times_rows(self.out.turned, flat)).reshape(kernel.shape)


def _coordinates(problem: Problem) -> _Coordinates:
    """Return coordinates in which channels are uncorrelated, as far as the method's factors can absorb them."""
    # Only a factor that reads or writes the channels directly can take a multiplier, and give it back afterwards.
    # G = S S^T: the coordinates have S^T W, and S^-T brings back what was found in them.
    left = None
    if problem.writes and problem.sensitivity is not None:
        left = root_of(problem.sensitivity.clone, problem.ridge)
    if not problem.readers or problem.method.name == "svd":  # the closed form of svd whitens by itself
        return _Coordinates(left, None)
    right = root_of(problem.metric.channels.clone, problem.ridge)
    return _Coordinates(left, (right.matrix, right.inverse))


def search(problem: Problem, plain: Chain | Refusal) -> Chain | None:
    """Return the chain of the closed form, or refined from the better start; None if there is no start."""
    coordinates, metric = _coordinates(problem), problem.metric
    target = coordinates.enter(problem.kernel)
    if coordinates.channels is not None:
        metric = metric.whitened(coordinates.channels[1])
    if problem.method.name == "svd":
        return problem.chain(coordinates.move(problem, _svd(problem, target, metric), 1))
    target = target.to(problem.dtype)
    if problem.dtype != torch.float64:
        metric = metric.narrow()
    # Above _JOINT columns, C is replaced by its Kronecker approximation (channels) x (taps).
    if metric.factors[0].shape[-1] > _JOINT:
        metric = metric.separated()
    # Both starts are compared in the coordinates: the plain chain moved into them, and the solution found there.
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


def _svd(problem: Problem, target: Tensor, metric: SecondMoment) -> list[Tensor]:
    shapes = problem.method.shapes(tuple(target.shape), problem.ranks)
    left, right = low_rank(target.flatten(2), problem.ranks[0], metric)
    return [right.reshape(shapes[0]), left.reshape(shapes[1])]


def _on_channels(kernel: Tensor, factor: Tensor) -> Tensor:
    """Return a kernel (groups, O, I, *size) with its input channels multiplied."""
    return times_channels(kernel.flatten(2), factor, kernel[0, 0, 0].numel()).reshape(kernel.shape)


RIDGE = 1e-3


def fit(
    method: Factorization,
    operator: Operator,
    ranks: Ranks,
    moments: Moments,
    *,
    solver: str = "auto",
    ridge: float = RIDGE,
    centred: bool | None = None,
) -> Chain | Refusal:
    """Return the chain at these ranks that is nearest on the data of the moments; a bias is corrected too.

    ``centred`` leaves the mean of the error out of account; by default, if the operator has a bias to absorb it.
    ``solver`` solves for the starts. ``ridge`` is added to the diagonals of C and G, relative to their means. Refuses
    where ``method.factor`` does.

    Raises:
        InputError, RankError: as ``method.factor``.
    """
    plain = method.factor(operator, ranks, solver=solver)
    if ranks == method.max_ranks(operator):  # exact already: no data can improve it
        return plain
    centred = operator.bias is not None if centred is None else centred
    metric = moments.new_metric(centred=centred).regularise(ridge)
    fitted = search(Problem(method, operator, ranks, metric, moments.sensitivity, solver, ridge), plain)
    del metric  # it may be several times the operator
    chains = [chain for chain in (plain, fitted) if isinstance(chain, Chain)]
    if operator.bias is not None:
        chains = [correct_bias(chain, operator, moments) for chain in chains]

    # The plain chain stays in the comparison, so that the result is never worse by the same measure.
    if len(chains) < 2:
        return chains[0] if chains else plain
    narrow = moments if operator.weight.dtype == torch.float64 else moments.narrow()
    return min(chains, key=lambda chain: squared_error(chain, operator, narrow, centred=bool(centred)))


def squared_error(chain: Chain, operator: Operator, moments: Moments, *, centred: bool) -> float:
    """Return ``tr(G D Cov D^T) + e^T G e`` for D = W - W' and e = D m + b - b'; ``centred`` drops the second term."""
    difference = _difference(chain, operator, moments.mean.dtype)
    # E |D x + b - b'|^2 = tr(D Cov D^T) + |D m + b - b'|^2: the spread about the mean, and the mean itself.
    energy = float(moments.centred_energy(difference, moments.sensitivity))
    if centred:
        return energy
    shift = _mean_error(difference, chain, operator, moments)
    other = shift if moments.sensitivity is None else times_rows(moments.sensitivity, shift)
    return energy + float((shift * other).sum())


def output_error(chain: Chain, operator: Operator, moments: Moments, *, weighed: bool = False) -> float:
    """Return the relative error of a chain's output, relative to the operator's output without its bias.

    It is ``sqrt((tr(D Cov D^T) + |D m + b - b'|^2) / tr(W C W^T))`` for D = W - W', or 0 if the operator gives only 0.
    ``weighed`` puts the sensitivity, if the moments have one, on the left of D and W.
    """
    moments = moments if weighed else replace(moments, sensitivity=None)
    scale = float(moments.metric.energy(operator.kernel.detach().double().flatten(2), moments.sensitivity))
    if not scale > 0:
        return 0.0
    difference = _difference(chain, operator)
    if operator.bias is None and chain.bias is None:
        return math.sqrt(float(moments.metric.energy(difference, moments.sensitivity)) / scale)
    return math.sqrt(squared_error(chain, operator, moments, centred=False) / scale)


def _mean_error(difference: Tensor, chain: Chain, operator: Operator, moments: Moments) -> Tensor:
    """Return D m + b - b' as (groups, O, 1)."""
    # D m + b - b': a missing bias counts as 0.
    shift = _mean_shift(difference, moments)
    for sign, bias in ((1, operator.bias), (-1, chain.bias)):
        shift = shift if bias is None else shift + sign * bias.detach().to(shift.dtype).view_as(shift)
    return shift


def correct_bias(chain: Chain, operator: Operator, moments: Moments) -> Chain:
    """Return the chain with the bias ``b + (W - W') m``, which gives its output the mean of the operator's."""
    shift = _mean_shift(_difference(chain, operator), moments)
    bias = shift.flatten() if operator.bias is None else shift.flatten() + operator.bias.detach().double()
    return chain.with_bias(bias.to(operator.weight.dtype))


def _mean_shift(difference: Tensor, moments: Moments) -> Tensor:
    """Return D m as (groups, O, 1)."""
    return difference @ moments.mean.unsqueeze(-1)


def _difference(chain: Chain, operator: Operator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return W - W' as (groups, O, n)."""
    return (operator.kernel.detach().to(dtype) - composed(chain, dtype)).flatten(2)
