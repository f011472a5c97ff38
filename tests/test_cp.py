"""CP: exact recovery, honest errors, TensorLy's fit, any scale, degenerate tensors, and the dimension tree below it."""

from __future__ import annotations

import math
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.algebra import relative_error
from surgery.errors import InputError
from surgery.solvers import cp_model
from surgery.solvers import dimension_tree as tree
from surgery.solvers.cp import CpResult, cp
from surgery.solvers.cp_model import CpModel
from tests.tolerances import tolerance

as_tensor = torch.from_numpy
LETTERS = "abcdef"
EXACT = 1e-12
FLOAT32 = 1e-5  # relative accuracy of a float32 residual at the size of the tensors here
METHODS = ("als", "pp")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compose(factors: list[Tensor]) -> Tensor:
    letters = LETTERS[: len(factors)]
    return torch.einsum(",".join(f"g{c}r" for c in letters) + f"->g{letters}", *factors)


def planted(groups: int, sizes: tuple[int, ...], rank: int, *, noise: float = 0.0, seed: int = 0) -> Tensor:
    """A tensor of a rank, whose factors are well conditioned, with noise of a relative size."""
    tensor = compose([random(groups, size, rank, seed=seed + i) for i, size in enumerate(sizes)])
    extra = random(*tensor.shape, seed=seed + 99)
    return tensor + noise * tensor.norm() / extra.norm() * extra


def without_best_approximation() -> Tensor:
    """The sum of three products, of border rank 2 but rank 3 (de Silva and Lim 2008)."""
    a, b = torch.eye(2, dtype=torch.float64)
    triples = ((a, a, b), (a, b, a), (b, a, a))
    return torch.stack([torch.einsum("i,j,k->ijk", *triple) for triple in triples]).sum(0, keepdim=True)


sizes = st.lists(st.integers(1, 5), min_size=2, max_size=6).map(tuple)
groups = st.integers(1, 3)
seeds = st.integers(0, 99)


@given(groups, sizes, st.integers(1, 4), seeds)
def test_contractions_of_nodes_are_einsums(groups: int, sizes: tuple[int, ...], rank: int, seed: int) -> None:
    """Every leaf of the tree and every pair operator, with runs at the front, in the middle and at the end."""
    tensor = random(groups, *sizes, seed=seed)
    factors = [random(groups, rank, size, seed=seed + i) for i, size in enumerate(sizes)]
    modes = tuple(range(len(sizes)))

    def expected(*kept: int) -> Tensor:
        others = [mode for mode in modes if mode not in kept]
        parts = [f"g{LETTERS[: len(sizes)]}", *(f"gr{LETTERS[mode]}" for mode in others)]
        output = "gr" + "".join(LETTERS[mode] for mode in kept)
        return torch.einsum(",".join(parts) + "->" + output, tensor, *(factors[mode] for mode in others))

    def contract(node: tree.Array, left: tree.Modes, run: tree.Modes) -> tree.Array:
        return tree.contract(node, left, run, [factor.numpy() for factor in factors])

    leaves: dict[int, tree.Array] = {}
    tree.visit(tensor.numpy(), modes, sizes, contract, leaves.__setitem__)
    assert list(leaves) == list(modes)
    assert all(relative_error(as_tensor(leaf), expected(mode)) <= EXACT for mode, leaf in leaves.items())
    if len(sizes) > 2:
        pairs = tree.pair_nodes(tensor.numpy(), modes, sizes, contract)
        assert set(pairs) == set(combinations(modes, 2))
        assert all(relative_error(as_tensor(pair), expected(*kept)) <= EXACT for kept, pair in pairs.items())


@pytest.mark.parametrize("shape", [(512, 512, 3, 3), (3, 512, 3, 3), (64, 64, 3), (20, 20, 20), (9, 8, 7, 6, 5)])
def test_a_sweep_contracts_the_tensor_twice(shape: tuple[int, ...]) -> None:
    """And what is left of it is small: the tree never builds the product of two large modes and the rank."""
    seen: list[tuple[int, int]] = []

    def contract(node: Tensor, left: tree.Modes, run: tree.Modes) -> Tensor:
        rest = math.prod(shape[mode] for mode in left if mode not in run)
        seen.append((math.prod(shape[mode] for mode in left), rest))
        return node

    tree.visit(torch.zeros(1), tuple(range(len(shape))), shape, contract, lambda mode, leaf: None)
    assert sum(size == math.prod(shape) for size, _ in seen) == 2
    assert max(rest for _, rest in seen) <= math.prod(shape) // 9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(8, 9), (6, 7, 8), (12, 5, 3, 3), (4, 5, 3, 4, 3), (3, 3, 4, 3, 3, 3)])
