"""Over-parameterised descent: planted components come back, contractions are einsum's, refusals are clear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.algebra import relative_error
from surgery.errors import InputError, RankError
from surgery.solvers.components import mttkrp, reduce_rank
from surgery.solvers.overparameterized import Method, descend, gradient_cp, symmetric_cp
from tests.covering import ALL, in_turns

EXACT = 1e-12
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
shapes = st.lists(st.integers(1, 5), min_size=3, max_size=4).map(tuple)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor_of(factors: list[Tensor]) -> Tensor:
    letters = "abcd"[: len(factors)]
    return torch.einsum(",".join(f"g{letter}r" for letter in letters) + "->g" + letters, *factors)


def orthonormal(groups: int, sizes: tuple[int, ...], rank: int) -> list[Tensor]:
    return [torch.linalg.qr(random(groups, size, rank, seed=mode)).Q for mode, size in enumerate(sizes)]


def cosines(truth: list[Tensor], found: list[Tensor]) -> Tensor:
    """Products over modes of the cosines of planted and found vectors, (g, r, r)."""
    pairs = [a.mT @ torch.nn.functional.normalize(b, dim=1).to(a) for a, b in zip(truth, found, strict=True)]
    return torch.stack(pairs).prod(0)


@given(shapes, st.integers(1, 4), st.integers(1, 2), st.integers(0, 99))
def test_mttkrp_is_einsums(sizes: tuple[int, ...], components: int, groups: int, seed: int) -> None:
    tensor = random(groups, *sizes, seed=seed)
    factors = [random(groups, size, components, seed=seed + mode) for mode, size in enumerate(sizes)]
    letters = "abcd"[: len(sizes)]
    for mode, found in enumerate(mttkrp(tensor, factors, range(len(sizes)))):
        others = [k for k in range(len(sizes)) if k != mode]
        terms = ",".join(["g" + letters, *(f"g{letters[k]}m" for k in others)])
        expected = torch.einsum(f"{terms}->g{letters[mode]}m", tensor, *(factors[k] for k in others))
        assert torch.allclose(found, expected, rtol=EXACT, atol=EXACT * float(tensor.abs().sum()) * 100)


def test_mttkrp_in_chunks_is_the_same() -> None:
    tensor, factors = random(2, 4, 3, 5), [random(2, size, 7) for size in (4, 3, 5)]
    expected = mttkrp(tensor, factors, [0, 2])
    for whole, chunked in zip(expected, mttkrp(tensor, factors, [0, 2], entries=65), strict=True):
        assert relative_error(chunked, whole) <= EXACT


@pytest.mark.parametrize(
    ("sizes", "dtype"), in_turns([(6, 5, 7), (5, 4, 4, 4)], [torch.float32, torch.float64]), ids=str
)
def test_orthogonal_components_are_recovered(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    truth = orthonormal(3, sizes, 4)
    tensor = tensor_of([truth[0] * torch.tensor([1, 0.8, 0.6, 0.4]), *truth[1:]]).to(dtype)
    found = gradient_cp(tensor, 4)
    assert {factor.dtype for factor in found} == {dtype}
    assert [factor.shape for factor in found] == [(3, size, 4) for size in sizes]
    assert relative_error(tensor_of(found), tensor) <= TOLERANCE[dtype]
    matches = cosines(truth, found).amax(-1)
    assert torch.allclose(matches, torch.ones_like(matches), rtol=0, atol=TOLERANCE[dtype])


def test_more_components_recover_where_plain_descent_on_the_rank_does_not() -> None:
    """The claim of Wang et al. 2020, on symmetric orthogonal tensors."""
    truth = orthonormal(6, (6,), 6) * 4
    tensor = tensor_of(truth)
    errors: dict[Method, float] = {}
    components: dict[Method, int] = {"overparameterized": 12, "plain": 6}
    for method, count in components.items():
        vectors, weights = symmetric_cp(tensor, 6, components=count, method=method)
        errors[method] = relative_error(tensor_of([vectors * weights[:, None], *[vectors] * 3]), tensor)
    assert errors["overparameterized"] <= TOLERANCE[torch.float64]
    assert errors["plain"] > 0.1


@pytest.mark.parametrize("order", [3, 4])
def test_symmetric_components_keep_their_signs(order: int) -> None:
    truth, signs = orthonormal(2, (5,), 3)[0], torch.tensor([1.0, -0.7, 0.5], dtype=torch.float64)
    tensor = tensor_of([truth * signs, *[truth] * (order - 1)])
    vectors, weights = symmetric_cp(tensor, 3)
    assert relative_error(tensor_of([vectors * weights[:, None], *[vectors] * (order - 1)]), tensor) <= 1e-6
    assert torch.allclose(torch.linalg.vector_norm(vectors, dim=1), torch.ones_like(weights))
    if order == 4:
        assert torch.allclose(weights.sort(-1).values, signs.sort().values.expand(2, 3), rtol=0, atol=1e-6)


@settings(max_examples=20 if ALL else 8)
@given(shapes, st.integers(1, 3), st.integers(0, 99))
def test_any_tensor_is_fitted_better_than_by_zero(sizes: tuple[int, ...], rank: int, seed: int) -> None:
    tensor = random(2, *sizes, seed=seed)
    found = gradient_cp(tensor, rank, epochs=2)
    assert [factor.shape for factor in found] == [(2, size, rank) for size in sizes]
    assert relative_error(tensor_of(found), tensor) <= 1 + EXACT
    norms = torch.stack([torch.linalg.vector_norm(factor, dim=1) for factor in found])
    assert torch.allclose(norms, norms[:1].expand_as(norms))


def test_split_components_are_merged() -> None:
    truth = orthonormal(2, (6, 5, 4), 3)
    doubled = [torch.cat([factor, -factor if mode < 2 else factor], -1) for mode, factor in enumerate(truth)]
    shares = torch.tensor([0.9, 0.5, 0.3, 0.1, 0.5, 0.7], dtype=torch.float64)
    found = reduce_rank(tensor_of(truth), [doubled[0] * shares, *doubled[1:]], 3)
    assert relative_error(tensor_of(found), tensor_of(truth)) <= TOLERANCE[torch.float64]


def test_sweeps_never_raise_the_error() -> None:
    tensor = random(2, 5, 4, 3)
    start = descend(tensor, 6, epochs=1)
    errors = []
    for sweeps in range(6):
        errors.append(relative_error(tensor_of(reduce_rank(tensor, start, 4, sweeps=sweeps)), tensor))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", ["overparameterized", "plain"])
def test_descent_approaches_a_dense_tensor(method: Method) -> None:
    tensor = random(1, 4, 4, 4)
    errors = [relative_error(tensor_of(descend(tensor, 24, epochs=e, method=method)), tensor) for e in (1, 20)]
    assert errors[1] < min(errors[0], 0.05)


def test_a_convolution_kernel() -> None:
    kernel = random(1, 16, 12, 3, 3).float()
    found = gradient_cp(kernel, 8)
    assert [factor.shape for factor in found] == [(1, size, 8) for size in (16, 12, 3, 3)]
    assert relative_error(tensor_of(found), kernel) < 0.9


def test_a_seed_decides_and_leaves_the_global_generator_alone() -> None:
    tensor, state = random(2, 4, 3, 3), torch.get_rng_state()
    first, again, other = (descend(tensor, 4, epochs=2, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_at_any_scale(scale: float) -> None:
    tensor = tensor_of(orthonormal(2, (5, 4, 4), 3)).float()
    found = [factor.double() for factor in gradient_cp(tensor * scale, 3)]
    assert relative_error(tensor_of(found), tensor.double() * scale) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_tensor_is_zero_and_leaves_others_alone(dtype: torch.dtype) -> None:
    tensor = tensor_of(orthonormal(2, (5, 4, 4), 3)).to(dtype)
    tensor[0] = 0
    result = tensor_of(gradient_cp(tensor, 3))
    assert float(result[0].abs().max()) <= TOLERANCE[dtype]
    assert relative_error(result[1], tensor[1]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(4,), (1, 4, 4), (1, 2, 2, 2, 2, 2)], ids=str)
def test_other_orders_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="order 3 or 4"):
        gradient_cp(torch.ones(shape), 1)


def test_bad_inputs_are_refused() -> None:
    tensor = torch.ones(1, 3, 3, 3)
    with pytest.raises(RankError, match="rank 0"):
        gradient_cp(tensor, 0)
    with pytest.raises(InputError, match="2 components for rank 3"):
        gradient_cp(tensor, 3, components=2)
    with pytest.raises(InputError, match="float16"):
        gradient_cp(tensor.half(), 1)
    with pytest.raises(InputError, match="empty"):
        gradient_cp(torch.ones(1, 0, 3, 3), 1)
    with pytest.raises(InputError, match="NaN"):
        gradient_cp(tensor / 0, 1)
    with pytest.raises(InputError, match="cannot be symmetric"):
        symmetric_cp(torch.ones(1, 3, 3, 4), 1)
