"""The solvers against LAPACK and TensorLy: best approximations, orthonormal bases, monotone energies."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery.chain import relative_error
from surgery.solvers import gram, hooi, reference
from tests.cases import decaying

EXACT = 1e-12
NOISE = 1e-7  # of the largest singular value: what a float64 Gram matrix cannot see (the root of eps, with a margin)
MATRICES = {
    "wide": (1, 5, 12),
    "tall": (1, 12, 5),
    "square": (1, 8, 8),
    "batch": (3, 6, 10),
    "batch of batches": (2, 3, 7, 4),
    "row": (1, 1, 9),
    "column": (1, 9, 1),
    "number": (1, 1, 1),
}


def random(*shape: int, rank: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    if rank is None:
        return matrix
    right = torch.randn(*shape[:-2], shape[-1], rank, generator=generator, dtype=torch.float64)
    return matrix[..., :rank] @ right.mT if rank <= shape[-1] else matrix


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """LAPACK's best approximation."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


matrices = st.builds(
    lambda batch, m, n, rank, seed: random(batch, m, n, rank=min(rank, m, n), seed=seed),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 12),
    st.integers(0, 99),
)


@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES)
def test_low_rank_is_lapacks(shape: tuple[int, ...]) -> None:
    matrix = random(*shape)
    for rank in range(1, min(shape[-2:]) + 1):
        left, right = gram.low_rank(matrix, rank)
        assert left.shape == (*shape[:-1], rank)
        assert right.shape == (*shape[:-2], rank, shape[-1])
        assert left.dtype == right.dtype == torch.float64
        assert relative_error(left @ right, truncated(matrix, rank)) <= EXACT


@given(matrices, st.integers(1, 12))
def test_low_rank_loses_no_more_than_lapack(matrix: Tensor, rank: int) -> None:
    """Also where the rank is above the matrix's own, where the subspace is not unique."""
    rank = min(rank, *matrix.shape[-2:])
    left, right = gram.low_rank(matrix, rank)
    scale = torch.linalg.vector_norm(matrix)
    lost = torch.linalg.vector_norm(left @ right - matrix)
    assert lost <= torch.linalg.vector_norm(truncated(matrix, rank) - matrix) + EXACT * scale
    assert bool(torch.isfinite(left).all())
    assert bool(torch.isfinite(right).all())


@given(matrices, st.integers(1, 12))
def test_low_rank_is_balanced_and_orthogonal(matrix: Tensor, rank: int) -> None:
    rank = min(rank, *matrix.shape[-2:])
    left, right = gram.low_rank(matrix, rank)
    size = float(torch.linalg.vector_norm(matrix))
    for product in (left.mT @ left, right @ right.mT):
        off = product - torch.diag_embed(product.diagonal(dim1=-2, dim2=-1))
        assert float(off.abs().max()) <= NOISE * max(size, 1)
    values = torch.linalg.svdvals(matrix)[..., :rank]
    seen = values > NOISE * max(size, 1)  # a direction without energy has no balance
    for squares in (left.square().sum(-2), right.square().sum(-1)):
        assert torch.allclose(squares[seen], values[seen], rtol=1e-6, atol=0)


@given(matrices)
def test_singular_values_are_lapacks(matrix: Tensor) -> None:
    values = gram.singular_values(matrix)
    expected = torch.linalg.svdvals(matrix)
    assert values.shape == expected.shape
    assert torch.allclose(values, expected, rtol=0, atol=NOISE * float(expected.max()) + 1e-300)
    assert bool((values.diff(dim=-1) <= 0).all())
    assert bool((values >= 0).all())


@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES)
def test_zero_matrices(shape: tuple[int, ...]) -> None:
    zero = torch.zeros(shape)
    left, right = gram.low_rank(zero, 1)
    assert not (left @ right).any()
    assert not gram.singular_values(zero).any()


