"""Tensor trains and rings against TensorLy, and what tt and tr make of them beyond the laws of the algebra."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.algebra import Chain, Flatten, Linear, Operator, Shift, Transpose, Unflatten, relative_error
from surgery.errors import InputError, Refusal
from surgery.factorizations.base import Factorization, Ranks
from surgery.factorizations.tr import Tr
from surgery.factorizations.tt import Tt, balanced
from surgery.solvers import gram, reference
from surgery.solvers.ring import ring_tensor, tensor_ring
from surgery.solvers.train import cut, round_train, tensor_train, train_tensor
from tests.cases import CASES, decaying
from tests.tolerances import tolerance

EXACT = 1e-12
SINGLE = 1e-6
FEW = settings(max_examples=40)


def tensor_of(*shape: int, rate: float = 0.8, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.stack([decaying(torch.randn(shape[1:], dtype=torch.float64), rate) for _ in range(shape[0])])


shapes = st.tuples(st.integers(1, 2), *[st.integers(1, 6)] * 3) | st.tuples(st.integers(1, 2), *[st.integers(1, 4)] * 4)
tensors = st.builds(lambda shape, seed: tensor_of(*shape, seed=seed), shapes, st.integers(0, 99))
some_ranks = st.lists(st.integers(1, 8), min_size=4, max_size=4)


def full_train(tensor: Tensor) -> list[int]:
    sizes = tensor.shape[1:]
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def bonds(cores: list[Tensor]) -> list[tuple[int, int]]:
    return [(core.shape[1], core.shape[3]) for core in cores]


@given(tensors)
def test_a_train_of_full_ranks_is_exact_in_both_dtypes(tensor: Tensor) -> None:
    for dtype, allowed in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        cores = tensor_train(tensor.to(dtype), full_train(tensor))
        assert {core.dtype for core in cores} == {dtype}
        assert relative_error(train_tensor(cores), tensor.to(dtype)) <= allowed


@given(tensors, some_ranks)
def test_a_train_has_the_ranks_asked_for_and_the_error_of_tensorlys(tensor: Tensor, ranks: list[int]) -> None:
    ranks = ranks[: tensor.dim() - 2]
    cores = tensor_train(tensor, ranks)
    assert bonds(cores) == list(pairwise([1, *ranks, 1]))
    assert train_tensor(cores).shape == tensor.shape
    theirs = relative_error(train_tensor(reference.tensor_train(tensor, ranks)), tensor)
    assert relative_error(train_tensor(cores), tensor) == pytest.approx(theirs, rel=1e-6, abs=1e-7)


@given(tensors, some_ranks)
def test_the_error_of_a_train_is_within_the_sum_of_its_unfoldings(tensor: Tensor, ranks: list[int]) -> None:
    """Theorem 2.2 of Oseledets 2011; and no train is better than the best of one unfolding."""
    ranks = ranks[: tensor.dim() - 2]
    lost = float((train_tensor(tensor_train(tensor, ranks)) - tensor).square().sum())
    unfoldings = [tensor.flatten(1, k).flatten(2) for k in range(1, tensor.dim() - 1)]
    tails = [float(gram.singular_values(u)[:, r:].square().sum()) for u, r in zip(unfoldings, ranks, strict=True)]
    slack = EXACT * float(tensor.square().sum())
    assert max(tails) - slack <= lost <= sum(tails) + slack


@given(tensors, some_ranks)
def test_a_train_is_balanced(tensor: Tensor, ranks: list[int]) -> None:
    """Each bond's matrices have equal norms on both sides at the ends of the train."""
    cores = tensor_train(tensor, ranks[: tensor.dim() - 2])
    if len(cores) == 3:
        left = torch.linalg.vector_norm(cores[0], dim=(1, 2))
        ends = full_train(tensor)[0]
        kept = min(ranks[0], ends)
        assert not left[:, kept:].any()
    assert all(bool(torch.isfinite(core).all()) for core in cores)


def test_float32_trains_are_as_good_where_little_is_lost() -> None:
    tensor = tensor_of(1, 40, 3, 3, 40, rate=0.5)
    for ranks in ([10, 12, 10], [20, 40, 20], [36, 60, 36]):
        ours = relative_error(train_tensor(tensor_train(tensor.float(), ranks)), tensor)
        theirs = relative_error(train_tensor(reference.tensor_train(tensor, ranks)), tensor)
        assert ours <= 1.002 * theirs + SINGLE


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_trains_and_rings_at_any_scale(scale: float) -> None:
    tensor = tensor_of(2, 6, 3, 5).float()
    for find, value, ranks in ((tensor_train, train_tensor, [3, 3]), (tensor_ring, ring_tensor, [2, 3, 2])):
        expected = relative_error(value(find(tensor, ranks)), tensor)
        found = value([core.double() for core in find(tensor * scale, ranks)])
        assert relative_error(found, tensor.double() * scale) == pytest.approx(expected, rel=1e-3)


