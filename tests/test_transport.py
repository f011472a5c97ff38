"""The transport of moments between a weight and its factors: the chain rule, its inverse, and the second moments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.algebra import Chain, Conv, Geometry, Linear, Operator, relative_error
from surgery.errors import Refusal
from surgery.factorizations import FACTORIZATIONS, Factorization, named
from surgery.training.frobenius import product_gradients
from surgery.training.structure import with_weights
from surgery.training.transport import Jacobian
from tests.cases import CASES, Case
from tests.fitted import each
from tests.tolerances import tolerance

ROWS = [
    (case, method)
    for case in CASES
    for method in FACTORIZATIONS.values()
    if case.dtype == torch.float64 and method.refuse(case.operator) is None
]

# Relative: conjugate gradients in float64, whose last digits the condition of the problem takes. Components of cp may
# be nearly collinear, and the steps end before what hardly moves the weight is found.
SOLVED = 1e-9
UNSOLVED = {"cp": 5e-3}

EACH, SOME = each(ROWS[::2]), each(ROWS[::5])


def chain_of(method: Factorization, operator: Operator) -> Chain:
    """The chain at about half ranks, or lower where the method finds none there."""
    ranks = tuple((rank + 1) // 2 for rank in method.max_ranks(operator))
    chain = method.factor(operator, ranks)
    while isinstance(chain, Refusal):
        ranks = tuple(max(1, rank - 1) for rank in ranks)
        chain = method.factor(operator, ranks)
    return chain


def composed(chain: Chain) -> Operator:
    operator = chain.compose()
    assert isinstance(operator, Operator)
    return operator


@each(ROWS)
def test_gradients_of_the_norm_are_those_of_the_composed_weight(case: Case, method: Factorization) -> None:
    chain = chain_of(method, case.operator)
    weights = [operator.weight.clone().requires_grad_() for operator in chain.operators]
    energy = composed(with_weights(chain, weights)).weight.square().sum() / 2
    rows = product_gradients(weights, lambda filled: with_weights(chain, filled))
    for ours, theirs in zip(rows, torch.autograd.grad(energy, weights), strict=True):
        assert relative_error(ours, theirs) <= 1e-10


def jacobian_of(chain: Chain) -> Jacobian:
    weights = [operator.weight for operator in chain.operators]
    return Jacobian(lambda factors: composed(with_weights(chain, factors)).weight, weights)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def gradients(step: Operator | Chain, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a loss that is not symmetric in anything."""
    y = step(x)
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().view(y.shape)
    return list(torch.autograd.grad((y * probe).sum(), weights))


@EACH
def test_down_is_the_chain_rule_and_back_inverts_it(case: Case, method: Factorization) -> None:
    chain = chain_of(method, case.operator)
    weights = [operator.weight.detach().requires_grad_() for operator in chain.operators]
    factored, x = with_weights(chain, weights), case.inputs()
    dense = composed(factored)
    leaf = dense.weight.detach().requires_grad_()
    (of_weight,) = gradients(type(dense)(**{**vars(dense), "weight": leaf, "bias": None}), x, [leaf])

    jacobian = jacobian_of(chain)
    pulled = jacobian.pull(of_weight)
    expected = gradients(factored, x, weights)
    length = max(weight.numel() for weight in (*weights, leaf)) * x.shape[0]
    assert relative_error(flat(pulled), flat(expected)) <= tolerance(torch.float64, length=length, steps=8)

    back = jacobian.pull_back(pulled)
    missing = relative_error(flat(jacobian.pull(back)), flat(pulled))
    assert missing <= UNSOLVED.get(method.name, SOLVED)
    # The least: no longer than the one it was pulled from, as far as it is solved.
    assert torch.linalg.vector_norm(back) <= torch.linalg.vector_norm(of_weight) * (1 + max(SOLVED, missing))


@SOME
def test_push_is_the_transpose_of_pull(case: Case, method: Factorization) -> None:
    jacobian = jacobian_of(chain_of(method, case.operator))
    moment = torch.randn(jacobian.weight.shape, dtype=torch.float64)
    pulled = jacobian.pull(moment)
    directions = [torch.randn_like(part) for part in pulled]
    left, right = flat(pulled) @ flat(directions), (moment * jacobian.push(directions)).sum()
    scale = torch.linalg.vector_norm(flat(pulled)) * torch.linalg.vector_norm(flat(directions))
    assert abs(left - right) <= tolerance(torch.float64, length=moment.numel(), steps=8) * scale