def test_planted_factors_are_found(shape: tuple[int, ...], method: str) -> None:
    tensor = planted(2, shape, 3, noise=0.01)
    found = cp(tensor, 3, method=method, sweeps=200)
    assert [tuple(factor.shape) for factor in found.factors] == [(2, size, 3) for size in shape]
    assert found.error <= 0.0101
    assert found.error == pytest.approx(relative_error(compose(found.factors), tensor), rel=1e-6)
    assert not found.degenerate
    assert found.reason == ""
    assert 0 < found.sweeps <= 200


@settings(max_examples=30, deadline=None)
@given(groups, st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple), st.integers(1, 7), seeds)
def test_the_error_is_the_error(groups: int, sizes: tuple[int, ...], rank: int, seed: int) -> None:
    """On any shape, in both dtypes, also at ranks above the sizes, where fits are exact."""
    for dtype, allowed in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        tensor = random(groups, *sizes, seed=seed).to(dtype)
        found = cp(tensor, rank, sweeps=20)
        assert {factor.dtype for factor in found.factors} == {dtype}
        assert found.error == pytest.approx(relative_error(compose(found.factors), tensor), rel=allowed, abs=allowed)
        assert found.error <= 1 + allowed


@settings(max_examples=20, deadline=None)
@given(groups, st.lists(st.integers(2, 6), min_size=3, max_size=5).map(tuple), st.integers(1, 6), seeds)
def test_no_step_raises_the_objective(groups: int, sizes: tuple[int, ...], rank: int, seed: int) -> None:
    """Extrapolation included; but where a ridge comes in."""
    tensor = random(groups, *sizes, seed=seed)
    for extrapolated in (True, False):
        factors = [random(groups, rank, size, seed=seed + i) for i, size in enumerate(sizes)]
        model = CpModel(tensor.numpy(), [factor.numpy() for factor in factors], extrapolated=extrapolated)
        for _ in range(15):
            objective, ridge = model.objective, model.ridge
            model.step(model.sweep)
            same = model.ridge == ridge
            assert (model.objective <= np.where(same, objective, np.inf) + EXACT).all()


def test_groups_do_not_meet() -> None:
    """Up to where each stops: the residual is flat to 1e-14 within 1e-7 of its minimum."""
    tensor = planted(3, (6, 7, 8), 3, noise=0.1)
    together = cp(tensor, 3, restarts=0, tolerance=0, sweeps=50)
    for i in range(3):
        alone = cp(tensor[i : i + 1], 3, restarts=0, tolerance=0, sweeps=50)
        assert relative_error(compose(together.factors)[i : i + 1], compose(alone.factors)) <= 1e-7


def test_norms_are_balanced_and_seeds_decide() -> None:
    tensor = random(2, 6, 7, 8)
    found = cp(tensor, 9)
    norms = torch.stack([factor.norm(dim=1) for factor in found.factors])
    assert relative_error(norms, norms.mean(0).expand_as(norms)) <= EXACT
    again = cp(tensor, 9)
    assert all(torch.equal(one, other) for one, other in zip(found.factors, again.factors, strict=True))


def test_fit_is_tensorlys() -> None:
    import tensorly
    from tensorly.decomposition import parafac

    tensorly.set_backend("pytorch")
    tensor = random(1, 24, 20, 3, 3)
    for rank in (2, 8, 16):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = parafac(tensor[0], rank, n_iter_max=50, init="svd", tol=0)
        error = relative_error(tensorly.cp_to_tensor(theirs)[None], tensor)
        assert cp(tensor, rank, sweeps=50, tolerance=0).error <= 1.01 * error


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(scale: float, method: str) -> None:
    tensor = planted(1, (6, 7, 8), 3, noise=0.1).float()
    plain, scaled = cp(tensor, 3, method=method), cp(tensor * scale, 3, method=method)
    assert scaled.error == pytest.approx(plain.error, rel=1e-3)
    assert relative_error(compose(scaled.factors), tensor * scale) == pytest.approx(plain.error, rel=1e-3)
    assert not scaled.degenerate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_all_but_zero(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 4, 5, 6, dtype=dtype)
    zero = cp(tensor, 3)
    assert not any(bool(factor.isnan().any()) for factor in zero.factors)
    assert not compose(zero.factors).any()
    assert not zero.error
    assert not zero.degenerate
    tensor[1, 1, 2, 3] = 1e-30
    one = cp(tensor, 2)
    assert relative_error(compose(one.factors), tensor) <= FLOAT32
    assert not one.degenerate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (6, 5, 7)])
