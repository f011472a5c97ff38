"""Hypergraphs, their costs and their refined partitions: what is counted equals what the definitions say."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from surgery.errors import InputError
from surgery.hypergraph import METHODS, OBJECTIVES, Hypergraph, Method, Objective, cuts, partition
from surgery.hypergraph.moves import Limits, refine
from surgery.hypergraph.multilevel import coarsen
from surgery.sites.network import Network, Operation, Value
from tests.hypergraph_cases import by_chance, hypergraphs


def test_hyperedges_are_sets_and_what_stands_twice_is_merged() -> None:
    h = Hypergraph.from_edges([(2, 0), (0, 1, 2), (0, 2), (2, 1, 0)], weights=[1, 2, 3, 4], nodes=4)
    assert (h.nodes, h.edges, h.merged) == (4, 2, 2)
    assert h.weights.tolist() == [4.0, 6.0]
    assert h.pins.tolist() == [0, 2, 0, 1, 2]
    assert h.degrees.tolist() == [10.0, 6.0, 10.0, 0.0]


def test_an_array_is_as_good_as_a_list() -> None:
    rows = np.array([[3, 1, 2], [0, 1, 2]])
    one, other = Hypergraph.from_edges(rows), Hypergraph.from_edges(rows.tolist())
    assert one.table().tolist() == other.table().tolist() == [[1, 2, 3], [0, 1, 2]]


def test_what_is_given_stays_as_it_is_and_nothing_can_be_changed_afterwards() -> None:
    weights = np.array([1.0])
    h = Hypergraph.from_edges([(0, 1)], weights=weights)
    weights[0] = 7
    assert h.weights[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        h.pins[0] = 1


@pytest.mark.parametrize(
    ("edges", "options", "said"),
    [
        ([(0, 0, 1)], {}, "node 0 stands twice in hyperedge 0"),
        ([(0, 1), ()], {}, "hyperedge 1 is empty"),
        ([(0, -1)], {}, "node -1"),
        ([(0, 5)], {"nodes": 3}, "0 to 2"),
        ([("a", "b")], {}, "number the nodes first"),
        ([(0.5, 1.0)], {}, "number the nodes first"),
        ([(0, 1)], {"weights": [1, 2]}, "one a hyperedge"),
        ([(0, 1)], {"weights": [-1.0]}, "0 or more"),
        ([(0, 1)], {"node_weights": [1.0, np.nan]}, "finite"),
        ([(0, 1)], {"weights": ["a"]}, "no numbers; allowed: one number a hyperedge"),
        ([(0, 1)], {"weights": [1e300]}, "allowed: 0, or 1e-50 to 1e\\+50; scale them"),
        ([(0, 1 << 40)], {}, "number the nodes first"),
        ([], {"nodes": -1}, "-1 nodes"),
        ([], {"nodes": 1.5}, "1.5 nodes"),
        (3, {}, "hyperedges of type int"),
        ([0, 1], {}, "allowed: collections of nodes"),
    ],
)
def test_what_is_no_hypergraph_is_refused(edges: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Hypergraph.from_edges(edges, **options)


def test_no_hyperedges_are_a_hypergraph_too() -> None:
    h = Hypergraph.from_edges([], nodes=3)
    assert (h.nodes, h.edges, h.uniform) == (3, 0, None)
    found = partition(h, 2)
    assert found.value == 0
    assert found.fits


def test_a_network_is_a_hypergraph_of_its_values() -> None:
    operations = (Operation("a", "x", (0,), (1,)), Operation("b", "x", (1,), (2,)), Operation("c", "x", (1, 2), (3,)))
    values = tuple(Value(name, size) for name, size in (("in", 4), ("a", 8), ("b", 16), ("out", 32)))
    h = Hypergraph.from_network(Network(operations, values, inputs=(0,), outputs=(3,)), node_weights=[1, 2, 3])
    assert [h.pins[a:b].tolist() for a, b in zip(h.starts[:-1], h.starts[1:], strict=True)] == [[0, 1, 2], [1, 2]]
    assert h.weights.tolist() == [8.0, 16.0]


def _cost(h: Hypergraph, part: NDArray[np.int64], objective: Objective) -> float:
    """The objective from its definition, a hyperedge at a time."""
    parts = range(int(part.max()) + 1)
    size = h.degrees if objective == "normalised" else h.node_weights
    inside = [float(size[part == p].sum()) for p in parts]
    total = 0.0
    for e in range(h.edges):
        touched = set(part[h.pins[h.starts[e] : h.starts[e + 1]]].tolist())
        if len(touched) > 1:
            share = {"cut": 1.0, "connectivity": len(touched) - 1.0}
            total += h.weights[e] * share.get(objective, sum(1 / inside[p] if inside[p] else np.inf for p in touched))
    return total


@given(hypergraphs(), st.integers(0, 1000))
def test_costs_are_what_they_are_by_definition(h: Hypergraph, seed: int) -> None:
    part = np.random.default_rng(seed).integers(3, size=h.nodes)
    found = cuts(h, part)
    for objective in OBJECTIVES:
        assert getattr(found, objective) == pytest.approx(_cost(h, part, objective))
    assert sum(found.weights) == pytest.approx(h.node_weights.sum())


@given(hypergraphs(most=12), st.integers(2, 4), st.sampled_from(OBJECTIVES), st.integers(0, 1000))
def test_refinement_counts_right_and_never_makes_it_worse(
    h: Hypergraph, parts: int, objective: Objective, seed: int
) -> None:
    # The values that refine gives come from gains that are kept true from move to move.
    rng = np.random.default_rng(seed)
    start = np.stack([rng.permutation(np.arange(h.nodes) % parts) for _ in range(3)])
    most = np.full(parts, max(1.1 * h.node_weights.sum() / parts, 3.0))
    before = [cuts(h, part) for part in start]
    better, values = refine(h, start, Limits(objective, most), rng=rng)
    for part, value, old in zip(better, values, before, strict=True):
        assert value == pytest.approx(_cost(h, part, objective))
        heavy = max(0.0, *(np.bincount(part, h.node_weights, minlength=parts) - most))
        heavy_before = max(0.0, *(np.array(old.weights) - most))
        assert heavy <= heavy_before + 1e-9 or heavy_before > 0
        if heavy_before == 0:
            assert value <= getattr(old, objective) + 1e-9


@given(hypergraphs(most=12), st.integers(0, 1000))
def test_a_smaller_hypergraph_costs_what_the_large_one_does(h: Hypergraph, seed: int) -> None:
    rng = np.random.default_rng(seed)
    apart = rng.integers(2, size=h.nodes)
    small, new = coarsen(h, rng=rng, heaviest=4.0, apart=apart)
    part = rng.integers(3, size=small.nodes)
    for objective in ("cut", "connectivity", "ratio"):
        assert getattr(cuts(small, part), objective) == pytest.approx(getattr(cuts(h, part[new]), objective))
    assert all(len(set(apart[new == node])) == 1 for node in range(small.nodes))


@given(hypergraphs(sizes=(2, 3), least=5, most=8))
def test_two_parts_of_a_small_hypergraph_are_the_best_there_are(h: Hypergraph) -> None:
    even = Hypergraph(h.pins.copy(), h.starts.copy(), h.weights.copy(), np.ones(h.nodes))
    found = partition(even, 2, balance=0.1)
    sides = (np.arange(1, 2 ** (h.nodes - 1))[:, None] >> np.arange(h.nodes)) & 1
    fitting = [side for side in sides if max(side.sum(), h.nodes - side.sum()) <= found.most + 1e-9]
    assert found.fits
    assert found.value == pytest.approx(min(cuts(even, side).cut for side in fitting))


@given(hypergraphs(most=10), st.integers(1, 4), st.sampled_from(OBJECTIVES), st.sampled_from(["auto", "clique"]))
def test_each_part_has_a_node_and_the_result_is_what_it_says(
    h: Hypergraph, parts: int, objective: Objective, method: Any
) -> None:
    balance = None if objective in ("ratio", "normalised") else 0.2
    found = partition(h, parts, method=method, balance=balance, objective=objective)
    assert set(found.part.tolist()) == set(range(parts))
    assert found.value == pytest.approx(_cost(h, found.part, objective))
    assert found.fits == (max(found.cuts.weights) <= found.most + 1e-9)
    again = partition(h, parts, method=method, balance=balance, objective=objective)
    assert again.part.tolist() == found.part.tolist()


def test_refining_beats_the_sweep_and_auto_is_no_worse() -> None:
    h = by_chance(200, 3, 500, seed=7)
    swept = partition(h, refine=False)
    better = partition(h, method="clique")
    best = partition(h)
    assert best.value <= better.value < swept.value
    assert best.tried["clique"] == better.value
    assert f"2 parts by {best.method}: cut {best.value:g} (tried: clique" in str(best)


def test_unequal_weights_are_balanced_by_weight() -> None:
    h = by_chance(60, 3, 200, seed=1)
    weights = np.random.default_rng(0).integers(1, 9, size=h.nodes).astype(float)
    heavy = Hypergraph(h.pins.copy(), h.starts.copy(), h.weights.copy(), weights)
    for parts in (2, 3, 5):
        found = partition(heavy, parts, balance=0.1)
        assert found.fits
        assert found.cuts.imbalance <= 0.1 + 1e-9


@pytest.mark.parametrize("objective", ["cut", "connectivity", "normalised"])
@pytest.mark.parametrize("method", ["auto", "multilevel", "clique"])
def test_nodes_that_weigh_nothing_are_parted_too(method: Method, objective: Objective) -> None:
    for weights in ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 1.0]):
        h = Hypergraph.from_edges([(0, 1), (1, 2), (2, 3)], node_weights=weights)
        for parts in (1, 2, 3, 4):
            assert len(set(partition(h, parts, method=method, objective=objective).part.tolist())) == parts
    with pytest.raises(InputError, match="node weights of 0"):
        partition(h, objective="ratio")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "x"}, "auto, multilevel, clique, tensor, absolute"),
        ({"objective": "x"}, "cut, connectivity, ratio, normalised"),
        ({"parts": 9}, "1 to 5"),
        ({"balance": None}, "no balance for 'cut'"),
        ({"balance": -0.1}, "0 or more"),
        ({"method": "multilevel", "refine": False}, "without refinement"),
        ({"method": "tensor"}, "size 2 to 3"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: dict[str, Any], said: str) -> None:
    h = Hypergraph.from_edges([(0, 1, 2), (2, 3), (3, 4)])
    with pytest.raises(InputError, match=said):
        partition(h, **options)
    assert len(METHODS) == 5


def test_it_needs_no_framework() -> None:
    code = "import sys, surgery.hypergraph; print([m for m in ('torch', 'onnx', 'rich', 'click') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