def test_trains_and_rings_of_zero_are_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(2, 6, 3, 5, dtype=dtype)
        assert not train_tensor(tensor_train(zero, [3, 3])).any()
        assert not ring_tensor(tensor_ring(zero, [2, 3, 2])).any()


@given(tensors, some_ranks, some_ranks)
def test_rounding_a_train_is_the_train_of_its_tensor(tensor: Tensor, before: list[int], ranks: list[int]) -> None:
    before, ranks = before[: tensor.dim() - 2], ranks[: tensor.dim() - 2]
    cores = tensor_train(tensor, before)
    rounded = round_train(cores, ranks)
    assert bonds(rounded) == list(pairwise([1, *ranks, 1]))
    whole = train_tensor(cores)
    direct = relative_error(train_tensor(tensor_train(whole, ranks)), whole)
    assert relative_error(train_tensor(rounded), whole) == pytest.approx(direct, rel=1e-6, abs=1e-7)


@given(tensors, some_ranks)
def test_rounding_to_the_same_ranks_changes_nothing(tensor: Tensor, ranks: list[int]) -> None:
    ranks = ranks[: tensor.dim() - 2]
    cores = tensor_train(tensor, ranks)
    assert relative_error(train_tensor(round_train(cores, ranks)), train_tensor(cores)) <= 1e-7


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9))
def test_a_cut_is_the_best_and_orthonormal(rows: int, columns: int, rank: int) -> None:
    matrix = tensor_of(2, rows, columns)
    left, rest = cut(matrix, rank)
    best = gram.singular_values(matrix)[:, rank:].square().sum()
    assert float((left @ rest - matrix).square().sum()) == pytest.approx(float(best), abs=EXACT * matrix.numel())
    kept = min(rank, rows, columns)
    eye = torch.diag(torch.cat([torch.ones(kept), torch.zeros(rank - kept)])).double()
    assert relative_error(left.mT @ left, eye.expand(2, -1, -1)) <= EXACT


@FEW
@given(tensors, some_ranks)
def test_a_ring_has_the_ranks_asked_for_and_sweeps_only_gain(tensor: Tensor, ranks: list[int]) -> None:
    ranks = [min(rank, 4) for rank in ranks[: tensor.dim() - 1]]
    start, swept = tensor_ring(tensor, ranks, sweeps=0), tensor_ring(tensor, ranks)
    assert bonds(swept) == list(pairwise([*ranks, ranks[0]]))
    assert ring_tensor(swept).shape == tensor.shape
    errors = [relative_error(ring_tensor(cores), tensor) for cores in (start, swept)]
    assert errors[1] <= errors[0] + 1e-7
    norms = torch.stack([torch.linalg.vector_norm(core.flatten(1), dim=1) for core in swept])
    assert torch.allclose(norms, norms[:1].expand_as(norms), rtol=1e-6)


@FEW
@given(tensors, some_ranks)
def test_a_ring_is_no_worse_than_tensorlys(tensor: Tensor, ranks: list[int]) -> None:
    ranks = [min(rank, 3) for rank in ranks[: tensor.dim() - 1]]
    try:
        theirs = relative_error(ring_tensor(reference.tensor_ring(tensor, ranks)), tensor)
    except InputError:
        return
    ours = relative_error(ring_tensor(tensor_ring(tensor, ranks)), tensor)
    assert ours <= 1.002 * theirs + 1e-7


@given(tensors)
def test_a_ring_of_one_and_full_ranks_is_exact(tensor: Tensor) -> None:
    for dtype, allowed in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        sizes = tensor.shape[1:]
        ranks = [1, min(sizes[0], math.prod(sizes[1:]))]
        for k in range(1, len(sizes) - 1):
            ranks.append(min(ranks[-1] * sizes[k], math.prod(sizes[k + 1 :])))
        cores = tensor_ring(tensor.to(dtype), ranks)
        assert {core.dtype for core in cores} == {dtype}
        assert relative_error(ring_tensor(cores), tensor.to(dtype)) <= allowed


def test_sweeps_find_a_planted_ring_far_below_tr_svd() -> None:
    torch.manual_seed(0)
    ranks = [2, 3, 2]
    shapes = [(1, 2, 8, 3), (1, 3, 9, 2), (1, 2, 7, 2)]
    cores = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    planted = ring_tensor(cores)
    start, swept = (relative_error(ring_tensor(tensor_ring(planted, ranks, sweeps=n)), planted) for n in (0, 300))
    assert swept <= 0.5 * start


def test_tensorly_reads_the_cores_as_we_do() -> None:
    import tensorly

    tensorly.set_backend("pytorch")
    tensor = tensor_of(1, 6, 3, 5)
    train, ring = tensor_train(tensor, [3, 3]), tensor_ring(tensor, [2, 3, 2])
    assert relative_error(tensorly.tt_to_tensor([core[0] for core in train]), train_tensor(train)[0]) <= EXACT
    assert relative_error(tensorly.tr_to_tensor([core[0] for core in ring]), ring_tensor(ring)[0]) <= EXACT


