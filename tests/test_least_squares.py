"""The laws of the iterative solver of training: finite, never farther than zero, exact where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.algebra import relative_error
from surgery.training.gauss_newton import fit_factors
from surgery.training.least_squares import least_squares


@dataclass(frozen=True)
class Problem:
    """A matrix by its singular values, and a target."""

    matrix: Tensor
    target: Tensor

    def apply(self, row: Sequence[Tensor]) -> list[Tensor]:
        return [self.matrix @ row[0]]

    def adjoint(self, row: Sequence[Tensor]) -> list[Tensor]:
        return [self.matrix.mT @ row[0]]

    @property
    def solution(self) -> Tensor:
        return least_squares(self.apply, self.adjoint, [self.target])[0]


@st.composite
def problems(draw: st.DrawFn, *, decades: float) -> Problem:
    """Singular values over so many powers of ten, some of them 0 where there are more than two."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    count = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64))[0]
    values = 10.0 ** (-decades * torch.rand(count, generator=generator, dtype=torch.float64))
    if decades > 2 and draw(st.booleans()):
        values[count // 2 :] = 0
    scale = 10.0 ** draw(st.integers(-8, 8))
    target = torch.randn(rows, generator=generator, dtype=torch.float64)
    inside = draw(st.booleans())
    target = left @ (left.mT @ target) if inside else target
    return Problem(scale * (left * values) @ right.mT, 10.0 ** draw(st.integers(-30, 30)) * target)


@given(problems(decades=2))
@settings(max_examples=100, deadline=None)
def test_what_can_be_solved_is_the_least_solution(problem: Problem) -> None:
    expected = torch.linalg.pinv(problem.matrix) @ problem.target
    assert relative_error(problem.solution, expected) <= 1e-8


@given(problems(decades=18))
@settings(max_examples=200, deadline=None)
def test_what_cannot_be_solved_stays_small_and_no_farther_than_zero(problem: Problem) -> None:
    found, size = problem.solution, torch.linalg.vector_norm(problem.target)
    assert bool(found.isfinite().all())
    missing = torch.linalg.vector_norm(problem.target - problem.matrix @ found)
    assert missing <= size * (1 + 1e-12)
    assert torch.linalg.vector_norm(found) <= 1e6 * size / torch.linalg.matrix_norm(problem.matrix, 2)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e300, 1e-300])
def test_targets_without_a_solution_give_zero_and_extreme_ones_a_number(value: float) -> None:
    problem = Problem(torch.eye(3, dtype=torch.float64), torch.full((3,), value, dtype=torch.float64))
    expected = value if 0 < value < float("inf") else 0.0
    assert problem.solution.tolist() == pytest.approx([expected] * 3, rel=1e-12, abs=0.0)


def product(pair: Sequence[Tensor]) -> Tensor:
    return pair[0] @ pair[1]


@given(st.integers(0, 2**16), st.integers(1, 5), st.floats(-6, 6), st.floats(-12, 3))
@settings(max_examples=100, deadline=None)
def test_a_step_of_factors_is_never_worse_than_none(seed: int, rank: int, change: float, least: float) -> None:
    """The goal is near or far, and one of the columns is small, which makes the full step a long one."""
    generator = torch.Generator().manual_seed(seed)
    first, last = (torch.randn(shape, generator=generator) for shape in ((6, rank), (rank, 7)))
    first[:, 0] *= 10.0**least
    last[0] *= 10.0**least
    start = product([first.double(), last.double()])
    goal = start + 10.0**change * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    found = product(fit_factors(product, [first, last], goal))
    before, after = (torch.linalg.vector_norm(weight - goal) for weight in (start, found))
    assert after <= before


def test_factors_for_a_goal_that_is_no_number_stay_as_they_are() -> None:
    factors = [torch.randn(4, 2), torch.randn(2, 3)]
    found = fit_factors(product, factors, torch.full((4, 3), float("nan")))
    assert all(torch.equal(new, old.double()) for new, old in zip(found, factors, strict=True))
