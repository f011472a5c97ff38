"""EVBMF against the published numbers, planted ranks, a brute-force search, and matrices that break naive code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from surgery.errors import InputError
from surgery.plans.vbmf import _edge, evbmf, evbmf_rank
from surgery.solvers.gram import singular_values

Matrix = np.ndarray


def planted(rows: int, columns: int, rank: int, amplitude: float) -> Tensor:
    """A rank-r product plus unit noise; ``amplitude`` is the standard deviation of the product's entries."""
    signal = torch.randn(rows, rank) @ torch.randn(rank, columns) / math.sqrt(max(rank, 1))
    return amplitude * signal + torch.randn(rows, columns)


def free_energy(noise: float, values: Matrix, rows: int, columns: int, edge: float) -> float:
    """The objective of Nakajima et al., as it is written there (the terms that do not depend on the noise included)."""
    alpha = rows / columns
    x = values**2 / (columns * noise)
    kept = x[x > edge]
    tau = (kept - (1 + alpha) + np.sqrt((kept - (1 + alpha)) ** 2 - 4 * alpha)) / 2
    extra = np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau
    return float((x - np.log(x)).sum() + extra.sum())


def public_rank(values: Matrix, rows: int, columns: int) -> int:
    """What the well-known public implementation computes: 2.5129 sqrt(alpha), one bounded scalar minimisation."""
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    most = min(math.ceil(rows / (1 + alpha)) - 1, rows)
    low = max(values[most] ** 2 / (columns * edge), np.mean(values[most:] ** 2) / columns)
    high = np.sum(values**2) / (rows * columns)
    found = minimize_scalar(free_energy, args=(values, rows, columns, edge), bounds=(low, high), method="bounded")
    return int((values > math.sqrt(columns * found.x * edge)).sum())


# -- published numbers ---------------------------------------------------------------------------------------------


def test_the_published_planted_example() -> None:
    """Rank 128 in 512 x 4608, as measured on the public code: 0, 0, 44 and 126 are seen."""
    signal, noise = torch.randn(512, 128) @ torch.randn(128, 4608) / math.sqrt(128), torch.randn(512, 4608)
    seen = [evbmf_rank(singular_values(a * signal + noise), 512, 4608) for a in (0.1, 0.25, 0.5, 1.0)]
    assert seen[:2] == [0, 0]
    assert abs(seen[2] - 44) <= 2  # it depends on the random numbers
    assert abs(seen[3] - 126) <= 1


def test_the_threshold_is_the_published_one_for_square_matrices_and_near_it_for_others() -> None:
    tau = 2.5129
    assert _edge(1.0) == pytest.approx((1 + tau) * (1 + 1 / tau), abs=1e-4)
    for alpha in (0.9, 0.5, 0.1, 0.01):
        tau = 2.5129 * math.sqrt(alpha)
        assert _edge(alpha) == pytest.approx((1 + tau) * (1 + alpha / tau), rel=0.03)
        assert _edge(alpha) > (1 + math.sqrt(alpha)) ** 2  # above the bulk of the noise


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (30, 90), (16, 400)])
@pytest.mark.parametrize("rank", [0, 3, 9])
def test_it_agrees_with_the_public_implementation_where_the_rank_is_clear(rows: int, columns: int, rank: int) -> None:
    values = singular_values(planted(rows, columns, rank, 6.0)).numpy()
    assert evbmf_rank(values, rows, columns) == public_rank(values, rows, columns) == rank


# -- planted ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (64, 576), (576, 64), (10, 3), (256, 27), (1, 50), (2, 2)])
def test_fresh_weights_are_noise(shape: tuple[int, int]) -> None:
    assert evbmf_rank(singular_values(torch.randn(shape) * 0.02), *shape) == 0


@pytest.mark.parametrize("amplitude", [4.0, 40.0])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_strong_planted_rank_is_found_and_its_noise_estimated(rank: int, amplitude: float) -> None:
    values = singular_values(planted(48, 200, rank, amplitude))
    found = evbmf(values, 48, 200)
    assert found.rank == rank
    assert found.noise_variance == pytest.approx(1.0, rel=0.1)
    assert bool((found.values < values[:rank].numpy()).all())
    assert bool((found.values > 0.5 * values[:rank].numpy()).all())


def test_a_weaker_signal_shows_less() -> None:
    signal, noise = torch.randn(96, 24) @ torch.randn(24, 500) / math.sqrt(24), torch.randn(96, 500)
    seen = [evbmf_rank(singular_values(a * signal + noise), 96, 500) for a in (0.1, 0.25, 0.5, 1.0, 4.0)]
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert 0 < seen[2] < 24
    assert seen[-1] == 24


def test_both_orientations_agree() -> None:
    matrix = planted(40, 130, 6, 1.0)
    one, other = evbmf(singular_values(matrix), 40, 130), evbmf(singular_values(matrix.mT), 130, 40)
    assert one.rank == other.rank > 0
    assert one.noise_variance == pytest.approx(other.noise_variance, rel=1e-9)


def test_a_known_noise_variance_is_used() -> None:
    values = singular_values(planted(48, 200, 5, 4.0))
    assert evbmf_rank(values, 48, 200, sigma2=1.0) == 5
    assert evbmf_rank(values, 48, 200, sigma2=1e6) == 0
    assert evbmf(values, 48, 200, sigma2=0.0).rank == 48
    assert evbmf(values, 48, 200, sigma2=1.0).noise_variance == pytest.approx(1.0)


