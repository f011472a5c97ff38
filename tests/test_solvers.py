"""The solvers against LAPACK and TensorLy: best approximations, orthonormal bases, monotone energies."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery.algebra import relative_error
from surgery.errors import InputError
from surgery.solvers import gram, hooi, reference
from tests.cases import decaying
from tests.covering import in_turns

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
    assert left.dtype == right.dtype == dtype
    expected = truncated(matrix, 3)
    assert relative_error(left.double() @ right.double(), expected) <= max(EXACT, torch.finfo(dtype).eps)


LARGE = {"square": (1, 224, 224), "wide": (1, 200, 600), "tall": (1, 500, 224), "batch": (2, 208, 260)}
SPECTRA = {  # singular values over i / n, whose sum of squares is all but flat, all but one value, or quick to fall
    "random": None,
    "power": lambda i: i**-0.7,
    "steep power": lambda i: i**-1.4,
    "exponential": lambda i: torch.exp(-20 * i / len(i)),
    "equal": torch.ones_like,
    "one large": lambda i: torch.where(i == 1, 1e3, 1.0),
    "low rank and noise": lambda i: torch.where(i <= len(i) // 4, 1.0, 1e-2),
    "low rank": lambda i: torch.where(i <= len(i) // 8, 1.0, 0.0),
}


def with_spectrum(shape: tuple[int, ...], values: Callable[[Tensor], Tensor] | None) -> Tensor:
    matrix = random(*shape)
    if values is None:
        return matrix
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * values(torch.arange(1.0, min(shape[-2:]) + 1, dtype=torch.float64))) @ right


@pytest.mark.parametrize(("spectrum", "shape"), in_turns(list(SPECTRA.values()), list(LARGE.values())))
def test_low_rank_of_a_large_float32_matrix_is_nearly_lapacks(
    shape: tuple[int, ...], spectrum: Callable[[Tensor], Tensor] | None
) -> None:
    """Ranks that take filters, an eigendecomposition, and further ones of what the first leaves."""
    matrix = with_spectrum(shape, spectrum).float()
    full = min(shape[-2:])
    for rank in (1, full // 8, full // 4, full // 2, full - 1, full):
        left, right = gram.low_rank(matrix, rank)
        assert left.dtype == right.dtype == torch.float32
        best = relative_error(truncated(matrix, rank), matrix)
        error = relative_error(left.double() @ right.double(), matrix)
        assert error <= 1.002 * best + math.sqrt(full) * torch.finfo(torch.float32).eps  # an orthonormal basis rounded
        balance = left.square().sum(-2) / right.square().sum(-1)
        kept = torch.linalg.svdvals(matrix.double())[..., :rank] > 1e-3 * float(
            torch.linalg.matrix_norm(matrix, 2).max()
        )
        assert torch.allclose(balance[kept], torch.ones(()), rtol=1e-3)


def test_filters_and_eigendecompositions_agree_and_repeat() -> None:
    matrix = with_spectrum((1, 224, 300), SPECTRA["power"]).float()
    errors = []
    for rank in (54, 55, 56, 57):  # a quarter of 224 is 56
        left, right = gram.low_rank(matrix, rank)
        assert torch.equal(left, gram.low_rank(matrix, rank)[0])
        errors.append(relative_error(left @ right, matrix))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_low_rank_of_a_large_float32_matrix_at_any_scale(scale: float) -> None:
    matrix = random(1, 224, 300).float()
    for rank in (8, 112):
        left, right = gram.low_rank(matrix * scale, rank)
        expected = gram.low_rank(matrix, rank)
        assert relative_error(left.double() @ right.double() / scale, expected[0] @ expected[1]) <= 1e-3


def test_a_large_zero_matrix_in_a_batch_leaves_the_others_alone() -> None:
    matrix = random(3, 200, 210).float()
    matrix[1] = 0
    for rank in (8, 100):
        left, right = gram.low_rank(matrix, rank)
        assert not (left @ right)[1].any()
        best = relative_error(truncated(matrix, rank), matrix)
        assert relative_error(left.double() @ right.double(), matrix) <= 1.002 * best


def test_gram_accumulates_in_float64() -> None:
    matrix = random(2, 4, 1000).float()
    assert torch.equal(gram.gram(matrix), matrix.double() @ matrix.double().mT)


@pytest.mark.parametrize("shape", [(1, 1030, 1100), (1100, 1030)])
def test_large_matrices_are_decomposed_in_their_place(shape: tuple[int, ...]) -> None:
    matrix = random(*shape)
    squares = gram.gram(matrix if len(shape) > 2 else matrix.mT)
    wanted = torch.linalg.eigvalsh(squares).flip(-1)
    given = squares.clone()
    values, vectors = gram.leading_eigen(given, 40)
    assert not torch.equal(given, -squares)
    assert vectors.shape == (*squares.shape[:-1], 40)
    assert relative_error(values, wanted[..., :40]) <= EXACT
    assert relative_error(squares @ vectors, vectors * values.unsqueeze(-2)) <= EXACT
    assert relative_error(gram.singular_values(matrix).square(), wanted) <= EXACT


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


def relative_to(tensor: Tensor, parts: list[Tensor], equation: str) -> float:
    return relative_error(torch.einsum(equation, *parts), tensor)


def test_the_references_cp_is_parafac_with_its_weights_absorbed() -> None:
    tensor = torch.einsum("gar,gbr,gcr->gabc", random(2, 5, 2), random(2, 4, 2, seed=1), random(2, 3, 2, seed=2))
    factors = reference.cp(tensor, 2)
    assert [tuple(factor.shape) for factor in factors] == [(2, 5, 2), (2, 4, 2), (2, 3, 2)]
    assert relative_to(tensor, factors, "gar,gbr,gcr->gabc") <= 1e-3
    assert relative_to(tensor, reference.cp(tensor, 2, sweeps=1), "gar,gbr,gcr->gabc") > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_references_train_is_tensorlys(dtype: torch.dtype) -> None:
    import tensorly
    from tensorly.decomposition import tensor_train

    tensor = random(2, 6, 3, 3, 5).to(dtype)
    cores = reference.tensor_train(tensor, (4, 5, 3))
    assert [tuple(core.shape) for core in cores] == [(2, 1, 6, 4), (2, 4, 3, 5), (2, 5, 3, 3), (2, 3, 5, 1)]
    tensorly.set_backend("pytorch")
    theirs = torch.stack([tensor_train(single, [1, 4, 5, 3, 1]).to_tensor() for single in tensor])
    assert relative_to(theirs, cores, "gpar,grbs,gsct,gtdp->gabcd") <= 8 * torch.finfo(dtype).eps


def test_the_references_train_is_filled_to_the_ranks() -> None:
    tensor = random(1, 3, 2, 4)
    cores = reference.tensor_train(tensor, (5, 6))
    assert [tuple(core.shape) for core in cores] == [(1, 1, 3, 5), (1, 5, 2, 6), (1, 6, 4, 1)]
    assert relative_to(tensor, cores, "gpar,grbs,gscp->gabc") <= EXACT


@pytest.mark.parametrize("ranks", [(2, 3, 4), (4, 2, 3), (3, 3, 2)])
def test_the_references_ring_has_the_ranks(ranks: tuple[int, int, int]) -> None:
    """From whichever mode it starts: not every one can hold the ranks on both its sides."""
    a, b, c = ranks
    sizes = [n * m + 1 if n * m == max(a * b, b * c, c * a) else n * m for n, m in ((a, b), (b, c), (c, a))]
    shapes = [(2, r, n, s) for r, n, s in zip(ranks, sizes, (b, c, a), strict=True)]
    tensor = torch.einsum("gras,gsbt,gtcr->gabc", *(random(*shape, seed=i) for i, shape in enumerate(shapes)))
    cores = reference.tensor_ring(tensor, ranks)
    assert [tuple(core.shape) for core in cores] == shapes
    assert relative_to(tensor, cores, "gras,gsbt,gtcr->gabc") < 1


def test_the_references_ring_of_full_ranks_is_exact() -> None:
    tensor = random(2, 4, 3, 5)
    cores = reference.tensor_ring(tensor, (1, 4, 12))
    assert [tuple(core.shape) for core in cores] == [(2, 1, 4, 4), (2, 4, 3, 12), (2, 12, 5, 1)]
    assert relative_to(tensor, cores, "gras,gsbt,gtcr->gabc") <= EXACT


def test_the_reference_refuses_a_ring_that_no_mode_can_hold() -> None:
    with pytest.raises(InputError, match="cannot make a ring of ranks"):
        reference.tensor_ring(random(1, 3, 3, 3), (2, 2, 2))
