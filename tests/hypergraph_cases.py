"""Small hypergraphs for the tests: by chance and for Hypothesis, and the dense tensor from its definition."""

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