def test_a_zero_matrix_in_a_batch_leaves_the_others_alone() -> None:
    matrix = random(3, 6, 10)
    matrix[1] = 0
    left, right = gram.low_rank(matrix, 4)
    assert relative_error(left @ right, truncated(matrix, 4)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_low_rank_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    matrix = (random(2, 6, 10) * scale).to(dtype)
    left, right = gram.low_rank(matrix, 3)
    assert relative_error(left @ right, truncated(matrix, 3)) <= EXACT


def test_gram_accumulates_in_float64() -> None:
    matrix = random(2, 4, 1000).float()
    assert torch.equal(gram.gram(matrix), matrix.double() @ matrix.double().mT)


def test_leading_subspace_is_orthonormal_and_sorted() -> None:
    matrix = random(2, 6, 9)
    basis = gram.leading_subspace(gram.gram(matrix), 4)
    assert relative_error(basis.mT @ basis, torch.eye(4).expand(2, 4, 4)) <= EXACT
    energies = torch.linalg.vector_norm(basis.mT @ matrix, dim=-1)
    assert torch.allclose(energies, torch.linalg.svdvals(matrix)[..., :4])


kernels = st.builds(
    lambda shape, rate, seed: decaying_kernel(*shape, rate=rate, seed=seed),
    st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([0.5, 0.8, 1.0]),
    st.integers(0, 99),
)


def decaying_kernel(*shape: int, rate: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.stack([decaying(torch.randn(shape[1:], dtype=torch.float64), rate) for _ in range(shape[0])])


def tucker2_tensor(parts: list[Tensor]) -> Tensor:
    core, out_basis, in_basis = parts
    return torch.einsum("gor,grsk,gis->goik", out_basis, core, in_basis)


def energy(parts: list[Tensor]) -> float:
    return float(parts[0].square().sum())


def ranks_within(kernel: Tensor, ranks: tuple[int, int]) -> tuple[int, int]:
    _, out, columns, taps = kernel.shape
    return min(ranks[0], out, columns * taps), min(ranks[1], columns, out * taps)


any_ranks = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(kernels, any_ranks)
def test_tucker_has_orthonormal_bases_and_a_projected_core(kernel: Tensor, ranks: tuple[int, int]) -> None:
    ranks = ranks_within(kernel, ranks)
    groups, out, columns, taps = kernel.shape
    core, *bases = hooi.tucker2(kernel, ranks)
    assert core.shape == (groups, *ranks, taps)
    for basis, rows, rank in zip(bases, (out, columns), ranks, strict=True):
        assert basis.shape == (groups, rows, rank)
        assert relative_error(basis.mT @ basis, torch.eye(rank).expand(groups, rank, rank)) <= EXACT
    projected = torch.einsum("gor,goik,gis->grsk", bases[0], kernel, bases[1])
    assert relative_error(core, projected) <= EXACT


@given(kernels, any_ranks)
def test_sweeps_never_lower_the_energy(kernel: Tensor, ranks: tuple[int, int]) -> None:
    ranks = ranks_within(kernel, ranks)
    total = float(kernel.square().sum())
    energies = [energy(hooi.tucker2(kernel, ranks, sweeps=sweeps, tolerance=0)) for sweeps in range(6)]
    assert all(after >= before - EXACT * total for before, after in pairwise(energies))
    assert energies[-1] <= total * (1 + EXACT)


@given(kernels, any_ranks)
def test_tucker_error_is_the_lost_energy_and_no_worse_than_hosvds_bound(kernel: Tensor, ranks: tuple[int, int]) -> None:
    """A truncated HOSVD loses at most the sum of what its unfoldings lose (De Lathauwer et al. 2000)."""
    ranks = ranks_within(kernel, ranks)
    parts = hooi.tucker2(kernel, ranks)
    total = float(kernel.square().sum())
    lost = float((tucker2_tensor(parts) - kernel).square().sum())
    assert lost == pytest.approx(total - energy(parts), abs=EXACT * total)
    unfoldings = kernel.flatten(2), kernel.transpose(1, 2).flatten(2)
    bound = sum(float(gram.singular_values(u)[:, r:].square().sum()) for u, r in zip(unfoldings, ranks, strict=True))
    assert lost <= bound + NOISE * total


@given(kernels, any_ranks)
def test_tucker_is_near_tensorlys_and_energy_grows_with_rank(kernel: Tensor, ranks: tuple[int, int]) -> None:
    ranks = ranks_within(kernel, ranks)
    ours = relative_error(tucker2_tensor(hooi.tucker2(kernel, ranks)), kernel)
    theirs = relative_error(tucker2_tensor(reference.tucker2(kernel, ranks)), kernel)
    assert ours <= 1.05 * theirs + NOISE  # on small random kernels the two may end in different local optima


def test_tucker_is_exact_where_one_rank_decides() -> None:
    """At ro >= ri K the out basis loses nothing, so that the best in basis gives the best of all."""
    for seed in range(5):
        kernel = random(1, 9, 5, 3, seed=seed)
        best = float(gram.singular_values(kernel.transpose(1, 2).flatten(2))[:, :2].square().sum())
        for rank_out in range(6, 10):
            assert energy(hooi.tucker2(kernel, (rank_out, 2))) == pytest.approx(best, rel=EXACT)


def test_large_modes_take_orthogonal_steps_and_stay_near_tensorly() -> None:
    kernel = decaying_kernel(1, 144, 136, 3, rate=0.9, seed=0)
    for ranks in [(36, 34), (72, 68), (16, 60)]:
        parts = hooi.tucker2(kernel, ranks)
        assert relative_error(parts[1].mT @ parts[1], torch.eye(ranks[0])[None]) <= EXACT
        ours = relative_error(tucker2_tensor(parts), kernel)
        assert ours <= 1.002 * relative_error(tucker2_tensor(reference.tucker2(kernel, ranks)), kernel)


def test_tucker_keeps_float32() -> None:
    assert {part.dtype for part in hooi.tucker2(random(2, 6, 5, 9).float(), (3, 2))} == {torch.float32}


def test_tucker_of_zero_is_zero() -> None:
    parts = hooi.tucker2(torch.zeros(2, 6, 5, 9), (3, 2))
    assert not parts[0].any()
    assert all(bool(torch.isfinite(part).all()) for part in parts)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tucker_at_any_scale(scale: float) -> None:
    kernel = random(2, 6, 5, 9).float()
    expected = tucker2_tensor(hooi.tucker2(kernel, (3, 2)))
    assert relative_error(tucker2_tensor(hooi.tucker2(kernel * scale, (3, 2))), expected * scale) <= 1e-4


def test_the_reference_is_tensorlys_truncation() -> None:
    matrix = random(2, 6, 10)
    left, right = reference.low_rank(matrix, 3)
    assert relative_error(left @ right, truncated(matrix, 3)) <= EXACT


def test_the_reference_reconstructs_as_tensorly_does() -> None:
    import tensorly
    from tensorly.tucker_tensor import tucker_to_tensor

    tensorly.set_backend("pytorch")
    core, out_basis, in_basis = reference.tucker2(random(1, 6, 5, 9), (3, 2))
    theirs = tucker_to_tensor((core[0], [out_basis[0], in_basis[0], torch.eye(9, dtype=torch.float64)]))
    assert relative_error(tucker2_tensor([core, out_basis, in_basis])[0], theirs) <= EXACT
