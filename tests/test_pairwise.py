"""Pairwise perturbation: its MTTKRPs against exact ones, and the fits it ends at, for CP and for Tucker."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.algebra import relative_error
from surgery.errors import InputError, RankError
from surgery.solvers.cp import cp
from surgery.solvers.cp_model import CpModel
from surgery.solvers.pairwise import Perturbed, drift
from surgery.solvers.tucker import TuckerResult, tucker
from tests.test_cp import LETTERS, as_tensor, planted, random

EXACT = 1e-11
METHODS = ("als", "pp")
ORDERS = {3: (14, 15, 16), 4: (8, 9, 7, 6), 5: (6, 5, 4, 5, 4), 6: (4, 3, 4, 3, 4, 3)}
shapes = st.lists(st.integers(2, 5), min_size=2, max_size=6).map(tuple)


def compose_tucker(result: TuckerResult) -> Tensor:
    letters = LETTERS[: len(result.factors)]
    parts = [f"g{letters}", *(f"g{c.upper()}{c}" for c in letters)]
    return torch.einsum(",".join(parts) + f"->g{letters.upper()}", result.core, *result.factors)


def model_at(tensor: Tensor, rank: int, seed: int) -> CpModel:
    factors = [random(len(tensor), rank, size, seed=seed + i) for i, size in enumerate(tensor.shape[1:])]
    return CpModel(tensor.numpy(), [factor.numpy() for factor in factors])


def errors_of_mttkrps(tensor: Tensor, rank: int, step: float, seed: int) -> list[float]:
    """Relative errors of the perturbed MTTKRPs a step away from where the pair operators were built."""
    model = model_at(tensor, rank, seed)
    perturbed = Perturbed(model)
    moves = [random(*factor.shape, seed=seed + 50 + i).numpy() for i, factor in enumerate(model.factors)]
    model.factors = [factor + step * move for factor, move in zip(model.factors, moves, strict=True)]
    exact: dict[int, Tensor] = {}
    for mode in model.modes:
        operands = [f"gr{LETTERS[other]}" for other in model.modes if other != mode]
        subscripts = ",".join([f"g{LETTERS[: len(model.modes)]}", *operands]) + f"->gr{LETTERS[mode]}"
        others = (as_tensor(f) for i, f in enumerate(model.factors) if i != mode)
        exact[mode] = torch.einsum(subscripts, tensor, *others)
    return [relative_error(as_tensor(perturbed.mttkrp(mode)), exact[mode]) for mode in model.modes]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), shapes, st.integers(1, 4), st.integers(0, 99))
def test_mttkrps_are_exact_where_they_should_be(groups: int, sizes: tuple[int, ...], rank: int, seed: int) -> None:
    """Without a step on any tensor; at any step on a tensor that is the model itself, and on a matrix."""
    tensor = random(groups, *sizes, seed=seed + 7)
    assert max(errors_of_mttkrps(tensor, rank, 0.0, seed)) <= EXACT
    same = planted(groups, sizes, rank, seed=seed)
    factors = [random(groups, size, rank, seed=seed + i) for i, size in enumerate(sizes)]
    model = CpModel(same.numpy(), [factor.mT.numpy() for factor in factors])
    perturbed = Perturbed(model)
    moves = [random(*factor.shape, seed=seed + 50 + i).numpy() for i, factor in enumerate(model.factors)]
    model.factors = [factor + move for factor, move in zip(model.factors, moves, strict=True)]
    for mode in model.modes:
        others = [as_tensor(factor) for i, factor in enumerate(model.factors) if i != mode]
        start = [factor for i, factor in enumerate(factors) if i != mode]
        mixed = math.prod(new @ old for new, old in zip(others, start, strict=True))
        assert relative_error(as_tensor(perturbed.mttkrp(mode)), mixed @ factors[mode].mT) <= EXACT * 100
    if len(sizes) == 2:
        assert max(errors_of_mttkrps(tensor, rank, 1.0, seed)) <= EXACT


@pytest.mark.parametrize("order", ORDERS)
def test_mttkrps_are_off_by_the_second_order(order: int) -> None:
    tensor = random(2, *ORDERS[order], seed=3)
    coarse, fine = (errors_of_mttkrps(tensor, 4, step, 0) for step in (1e-2, 1e-3))
    assert all(small <= large / 50 for large, small in zip(coarse, fine, strict=True))
    assert max(fine) <= 1e-3


def test_drift_is_the_largest_relative_change() -> None:
    before = [np.ones((2, 3, 4)), np.ones((2, 3, 5))]
    after = [before[0], before[1].copy()]
    after[1][1] = 2.0
    assert drift(before, before) == 0
    assert drift(before, after) == pytest.approx(0.5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_cp_ends_at_the_same_fit(order: int, noise: float) -> None:
    tensor = planted(1, ORDERS[order], 3, noise=noise)
    exact, perturbed = (cp(tensor, 3, method=method, sweeps=300, tolerance=1e-7) for method in METHODS)
    assert perturbed.error == pytest.approx(exact.error, rel=1e-3)


def test_cp_of_float32_batches_ends_at_the_same_fit() -> None:
    tensor = planted(3, ORDERS[3], 4, noise=0.1).float()
    exact, perturbed = (cp(tensor, 4, method=method, sweeps=200) for method in METHODS)
    assert perturbed.error == pytest.approx(exact.error, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ORDERS)
def test_tucker_has_orthonormal_bases_and_an_honest_error(order: int, method: str) -> None:
    tensor = random(2, *ORDERS[order])
    ranks = tuple(max(1, size // 2) for size in ORDERS[order])
    found = tucker(tensor, ranks, method=method)
    assert tuple(found.core.shape) == (2, *ranks)
    for factor, size, rank in zip(found.factors, ORDERS[order], ranks, strict=True):
        assert factor.shape == (2, size, rank)
        assert relative_error(factor.mT @ factor, torch.eye(rank).expand(2, -1, -1)) <= EXACT
    assert found.error == pytest.approx(relative_error(compose_tucker(found), tensor), rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_tucker_is_tensorlys_and_both_methods_agree(order: int) -> None:
    import tensorly
    from tensorly.decomposition import tucker as reference

    tensorly.set_backend("pytorch")
    ranks = (2, 3, 2, 2, 2, 2)[:order]
    tensor = planted(1, ORDERS[order], 2) + 0.5 * planted(1, ORDERS[order], 1).std() * random(1, *ORDERS[order], seed=5)
    exact, perturbed = (tucker(tensor, ranks, method=method, sweeps=100, tolerance=1e-7) for method in METHODS)
    core, factors = reference(tensor[0], rank=list(ranks), n_iter_max=100, tol=1e-9)
    theirs = relative_error(tensorly.tucker_to_tensor((core, factors))[None], tensor)
    assert perturbed.error == pytest.approx(exact.error, rel=1e-3)
    assert exact.error <= 1.002 * theirs


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=3, max_size=5).map(tuple), st.integers(0, 99))
def test_tucker_sweeps_never_raise_the_error(sizes: tuple[int, ...], seed: int) -> None:
    tensor = random(1, *sizes, seed=seed)
    ranks = tuple((size + 1) // 2 for size in sizes)
    errors = [tucker(tensor, ranks, sweeps=sweeps, tolerance=0).error for sweeps in range(5)]
    assert all(after <= before + EXACT for before, after in pairwise(errors))


@pytest.mark.parametrize("method", METHODS)
def test_full_ranks_are_exact(method: str) -> None:
    tensor = random(2, 3, 4, 5)
    found = tucker(tensor, (3, 4, 5), method=method)
    assert relative_error(compose_tucker(found), tensor) <= EXACT
    assert found.error <= 1e-7  # what one minus a share close to one cannot see


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_tucker_at_any_scale_keeps_float32(scale: float) -> None:
    tensor = random(2, 5, 6, 7).float()
    found = tucker(tensor * scale, (2, 3, 3))
    assert {part.dtype for part in (found.core, *found.factors)} == {torch.float32}
    if not scale:
        assert not found.core.any()
        return
    assert found.error == pytest.approx(tucker(tensor, (2, 3, 3)).error, rel=1e-3)
    assert relative_error(compose_tucker(found), tensor * scale) == pytest.approx(found.error, rel=1e-3)


def test_what_tucker_refuses() -> None:
    tensor = random(1, 3, 4, 5)
    with pytest.raises(RankError, match="allowed"):
        tucker(tensor, (3, 5, 5))
    with pytest.raises(RankError, match="allowed"):
        tucker(tensor, (3, 4))
    with pytest.raises(InputError, match="allowed"):
        tucker(tensor, (3, 4, 5), method="newton")
    with pytest.raises(InputError, match="allowed"):
        tucker(random(1, 3, 4), (3, 4))