# -- the search ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(2, 24), st.integers(0, 40), st.floats(0.01, 0.6))
def test_no_point_of_a_fine_grid_has_less_free_energy(seed: int, rows: int, more: int, rate: float) -> None:
    """Decaying spectra cross the threshold one by one: the objective then has many local minima."""
    rng = np.random.default_rng(seed)
    values = np.sort(np.exp(-rate * np.arange(rows)) * rng.uniform(0.5, 1.5, rows))[::-1].copy()
    columns = rows + more
    edge = _edge(rows / columns)
    found = evbmf(values, rows, columns)
    most = math.ceil(rows / (1 + rows / columns)) - 1
    low = max(values[most] ** 2 / (columns * edge), np.mean(values[most:] ** 2) / columns)
    grid = np.geomspace(low, (values**2).sum() / (rows * columns), 500)
    best = min(free_energy(noise, values, rows, columns, edge) for noise in grid)
    assert free_energy(found.noise_variance, values, rows, columns, edge) <= best + 1e-6 * rows


# -- what breaks naive code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_an_exact_low_rank_matrix_has_no_noise(rank: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(40, rank, dtype=dtype) @ torch.randn(rank, 90, dtype=dtype)
    for values in (singular_values(matrix), torch.linalg.svdvals(matrix)):
        found = evbmf(values, 40, 90)
        assert found.rank == rank
        assert found.noise_variance < 1e-9 * float(values[0] ** 2)
        np.testing.assert_allclose(found.values, values[:rank].double().numpy(), rtol=1e-6)


def test_a_zero_matrix_has_rank_0() -> None:
    found = evbmf(torch.zeros(8), 8, 20)
    assert (found.rank, found.noise_variance) == (0, 0.0)
    assert evbmf_rank(np.zeros((0, 8)), 8, 20) == 0


def test_equal_singular_values_carry_no_signal() -> None:
    assert evbmf_rank(np.ones(16), 16, 16) == 0


def test_tiny_and_huge_scales() -> None:
    values = singular_values(planted(30, 80, 4, 8.0)).numpy()
    for scale in (1e-200, 1e-150, 1e-30, 1e30, 1e150, 1e250):
        assert evbmf(values * scale, 30, 80).rank == evbmf_rank(values * scale, 30, 80) == 4


numbers = st.floats(0, 1e6, allow_subnormal=False)


@given(st.lists(numbers, max_size=12), st.integers(0, 30), st.booleans())
def test_any_values_give_a_rank_without_a_warning(values: list[float], more: int, tall: bool) -> None:
    short, long_side = max(1, len(values)), max(1, len(values)) + more
    rows, columns = (long_side, short) if tall else (short, long_side)
    found = evbmf(np.array(values, dtype=float), rows, columns)
    assert 0 <= found.rank <= short
    assert np.isfinite(found.values).all()
    assert found.noise_variance >= 0
    assert evbmf_rank(np.array(values, dtype=float), rows, columns) == found.rank
    assert bool((found.values >= 0).all())
    assert bool((np.diff(found.values) <= 1e-9 * found.values[:-1]).all())  # equal values may differ in the last bits


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_the_rank_does_not_depend_on_the_scale(seed: int, scale: float) -> None:
    values = np.random.default_rng(seed).exponential(size=12)
    one, other = evbmf(values, 12, 30), evbmf(values * scale, 12, 30)
    assert one.rank == other.rank
    assert other.noise_variance == pytest.approx(one.noise_variance * scale**2, rel=1e-6)


def test_a_batch_has_the_largest_rank_of_its_groups() -> None:
    groups = torch.stack([planted(20, 60, rank, 8.0) for rank in (0, 2, 5)] + [torch.zeros(20, 60)])
    assert evbmf_rank(singular_values(groups), 20, 60) == 5
    each = [evbmf_rank(values, 20, 60) for values in singular_values(groups)]
    assert each == [0, 2, 5, 0]


def test_many_small_groups_are_quick_and_right() -> None:
    groups = torch.zeros(3000, 9, 9)
    groups[1234] = 5 * torch.outer(torch.randn(9), torch.randn(9))
    assert evbmf_rank(singular_values(groups), 9, 9) == 1


def test_order_and_missing_zeros_do_not_matter() -> None:
    values = np.array([9.0, 8.0, 0.3, 0.2])
    assert evbmf_rank(values[::-1], 12, 20) == evbmf_rank(np.pad(values, (0, 8)), 12, 20)


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, -1.0], [math.inf, 1.0], [1.0, 1.0, 1.0]])
def test_what_are_no_singular_values_is_an_error(values: list[float]) -> None:
    with pytest.raises(InputError):
        evbmf_rank(np.array(values), 2, 5)


def test_a_bad_noise_variance_or_shape_is_an_error() -> None:
    with pytest.raises(InputError, match="sigma2"):
        evbmf_rank(np.ones(3), 3, 3, sigma2=-1.0)
    with pytest.raises(InputError, match="0x4"):
        evbmf_rank(np.ones(3), 0, 4)
    with pytest.raises(InputError, match="evbmf_rank"):
        evbmf(np.ones((2, 3)), 3, 3)