def test_a_tensor_without_a_best_approximation_is_degenerate(
    sizes: tuple[int, ...], method: str, dtype: torch.dtype
) -> None:
    bases = [torch.linalg.qr(random(size, 2, seed=size)).Q for size in sizes]
    tensor = torch.einsum("gabc,ia,jb,kc->gijk", without_best_approximation(), *bases)
    found = cp(tensor.to(dtype), 2, method=method, sweeps=200)
    assert found.degenerate
    assert "cancel" in found.reason
    assert all(factor.abs().max() < 10 for factor in found.factors)
    rank_three = cp(tensor.to(dtype), 3, method=method, sweeps=500)
    assert rank_three.error < 0.02


def test_flags_that_blas_raises_without_reason_are_no_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenBLAS does for lanes of a vector that it does not use (numpy/numpy#24067)."""
    plain = tree.matmul

    def flagged(left: tree.Array, right: tree.Array) -> tree.Array:
        np.sqrt(np.array([-1.0]))
        return plain(left, right)

    tensor = random(1, 4, 5, 6)
    expected = cp(tensor, 3).error
    monkeypatch.setattr(tree, "matmul", flagged)
    assert cp(tensor, 3).error == expected
    assert np.geterr()["invalid"] == "warn"


def test_a_ridge_holds_components_that_cancel_without_need() -> None:
    """Noise makes a best approximation exist; the components stay bounded either way."""
    tensor = without_best_approximation()
    noisy = tensor + 0.3 * random(1, 2, 2, 2)
    found = cp(noisy, 3, sweeps=200)
    assert not found.degenerate
    model = CpModel(noisy.numpy(), [factor.mT.numpy() for factor in found.factors])
    model.measure()
    assert model.blowup.item() < 100


def test_the_gradient_method_is_measured() -> None:
    pytest.importorskip("surgery.solvers.overparameterized")
    tensor = planted(1, (6, 5, 4), 2, noise=0.01)
    found = cp(tensor, 2, method="gd")
    assert isinstance(found, CpResult)
    assert found.sweeps == 0
    assert found.error == pytest.approx(relative_error(compose(found.factors), tensor), rel=1e-6)


@pytest.mark.parametrize(
    ("tensor", "rank", "method"),
    [
        (torch.ones(1, 2, 2, 2), 2, "newton"),
        (torch.ones(1, 2, 2, 2), 0, "als"),
        (torch.ones(2, 2), 1, "als"),
        (torch.ones(1, *[2] * 7), 1, "als"),
        (torch.full((1, 2, 2, 2), math.nan), 1, "als"),
    ],
)
def test_what_is_refused(tensor: Tensor, rank: int, method: str) -> None:
    with pytest.raises(InputError, match="allowed"):
        cp(tensor, rank, method=method)


@pytest.mark.parametrize("groups", [1, 2])
def test_equal_components_get_the_least_solution(groups: int) -> None:
    """Normal equations of two equal components are singular: the group beside them is solved all the same."""
    normal = np.stack([np.full((2, 2), 4.0), np.diag([2.0, 5.0])])[:groups]
    target = np.stack([np.full((2, 3), 8.0), np.full((2, 3), 10.0)])[:groups]
    found = cp_model._solve(normal.copy(), target.copy(), np.ones(groups))
    expected = np.stack([np.full((2, 3), 1.0), np.array([[5.0] * 3, [2.0] * 3])])[:groups]
    assert np.abs(found - expected).max() <= tolerance(torch.float64, length=2, steps=4) * 5


@pytest.mark.parametrize("collinear", [False, True])
def test_normal_equations_are_in_float64_where_float32_is_too_little(collinear: bool) -> None:
    """Components that are nearly one cannot be told apart by float32 Gram matrices; others can, to the same fit."""
    tensor = planted(1, (12, 10, 8), 4, noise=0.2)
    factors = [random(1, 4, size, seed=i) for i, size in enumerate((12, 10, 8))]
    if collinear:
        factors = [factor[:, :1] + 1e-3 * factor for factor in factors]
    narrow, wide = (CpModel(t.numpy(), [f.to(t).numpy() for f in factors]) for t in (tensor.float(), tensor))
    for model in (narrow, wide):
        model.step(model.sweep)
    assert narrow.wide == collinear
    assert wide.wide
    assert {gram.dtype for gram in narrow.grams} == {np.dtype(np.float64 if collinear else np.float32)}
    if not collinear:  # products with the tensor are in float32 in both
        assert narrow.residual == pytest.approx(wide.residual, rel=1e-5)
    for mode in narrow.modes:  # whatever the switch came in the middle of
        assert narrow.grams[mode] == pytest.approx(narrow._gram(narrow.factors[mode]))
