"""The hypergraph: nodes, hyperedges of any sizes, and the weights of both, as frozen arrays that were checked.

Node i is the number i. A hyperedge is a set of nodes; the nodes of all hyperedges lie in one array, the pins:

    edges (0, 1, 2) and (2, 3)  ->  pins [0 1 2 2 3], starts [0 3 5]

Each set of nodes is one hyperedge: what is given twice is merged, and its weights are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from surgery.errors import InputError
from surgery.hypergraph.ragged import added, bounds, distinct_rows, gathered, sorted_rows

__all__ = ["Floats", "Hypergraph", "Integers", "Network", "merged"]

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


class Network(Protocol):
    """What a hypergraph is made of a graph from: operations over values, as ``surgery.sites.network.Network`` is."""

    @property
    def operations(self) -> Sequence[Any]: ...  # noqa: D102
    @property
    def values(self) -> Sequence[Any]: ...  # noqa: D102
    @property
    def producer(self) -> Mapping[int, int]: ...  # noqa: D102
    @property
    def readers(self) -> Mapping[int, tuple[int, ...]]: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Hypergraph:
    """Hyperedges over the nodes 0 .. n - 1; made by ``from_edges``, which checks them.

    ``pins[starts[e]:starts[e + 1]]`` are the nodes of hyperedge e in ascending order, ``weights`` (m,) are the weights
    of the hyperedges, ``node_weights`` (n,) those of the nodes. ``merged`` counts the hyperedges that stood twice.
    The arrays are read-only.

    >>> h = Hypergraph.from_edges([(0, 1, 2), (2, 3), (1, 0, 2)])
    >>> h, h.sizes, h.weights
    (Hypergraph(4 nodes, 2 hyperedges of size 2 to 3), array([3, 2]), array([2., 1.]))
    """

    pins: Integers
    starts: Integers
    weights: Floats
    node_weights: Floats
    merged: int = 0

    def __post_init__(self) -> None:
        for array in (self.pins, self.starts, self.weights, self.node_weights):
            array.setflags(write=False)

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[Iterable[int]] | NDArray[Any],
        *,
        nodes: int | None = None,
        weights: ArrayLike | None = None,
        node_weights: ArrayLike | None = None,
    ) -> Hypergraph:
        """Return the hypergraph of these hyperedges: each a collection of distinct nodes, or a row of an array.

        ``nodes`` counts the nodes, by default up to the largest that is named. ``weights`` are one for each
        hyperedge given, ``node_weights`` one for each node; all are 1 by default. Hyperedges of one set of nodes are
        merged in the place of the first, and their weights are added. Raises ``InputError`` for an empty hyperedge, a
        node twice in a hyperedge, a node that is no number from 0 on, and weights that are negative or not finite, or
        beyond 1e-50 and 1e50.
        """
        pins, sizes = _flat(edges)
        largest = int(pins.max(initial=-1)) + 1
        given = np.size(node_weights) if node_weights is not None else largest
        count = given if nodes is None else nodes
        if not isinstance(count, int | np.integer) or not 0 <= count <= _MOST:
            raise InputError(f"{count} nodes", allowed=f"a whole number from 0 to {_MOST}", next_step=_NUMBER)
        if len(pins) and (pins.min() < 0 or largest > count):
            bad = int(pins.min()) if pins.min() < 0 else largest - 1
            raise InputError(f"node {bad} in a hyperedge", allowed=f"0 to {count - 1}", next_step=_NUMBER)
        _distinct(pins, sizes)
        own = _weights("weights", weights, len(sizes), "hyperedge")
        return merged(pins, sizes, own, _weights("node_weights", node_weights, count, "node"))

    @classmethod
    def from_network(cls, network: Network, *, node_weights: ArrayLike | None = None) -> Hypergraph:
        """Return the hypergraph of a graph: a node an operation, a hyperedge a value with its producer and readers.

        A hyperedge weighs the bytes of its value; values that tie no two operations are left out.
        """
        edges, weights = [], []
        for value, producer in network.producer.items():
            together = {producer, *network.readers.get(value, ())}
            if len(together) > 1:
                edges.append(sorted(together))
                weights.append(network.values[value].bytes)
        return cls.from_edges(edges, nodes=len(network.operations), weights=weights, node_weights=node_weights)

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return len(self.node_weights)

    @property
    def edges(self) -> int:
        """The number of hyperedges."""
        return len(self.weights)

    @cached_property
    def sizes(self) -> Integers:
        """How many nodes each hyperedge has."""
        return np.diff(self.starts)

    @cached_property
    def degrees(self) -> Floats:
        """The weight of the hyperedges at each node."""
        return added(self.pins, np.repeat(self.weights, self.sizes), self.nodes)

    @cached_property
    def incidence(self) -> sparse.csr_array:
        """The 0/1 matrix of hyperedges by nodes, (m, n)."""
        ones = np.ones(len(self.pins))
        return sparse.csr_array((ones, self.pins, self.starts), shape=(self.edges, self.nodes))

    @cached_property
    def around(self) -> sparse.csr_array:
        """The 0/1 matrix of nodes by hyperedges, (n, m): the incidence matrix, turned."""
        return self.incidence.T.tocsr()

    @property
    def uniform(self) -> int | None:
        """The one size of all hyperedges; None where sizes are mixed or there is no hyperedge."""
        sizes = np.unique(self.sizes)
        return int(sizes[0]) if len(sizes) == 1 else None

    def subset(self, chosen: ArrayLike) -> Hypergraph:
        """Return the hypergraph with the chosen hyperedges alone: numbers, or a mask; all nodes stay."""
        kept = np.arange(self.edges)[np.asarray(chosen)]
        pins = gathered(self.pins, self.starts, kept)
        return Hypergraph(pins, bounds(self.sizes[kept]), self.weights[kept], self.node_weights.copy())

    def of_size(self, size: int) -> Hypergraph:
        """Return the hypergraph with the hyperedges of one size alone; all nodes stay.

        >>> Hypergraph.from_edges([(0, 1, 2), (2, 3)]).of_size(3)
        Hypergraph(4 nodes, 1 hyperedge of size 3)
        """
        return self.subset(self.sizes == size)

    def inside(self, chosen: ArrayLike, *, whole: bool = True) -> Hypergraph:
        """Return the hypergraph of the chosen nodes, numbered anew in their order.

        It has the hyperedges that lie wholly inside. Without ``whole`` it has what lies inside of every hyperedge, as
        far as that is two nodes or more.
        """
        kept = np.arange(self.nodes)[np.asarray(chosen)]
        new = np.full(self.nodes, -1)
        new[kept] = np.arange(len(kept))
        there = new[self.pins] >= 0
        # How many nodes each hyperedge has inside. ``reduceat`` would be wrong for empty rows, which no hypergraph has.
        sizes = np.add.reduceat(there, self.starts[:-1]) if self.edges else self.sizes
        take = sizes == self.sizes if whole else sizes > 1
        pins = new[self.pins[there & np.repeat(take, self.sizes)]]
        return merged(pins, sizes[take], self.weights[take], self.node_weights[kept])

    def table(self) -> Integers:
        """Return the hyperedges of one size as an array (m, k), a row each; raises ``InputError`` for mixed sizes."""
        if self.edges and self.uniform is None:
            raise InputError(f"hyperedges of {self.say_sizes()}", allowed="hyperedges of one size", next_step=_ONE_SIZE)
        return self.pins.reshape(self.edges, self.uniform or 2)

    def say_sizes(self) -> str:
        """Return the sizes in words, as "size 2 to 5"."""
        if not self.edges:
            return "no size"
        low, high = self.sizes.min(), self.sizes.max()
        return f"size {low}" if low == high else f"size {low} to {high}"

    def __repr__(self) -> str:
        edges = f"{self.edges} hyperedge{'' if self.edges == 1 else 's'}"
        return f"Hypergraph({self.nodes} nodes, {edges}{f' of {self.say_sizes()}' if self.edges else ''})"


_MOST = 1 << 31  # nodes
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-50, 1e50  # products of a few weights are numbers too
_NUMBER = "number the nodes first, for instance by numpy.unique(names, return_inverse=True), or give nodes="
_ONE_SIZE = "take the hyperedges of one size by h.of_size(k), or another method"


def merged(pins: Integers, sizes: Integers, weights: Floats, node_weights: Floats) -> Hypergraph:
    """Return the hypergraph of hyperedges that are known to be sound; those of one set of nodes become one."""
    pins = sorted_rows(pins, sizes)
    first, inverse = distinct_rows(pins, sizes)
    total = added(inverse, weights, len(first))
    again = len(sizes) - len(first)
    return Hypergraph(gathered(pins, bounds(sizes), first), bounds(sizes[first]), total, node_weights, again)


def _flat(edges: Iterable[Iterable[int]] | NDArray[Any]) -> tuple[Integers, Integers]:
    """Return the nodes of all hyperedges in one array, and the sizes of the hyperedges."""
    if isinstance(edges, np.ndarray) and edges.ndim == 2:
        flat, sizes = edges.ravel(), np.full(len(edges), edges.shape[1])
    else:
        try:
            rows = [list(edge) for edge in edges]
        except TypeError as error:
            raise InputError(f"hyperedges of type {type(edges).__name__}", allowed="collections of nodes") from error
        flat, sizes = np.asarray(list(chain.from_iterable(rows))), np.array([len(row) for row in rows], np.int64)
    if len(flat) and (flat.dtype.kind not in "iu" or flat.ndim != 1):
        raise InputError(f"nodes of type {flat.dtype}", allowed="whole numbers from 0 on", next_step=_NUMBER)
    if (sizes == 0).any():
        raise InputError(f"hyperedge {int(np.argmin(sizes))} is empty", allowed="at least one node in each")
    return flat.astype(np.int64), sizes


def _distinct(pins: Integers, sizes: Integers) -> None:
    """Raise if a hyperedge has a node twice."""
    row = np.repeat(np.arange(len(sizes)), sizes)
    # A node that stands twice in a hyperedge has itself as its neighbour in the order, with the same row number.
    ordered = sorted_rows(pins, sizes)
    twice = np.flatnonzero((np.diff(ordered) == 0) & (np.diff(row) == 0))
    if len(twice):
        what = f"node {ordered[twice[0]]} stands twice in hyperedge {row[twice[0]]}"
        raise InputError(what, allowed="a set of distinct nodes", next_step="take set(edge) if that is meant")


def _weights(name: str, given: ArrayLike | None, count: int, one: str) -> Floats:
    """Return one weight for each, 1 by default; raise for any other number of them and for what is no weight."""
    if given is None:
        return np.ones(count)
    try:
        found = np.array(given, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} that are no numbers", allowed=f"one number a {one}") from error
    if found.shape != (count,):
        raise InputError(f"{name} of shape {found.shape}", allowed=f"({count},), one a {one}")
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise InputError(f"{name} with {found[~(found >= 0) | ~np.isfinite(found)][0]}", allowed="finite, 0 or more")
    bad = found[(found > 0) & ((found < _LEAST_WEIGHT) | (found > _MOST_WEIGHT))]
    if len(bad):
        allowed = f"0, or {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}"
        raise InputError(f"{name} with {bad[0]}", allowed=allowed, next_step="scale them")
    return found