def explicit(chain: Chain) -> Tensor:
    """The Jacobian as a matrix, one row for each entry of the weight."""
    jacobian = jacobian_of(chain)
    count = jacobian.weight.numel()
    units = torch.eye(count, dtype=torch.float64).view(count, *jacobian.weight.shape)
    return torch.stack([flat(jacobian.pull(unit)) for unit in units])


@st.composite
def factored_linears(draw: st.DrawFn) -> Chain:
    out, columns = draw(st.integers(2, 7)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    chain = named("svd").factor(Linear(weight), (draw(st.integers(1, min(out, columns))),))
    assert isinstance(chain, Chain)
    return chain


@given(factored_linears())
@settings(max_examples=40)
def test_second_moments_go_down_by_the_squares_of_the_jacobian(chain: Chain) -> None:
    """Times, for each factor, how much more of the mean comes through than independent entries would let."""
    jacobian, matrix = jacobian_of(chain), explicit(chain)
    mean, squares = torch.randn(2, *jacobian.weight.shape, dtype=torch.float64)
    squares = squares.square()
    sizes = [operator.weight.numel() for operator in chain.operators]
    parts = [flat([part]) for part in jacobian.pull_squares(squares, mean)]
    for rows, part in zip(matrix.split(sizes, dim=1), parts, strict=True):
        coherence = (rows.T @ mean.flatten()).square().sum() / (rows.square().T @ mean.flatten().square()).sum()
        expected = coherence * (rows.square().T @ squares.flatten())
        assert relative_error(part, expected) <= tolerance(torch.float64, length=mean.numel(), steps=8)


@given(factored_linears(), st.floats(1e-6, 1e3), st.booleans())
@settings(max_examples=40)
def test_a_uniform_second_moment_comes_back_as_it_was(chain: Chain, value: float, still: bool) -> None:
    jacobian = jacobian_of(chain)
    squares = torch.full(jacobian.weight.shape, value, dtype=torch.float64)
    mean = torch.zeros_like(squares) if still else torch.randn_like(squares)
    back = jacobian.pull_back_squares(jacobian.pull_squares(squares, mean), mean)
    assert relative_error(back, squares) <= tolerance(torch.float64, length=squares.numel(), steps=8)


def test_the_core_of_tucker_has_exact_squares() -> None:
    geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), (0, 0))
    operator = Conv(torch.randn(6, 5, 3, 3, dtype=torch.float64), geometry)
    chain = named("tucker").factor(operator, (3, 2))
    assert isinstance(chain, Chain)
    squares = torch.rand(6, 5, 3, 3, dtype=torch.float64)
    sizes = [op.weight.numel() for op in chain.operators]
    exact = (explicit(chain).square().T @ squares.flatten()).split(sizes)
    found = jacobian_of(chain).pull_squares(squares, torch.zeros_like(squares))
    assert relative_error(found[1].flatten(), exact[1]) <= tolerance(torch.float64, length=squares.numel(), steps=8)
    for part, whole in zip(found, exact, strict=True):  # of the other factors, the cross terms are left out
        assert 0.1 < float(part.sum() / whole.sum()) < 10


@SOME
def test_velocities_come_back_as_they_went_down(case: Case, method: Factorization) -> None:
    jacobian = jacobian_of(chain_of(method, case.operator))
    directions = [torch.randn_like(part) for part in jacobian.pull(jacobian.weight)]
    velocity = jacobian.push(directions)
    least = jacobian.push_back(velocity)
    assert relative_error(jacobian.push(least), velocity) <= UNSOLVED.get(method.name, SOLVED)
    assert torch.linalg.vector_norm(flat(least)) <= torch.linalg.vector_norm(flat(directions)) * (1 + SOLVED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_low_precision_are_solved_to_their_own(dtype: torch.dtype) -> None:
    chain = named("svd").factor(Linear(torch.randn(12, 9, dtype=torch.float64)), (4,))
    assert isinstance(chain, Chain)
    jacobian = jacobian_of(chain)
    moments = [moment.to(dtype) for moment in jacobian.pull(torch.randn(12, 9, dtype=torch.float64))]
    again = jacobian.pull(jacobian.pull_back(moments))
    assert relative_error(flat(again), flat(moments)) <= 8 * torch.finfo(dtype).eps * math.sqrt(len(flat(moments)))
