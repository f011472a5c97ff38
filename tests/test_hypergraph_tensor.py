"""The Laplacian tensor's form and the Fiedler vectors: their laws, what they refuse, where a lower value cuts more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.sparse import linalg

from examples.hypergraph_trap import crossed, descended
from surgery.errors import InputError
from surgery.hypergraph import Form, Hypergraph, clique, cuts, fiedler, pairs, partition
from surgery.hypergraph.moves import Limits
from surgery.hypergraph.partitions import sweep
from tests.hypergraph_cases import by_chance, dense_tensor, hypergraphs

SEEDS = st.integers(0, 1000)


def _uniform(size: int, most: int = 8) -> st.SearchStrategy[Hypergraph]:
    return hypergraphs(sizes=(size,), most=most)


def _form(h: Hypergraph, *, absolute: bool = False) -> Form:
    return Form(h.table(), h.weights, h.nodes, absolute=absolute)


@given(st.sampled_from([2, 3, 4, 6]).flatmap(_uniform), SEEDS)
def test_a_constant_costs_nothing_and_even_orders_cost_nothing_less(h: Hypergraph, seed: int) -> None:
    form = _form(h)
    assert form(np.full(h.nodes, 1.7)) == pytest.approx(0, abs=1e-9)
    if form.order % 2 == 0:
        assert form(np.random.default_rng(seed).standard_normal(h.nodes)) >= -1e-9


@given(st.sampled_from([2, 3, 4]).flatmap(lambda size: _uniform(size, 6)), SEEDS)
def test_the_form_and_its_slopes_are_those_of_the_dense_tensor(h: Hypergraph, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(h.nodes)
    tensor = dense_tensor(h)
    for _ in range(tensor.ndim - 1):
        tensor = tensor @ x
    form = _form(h)
    value, slope = form.with_gradient(x)
    assert_allclose(slope, form.order * tensor, atol=1e-10)
    assert value == pytest.approx(x @ tensor) == pytest.approx(form(x))


@given(st.sampled_from([2, 3, 4, 5]).flatmap(_uniform), SEEDS, st.booleans())
def test_slopes_and_curvatures_are_those_of_finite_differences(h: Hypergraph, seed: int, absolute: bool) -> None:
    form, x = _form(h, absolute=absolute), np.random.default_rng(seed).standard_normal(h.nodes)
    if absolute and np.abs(form.terms(x)).min() < 1e-3:
        return  # there it has no slope
    step = 1e-6 * np.eye(h.nodes)
    slopes = [(form(x + d) - form(x - d)) / 2e-6 for d in step]
    curves = [(form.with_gradient(x + d)[1] - form.with_gradient(x - d)[1]) / 2e-6 for d in step]
    scale = 1 + np.abs(slopes).max()
    assert_allclose(form.with_gradient(x)[1], slopes, atol=1e-5 * scale)
    assert_allclose(form.hessian(x).toarray(), np.array(curves), atol=1e-5 * scale)


@given(st.sampled_from([2, 3, 4, 5]).flatmap(_uniform))
def test_around_a_constant_it_is_the_clique_expansion(h: Hypergraph) -> None:
    # f(1 + t y) = t^2 (k / 2) sum_e w_e sum_pairs (y_i - y_j)^2, and the pairs weigh w_e / (k - 1) in the matrix.
    size = h.uniform
    assert size is not None
    second = _form(h).hessian(np.ones(h.nodes)).toarray() / 2
    assert_allclose(second, size / 2 * (size - 1) * clique(h).toarray(), atol=1e-9)


@given(st.sampled_from([2, 4, 6]).flatmap(_uniform), SEEDS)
def test_of_plus_and_minus_ones_it_sees_only_what_is_split_oddly(h: Hypergraph, seed: int) -> None:
    form, x = _form(h), np.random.default_rng(seed).choice([-1.0, 1.0], h.nodes)
    odd = (x[h.table()] < 0).sum(axis=1) % 2 == 1
    assert form(x) == pytest.approx(2 * form.order * h.weights[odd].sum())


@given(hypergraphs())
def test_the_clique_expansion_keeps_the_degrees(h: Hypergraph) -> None:
    wide = h.subset(h.sizes > 1)
    assert_allclose(pairs(h).sum(axis=1), wide.degrees, atol=1e-12)
    assert_allclose(clique(h).sum(axis=1), 0, atol=1e-12)


@pytest.mark.parametrize("size", [40, 400])
def test_of_pairs_the_tensor_is_the_matrix(size: int) -> None:
    h = by_chance(size, 2, 6 * size, seed=3)
    found = fiedler(h, "tensor")
    values, vectors = linalg.eigsh(clique(h).tocsc(), 2, sigma=-1e-3, which="LM")
    assert found.value == pytest.approx(values[1], rel=1e-6)
    assert abs(found.vector @ vectors[:, 1]) == pytest.approx(1, abs=1e-4)
    assert found.kind == "minimum"
    assert found.eigen_residual < 1e-4


@pytest.mark.parametrize(("size", "nodes"), [(4, 60), (4, 400), (6, 80)])
def test_the_vector_is_a_critical_point_across_the_constant(size: int, nodes: int) -> None:
    h = by_chance(nodes, size, 3 * nodes, seed=4)
    found = fiedler(h, "tensor")
    form = _form(h)
    assert np.linalg.norm(found.vector) == pytest.approx(1)
    assert found.vector.sum() == pytest.approx(0, abs=1e-9)
    assert found.value == pytest.approx(form(found.vector))
    slope = form.with_gradient(found.vector)[1] / size
    assert_allclose(slope, found.value * found.vector + found.shift, atol=1e-5 * np.abs(slope).max())
    assert found.residual < 1e-5
    assert found.kind in ("minimum", "flat")
    start = fiedler(h, "clique").vector
    start = start - start.mean()
    assert found.value <= form(start / np.linalg.norm(start)) + 1e-12


@pytest.mark.parametrize("method", ["clique", "tensor"])
def test_other_numbers_of_the_nodes_give_the_same_vector_in_their_order(method: str) -> None:
    h = by_chance(50, 4, 120, seed=5)
    order = np.random.default_rng(1).permutation(h.nodes)
    other = Hypergraph.from_edges(order[h.table()], nodes=h.nodes)
    one, two = fiedler(h, method), fiedler(other, method)  # type: ignore[arg-type]
    assert_allclose(two.vector[order], one.vector, atol=2e-4)
    assert two.value == pytest.approx(one.value, rel=1e-6)


def test_long_chains_have_their_vector_too() -> None:
    h = Hypergraph.from_edges([(i, i + 1, i + 2) for i in range(898)])
    found = fiedler(h)
    steps = np.diff(found.vector)
    assert found.residual < 1e-8
    assert (steps > 0).all() or (steps < 0).all()


def test_nodes_that_nothing_ties_are_left_out() -> None:
    h = Hypergraph.from_edges([(0, 1, 2, 3), (2, 3, 4, 5), (7,)], nodes=8)
    for method in ("clique", "tensor"):
        found = fiedler(h, method)
        assert found.vector[6] == found.vector[7] == 0
        assert np.linalg.norm(found.vector) == pytest.approx(1)


def test_odd_and_mixed_sizes_are_refused_with_what_to_do() -> None:
    odd = by_chance(12, 3, 30, seed=0)
    with pytest.raises(InputError, match="powers of that order are no numbers; allowed: a size up to 64"):
        fiedler(Hypergraph.from_edges([tuple(range(400))]), "tensor")
    with pytest.raises(InputError, match='no least value; allowed: an even size; take method="absolute" or "clique"'):
        fiedler(odd, "tensor")
    found = fiedler(odd, "absolute")
    assert found.kind == "not smooth"
    assert found.value >= 0
    mixed = Hypergraph.from_edges([(0, 1), (1, 2, 3, 4)])
    for method in ("tensor", "absolute"):
        with pytest.raises(InputError, match=r"size 2 to 4.*h\.of_size\(k\)"):
            fiedler(mixed, method)
    assert fiedler(mixed.of_size(4), "tensor").kind != "unfinished"
    with pytest.raises(InputError, match="clique, tensor, absolute"):
        fiedler(odd, "hosvd")  # type: ignore[arg-type]


def test_a_partition_of_lower_tensor_value_cuts_nearly_everything() -> None:
    # Two communities, crossed by two types of which most hyperedges take two nodes each: the form sees no even split.
    h, of = crossed()
    form = _form(h)
    community, kind = (np.where(of[name] == 0, 1.0, -1.0) for name in ("communities", "types"))
    assert form(kind) < form(community)
    assert descended(form, kind) < descended(form, community)
    assert cuts(h, of["types"]).hyperedges > 1150
    assert cuts(h, of["communities"]).hyperedges < 250
    assert partition(h).value < 250


def test_hyperedges_split_evenly_are_the_one_thing_that_the_tensor_sees_better() -> None:
    # Half of the 4-edges cross with two nodes on each side: they cost nothing, and the planted vector is exact.
    rng = np.random.default_rng(0)
    half = np.arange(0, 200, 2)
    inside = [np.sort(rng.choice(half + side, 4, replace=False)) for side in (0, 1) for _ in range(150)]
    across = [np.concatenate([rng.choice(half + side, 2, replace=False) for side in (0, 1)]) for _ in range(300)]
    h = Hypergraph.from_edges([*inside, *across], nodes=200)
    agreement = {}
    for method in ("tensor", "clique"):
        part, _ = sweep(h, fiedler(h, method).vector, Limits("cut", np.full(2, 103.0)))
        share = float(np.mean(part == np.arange(200) % 2))
        agreement[method] = max(share, 1 - share)
    assert agreement["tensor"] >= agreement["clique"]
    assert agreement["tensor"] > 0.97
