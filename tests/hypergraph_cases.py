"""Small hypergraphs for the tests: by chance, for Hypothesis, and one on which a lower tensor value cuts far more."""

from __future__ import annotations

from itertools import combinations
from math import factorial

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from surgery.hypergraph import Hypergraph


@st.composite
def hypergraphs(draw: st.DrawFn, sizes: tuple[int, ...] = (1, 2, 3, 4), least: int = 4, most: int = 9) -> Hypergraph:
    """Hypergraphs of a few nodes, with weights of both."""
    nodes = draw(st.integers(max(least, *sizes), most))
    sets = [list(combinations(range(nodes), size)) for size in sizes]
    edges = draw(st.lists(st.one_of(*map(st.sampled_from, sets)), min_size=1, max_size=3 * nodes, unique=True))
    weights = draw(st.lists(st.integers(1, 5), min_size=len(edges), max_size=len(edges)))
    node_weights = draw(st.lists(st.integers(1, 3), min_size=nodes, max_size=nodes))
    return Hypergraph.from_edges(edges, nodes=nodes, weights=weights, node_weights=node_weights)


def by_chance(nodes: int, size: int, edges: int, seed: int) -> Hypergraph:
    """A hypergraph of one size whose hyperedges are by chance, with a ring so that it is connected."""
    rng = np.random.default_rng(seed)
    ring = (np.arange(nodes)[:, None] + np.arange(size)) % nodes
    rows = [*ring, *(rng.choice(nodes, size, replace=False) for _ in range(edges - nodes))]
    return Hypergraph.from_edges(rows, nodes=nodes)


def trap(
    nodes: int = 400, edges: int = 1200, crossing: int = 220, seed: int = 0
) -> tuple[Hypergraph, NDArray[np.int64]]:
    """4-edges in two communities, crossed by two types of which almost each takes two nodes each; (n, 2) the labels."""
    rng = np.random.default_rng(seed)
    labels = np.stack([np.arange(nodes) % 2, np.arange(nodes) // 2 % 2], axis=1)
    rows: set[tuple[int, ...]] = set()
    while len(rows) < edges:
        inside = len(rows) >= crossing
        side = rng.integers(2)
        pair = [
            rng.choice(
                np.flatnonzero((labels[:, 1] == kind) & ((labels[:, 0] == side) | (not inside))), 2, replace=False
            )
            for kind in (0, 1)
        ]
        rows.add(tuple(sorted(np.concatenate(pair).tolist())))
    return Hypergraph.from_edges(sorted(rows), nodes=nodes), labels


def dense_tensor(h: Hypergraph) -> NDArray[np.float64]:
    """The Laplacian tensor of a small hypergraph of one size k, (n,) * k, from its definition."""
    table = h.table()
    size = table.shape[1]
    tensor = np.zeros((h.nodes,) * size)
    for row, weight in zip(table, h.weights, strict=True):
        for place in np.ndindex((size,) * size):
            if len(set(place)) == size:
                tensor[tuple(row[list(place)])] -= weight / factorial(size - 1)
        for node in row:
            tensor[(node,) * size] += weight
    return tensor