@given(st.integers(1, 5000))
def test_balanced_factors_are_the_closest(n: int) -> None:
    small, large = balanced(n)
    assert small * large == n
    assert small <= large
    assert all(n % d for d in range(small + 1, math.isqrt(n) + 1))


def operator_of(name: str) -> Operator:
    return next(case.operator for case in CASES if case.id == name)


def chain_of(method: Factorization, operator: Operator, ranks: Ranks) -> Chain:
    chain = method.factor(operator, ranks)
    assert isinstance(chain, Chain)
    return chain


def test_a_linear_train_is_the_best_sum_of_kronecker_products() -> None:
    torch.manual_seed(0)
    weight = decaying(torch.randn(12, 20, dtype=torch.float64))
    permuted = weight.reshape(3, 4, 4, 5).permute(0, 3, 1, 2).reshape(15, 16)
    values = torch.linalg.svdvals(permuted)
    for rank in (1, 4, 15):
        chain = chain_of(Tt(), Linear(weight), (rank,))
        first, second = (operator.weight for operator in chain.operators)
        g1, g2 = first.view(3, rank, 5), second.view(4, 4, rank)
        product = torch.einsum("prb,qar->pqab", g1, g2).reshape(12, 20)
        composed = chain.compose()
        assert isinstance(composed, Linear)
        assert relative_error(composed.weight, product) <= EXACT
        assert relative_error(product, weight) == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-9)


def test_linear_chains_are_reshapes_and_a_shift() -> None:
    swap = [Unflatten, Transpose, Flatten, Linear]
    kinds = {
        Tt(): [Unflatten, Linear, *swap, Flatten, Shift],
        Tr(): [Unflatten, Linear, *swap, Linear, *swap, Flatten, Shift],
    }
    operator = Linear(torch.randn(12, 20), bias=torch.randn(12))
    for method, expected in kinds.items():
        chain = chain_of(method, operator, method.max_ranks(operator))
        assert [type(step) for step in chain.steps] == expected


@pytest.mark.parametrize("method", [Tt(), Tr()], ids=lambda method: method.name)
def test_refusals_say_why(method: Factorization) -> None:
    reasons = {
        "linear-vector": "it has 7 in_features, which is not a product",
        "linear-1out": "it has 1 out_features, which is not a product",
        "linear-tall": "it has 5 in_features, which is not a product",
        "conv2d-1x1": "single kernel position",
        "conv2d-depthwise": "depthwise",
    }
    for name, reason in reasons.items():
        refusal = method.refuse(operator_of(name))
        assert isinstance(refusal, Refusal)
        assert reason in refusal.reason


def test_rings_refuse_three_dimensions() -> None:
    refusal = Tr().refuse(operator_of("conv3d-3x3x3"))
    assert refusal == Refusal("it is a convolution over three dimensions, whose ring needs one over four")


def test_a_full_end_of_a_train_needs_no_1x1() -> None:
    operator = operator_of("conv2d-3x3")
    sizes = {ranks: [o.weight.shape[1:3] for o in chain_of(Tt(), operator, ranks).operators] for ranks in ALL_ENDS}
    assert [len(kernels) for kernels in sizes.values()] == [4, 3, 3, 4]


ALL_ENDS = [(4, 5, 4), (6, 5, 4), (4, 5, 8), (6, 5, 8)]


def test_rank_names_say_how_many() -> None:
    names = {
        name: Tt().rank_names(tuple(operator_of(name).kernel.shape)) for name in ("linear", "conv1d-3", "conv3d-3x3x3")
    }
    assert names == {"linear": ("rank",), "conv1d-3": ("in", "out"), "conv3d-3x3x3": ("in", "mid1", "mid2", "out")}


def test_a_ring_of_one_has_no_further_dimension() -> None:
    chain = chain_of(Tr(), operator_of("conv2d-3x3"), (1, 3, 4))
    assert chain.steps == chain.operators
    assert [operator.weight.dim() for operator in chain.operators] == [4, 4, 4]


def test_settled_ring_ranks_lose_no_more_than_the_truncated_hosvd() -> None:
    method, operator = Tr(), operator_of("conv2d-3x3")
    full, spectra = method.max_ranks(operator), method.spectra(operator)
    sizes = tuple(len(spectrum.pooled) for spectrum in spectra)
    assert method.settle(sizes, full) == full
    for counts in [(4, 4, 4), (6, 5, 5), (8, 9, 6)]:
        ranks = method.settle(counts, full)
        assert all(most >= count for most, count in zip(method.counts(ranks), counts, strict=True))
        composed = chain_of(method, operator, ranks).compose()
        assert isinstance(composed, Operator)
        bound = sum(float(s.pooled[count:].square().sum()) for s, count in zip(spectra, counts, strict=True))
        lost = float((composed.weight - operator.weight).square().sum())
        assert lost <= bound + tolerance(torch.float64) * float(operator.weight.square().sum())
