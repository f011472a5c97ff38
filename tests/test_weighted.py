"""The algebra of weighted approximation: metrics, the closed form, and the Gauss-Newton refinement."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery.solvers.gram import low_rank as plain_low_rank
from surgery.solvers.weighted import (
    SecondMoment,
    equal_norms,
    low_rank,
    refine,
    root_of,
    symmetric_root,
    times_channels,
    times_rows,
)

EXACT = 1e-10  # float64, with condition numbers up to about 1e3


def moment(groups: int, size: int, rank: int, seed: int) -> Tensor:
    """A second moment of that rank in each group, with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, rank, size, generator=generator, dtype=torch.float64)
    return (rows * 0.8 ** torch.arange(rank, dtype=torch.float64)[:, None]).mT @ rows


def matrix(groups: int, rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(groups, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(weight: Tensor, second: Tensor, rank: int) -> float:
    """The least error by Eckart-Young for W C^(1/2): what the singular values after the first ``rank`` add up to."""
    values, vectors = torch.linalg.eigh(second)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    return float(torch.linalg.svdvals(weight @ root)[:, rank:].square().sum())


def as_metric(second: Tensor, taps: int = 1) -> SecondMoment:
    return SecondMoment((second,), taps)


@given(st.integers(1, 2), st.integers(1, 9), st.integers(2, 9), st.integers(0, 10_000), st.data())
def test_the_closed_form_is_the_best_of_its_rank(
    groups: int, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = matrix(groups, rows, columns, seed)
    metric = as_metric(moment(groups, columns, columns, seed + 1)).regularise(1e-3)
    left, right = low_rank(weight, rank, metric)
    error, scale = float(metric.energy(weight - left @ right)), float(metric.energy(weight))
    assert error == pytest.approx(brute_force(weight, metric.factors[0], rank), rel=1e-6, abs=EXACT * scale)
    assert torch.allclose(left.mT @ left, right @ right.mT, atol=EXACT * float(left.square().sum()))  # balanced
    plain_left, plain_right = plain_low_rank(weight, rank)
    assert error <= float(metric.energy(weight - plain_left @ plain_right)) + EXACT * scale


@given(st.integers(1, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 10_000))
def test_what_the_inputs_never_show_costs_nothing(rows: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    second = moment(1, columns, rank, seed)
    weight = matrix(1, rows, columns, seed + 1)
    left, right = low_rank(weight, rank, as_metric(second).regularise(1e-9))
    error = as_metric(second).energy(weight - left @ right)
    assert float(error) <= 1e-6 * float(as_metric(second).energy(weight))


@given(st.integers(2, 6), st.integers(1, 9), st.integers(0, 10_000))
def test_a_diagonal_is_the_matrix_with_that_diagonal(columns: int, rows: int, seed: int) -> None:
    diagonal = matrix(1, 1, columns, seed)[:, 0].square() + 0.01
    weight, rank = matrix(1, rows, columns, seed + 1), min(2, rows, columns)
    for narrow, wide in ((SecondMoment((diagonal,)), SecondMoment((torch.diag_embed(diagonal),))),):
        assert torch.allclose(narrow.times(weight), wide.times(weight))
        first, second = (torch.matmul(*low_rank(weight, rank, metric)) for metric in (narrow, wide))
        assert torch.allclose(first, second, atol=1e-8)


@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_a_product_is_its_kronecker_matrix(groups: int, channels: int, taps: int, seed: int) -> None:
    parts = moment(groups, channels, channels, seed), moment(groups, taps, taps, seed + 1)
    whole = torch.stack([torch.kron(a, b) for a, b in zip(*parts, strict=True)])
    weight = matrix(groups, 3, channels * taps, seed + 2)
    product, dense = SecondMoment(parts, taps), SecondMoment((whole,), taps)
    assert torch.allclose(product.times(weight), dense.times(weight))
    assert torch.allclose(product.energy(weight), dense.energy(weight))
    mean = parts[1].diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert torch.allclose(dense.channels, parts[0] * mean)
    inverse = symmetric_root(product.channels, 0.1).inverse
    assert torch.allclose(
        product.whitened(inverse).times(weight), dense.whitened(inverse).times(weight), atol=1e-8, rtol=1e-6
    )


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_roots_are_roots_of_what_is_made_positive(size: int, rank: int, seed: int) -> None:
    second = moment(2, size, rank, seed)
    second[0] -= 1e-9 * torch.eye(size, dtype=second.dtype)  # as rounding may leave it
    found = symmetric_root(second, 1e-3)
    mean = second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    ridged = second + 1e-3 * mean * torch.eye(size, dtype=second.dtype)
    assert torch.allclose(found.matrix @ found.matrix, ridged, atol=1e-7 * float(mean.max()))
    one = torch.eye(size, dtype=second.dtype).expand(2, size, size)
    assert torch.allclose(found.matrix @ found.inverse, one, atol=1e-7)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_every_root_gives_its_moment_and_is_solved_from_both_sides(size: int, rank: int, seed: int) -> None:
    """A triangle where the moment is definite, a symmetric root where it is not, and the diagonal of a diagonal."""
    second = moment(2, size, rank, seed)
    shifted = second - 2e-3 * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(size)
    x = matrix(2, size, 3, seed + 1)
    for given_, ridge in ((second, 1e-3), (shifted, 0.01), (second.diagonal(dim1=1, dim2=2).clone(), 1e-3)):
        before = given_.clone()
        found = root_of(given_.clone, ridge)
        assert torch.equal(given_, before)
        dense = found.matrix if found.matrix.dim() == 3 else torch.diag_embed(found.matrix)
        assert torch.allclose(dense @ found.solve(x), x, atol=1e-7)
        assert torch.allclose(dense.mT @ found.solve_turned(x), x, atol=1e-7)
        assert torch.allclose(times_rows(found.turned, x), dense.mT @ x)
    assert root_of(second.clone, 1e-3).triangular
    whole = root_of(second.clone, 1e-3).matrix
    mean = second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert torch.allclose(whole @ whole.mT, second + 1e-3 * mean * torch.eye(size), atol=1e-9 * float(mean.max()))


def test_a_zero_moment_gets_the_identity() -> None:
    metric = as_metric(torch.zeros(1, 3, 3, dtype=torch.float64)).regularise(1e-3)
    assert torch.equal(metric.factors[0], torch.eye(3, dtype=torch.float64).unsqueeze(0))


def product(factors: Sequence[Tensor]) -> Tensor:
    """A kernel (1, O, I) of three factors."""
    return torch.linalg.multi_dot([factor[0] for factor in factors]).unsqueeze(0)


@given(st.integers(1, 3), st.integers(0, 10_000))
def test_refinement_never_goes_back_and_finds_the_best_nearby(rank: int, seed: int) -> None:
    weight, metric = matrix(1, 6, 5, seed), as_metric(moment(1, 5, 5, seed + 1)).regularise(1e-2)
    left, right = low_rank(weight, rank, metric)
    middle = torch.eye(rank, dtype=torch.float64).unsqueeze(0)
    start = [part + 0.02 * matrix(1, part.shape[1], part.shape[2], seed + 2) for part in (left, middle, right)]
    before = float(metric.energy(weight - product(start)))
    once = float(metric.energy(weight - product(refine(product, start, weight, metric, steps=1, iterations=2))))
    found = float(metric.energy(weight - product(refine(product, start, weight, metric, steps=20, iterations=20))))
    best = brute_force(weight, metric.factors[0], rank)
    assert best - EXACT <= min(found, once)
    assert max(found, once) <= before
    assert found - best <= max(0.5 * (before - best), 3e-3 * before)  # a step that gains less is the last


def test_equal_norms_keep_the_product() -> None:
    factors = [matrix(1, 3, 3, seed) * 10.0**seed for seed in range(3)]
    equal = equal_norms(factors)
    assert torch.allclose(product(equal), product(factors))
    assert torch.allclose(torch.stack([f.norm() for f in equal]), equal[0].norm().expand(3))
    zero = [torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]
    assert equal_norms(zero) == zero


def test_channels_are_multiplied_at_every_tap() -> None:
    weight, factor = matrix(2, 3, 8, 0), moment(2, 4, 4, 1)
    expected = weight @ torch.stack([torch.kron(f, torch.eye(2, dtype=f.dtype)) for f in factor])
    assert torch.allclose(times_channels(weight, factor, 2), expected)
