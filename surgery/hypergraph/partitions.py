"""Partition a hypergraph: by a Fiedler vector and a sweep, by levels, or by whichever of these measures best.

``clique``, ``tensor``, ``absolute``   that Fiedler vector, cut where the objective is least; then refined
``multilevel``                         levels from many starts; see surgery.hypergraph.multilevel
``auto``                               ``multilevel`` with the clique expansion's sweep as one more start

Of two parts each, and again inside of the parts where more are asked for; then all parts are refined together. ``auto``
leaves the tensor out: on planted and on real hypergraphs its refined cut was no better, and took longer
(``tools/bench_hypergraph.py`` measures it anew).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from surgery.errors import InputError
from surgery.hypergraph.costs import OBJECTIVES, Cuts, Objective, cuts
from surgery.hypergraph.hypergraph import Floats, Hypergraph, Integers
from surgery.hypergraph.moves import Limits
from surgery.hypergraph.moves import refine as refined
from surgery.hypergraph.multilevel import multilevel
from surgery.hypergraph.ragged import added
from surgery.hypergraph.vectors import VECTORS, Fiedler, fiedler

__all__ = ["METHODS", "Method", "Partition", "partition", "sweep"]

Method: TypeAlias = Literal["auto", "multilevel", "clique", "tensor", "absolute"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, eq=False)
class Partition:
    """Each node's part (n,), from 0 on, and what that costs.

    ``method`` is the one whose partition this is, ``tried`` has the objective of each that was tried. ``fits`` says
    that no part is above ``most``, the most node weight that was allowed. ``vector`` is the Fiedler vector of the whole
    hypergraph if one was computed.
    """

    part: Integers
    method: Method
    objective: Objective
    cuts: Cuts
    tried: Mapping[str, float]
    most: float
    vector: Fiedler | None = None

    @property
    def value(self) -> float:
        """The objective's value."""
        return float(getattr(self.cuts, self.objective))

    @property
    def fits(self) -> bool:
        """Whether no part is heavier than was allowed."""
        return max(self.cuts.weights, default=0.0) <= self.most + 1e-9

    def __str__(self) -> str:
        others = ", ".join(f"{name} {value:g}" for name, value in self.tried.items())
        heavy = "" if self.fits else f"; a part weighs {max(self.cuts.weights):g}, above {self.most:g}"
        return (
            f"{len(self.cuts.weights)} parts by {self.method}: {self.objective} {self.value:g} (tried: {others}){heavy}"
        )


def partition(
    h: Hypergraph,
    parts: int = 2,
    *,
    method: Method = "auto",
    refine: bool = True,
    balance: float | None = 0.03,
    objective: Objective = "cut",
    seed: int = 0,
) -> Partition:
    """Return a partition of low objective whose parts weigh at most (1 + ``balance``) times an equal share.

    None as ``balance`` bounds nothing: for "ratio" and "normalised", which keep their balance themselves. An equal
    share of nodes of one weight is rounded up to whole nodes; nodes of uneven weights may leave no partition that fits,
    and the result says so. Without ``refine`` the Fiedler vector's sweep is all; "auto" then takes the clique
    expansion's. The same seed gives the same partition. Raises ``InputError`` for what cannot be, and where the
    method's Fiedler vector refuses.

    >>> h = Hypergraph.from_edges([(0, 1, 2), (0, 1), (2, 3), (3, 4, 5), (4, 5)])
    >>> found = partition(h)
    >>> sorted(map(sorted, (np.flatnonzero(found.part == p).tolist() for p in (0, 1)))), found.value
    ([[0, 1, 2], [3, 4, 5]], 1.0)
    """
    _check(h, parts, method, refine, balance, objective)
    most = np.inf if balance is None else (1 + balance) * _share(h, parts)
    limits = Limits(objective, np.full(parts, most))
    task = _Task(method if refine or method != "auto" else "clique", refine, np.random.default_rng(seed))
    part = np.zeros(h.nodes, np.int64) if parts == 1 else task.split(h, limits)
    part = _filled(h, part, parts)
    found = cuts(h, part)
    return Partition(part, task.chosen, objective, found, task.tried, float(most), task.vector)


def _check(
    h: Hypergraph, parts: int, method: Method, refine: bool, balance: float | None, objective: Objective
) -> None:
    if method not in METHODS:
        raise InputError(f"method {method!r}", allowed=", ".join(METHODS))
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r}", allowed=", ".join(OBJECTIVES))
    if not 1 <= parts <= h.nodes:
        raise InputError(f"{parts} parts of {h.nodes} nodes", allowed=f"1 to {h.nodes}")
    if objective == "ratio" and h.nodes and not h.node_weights.all():
        what = 'objective "ratio" with node weights of 0'
        raise InputError(what, allowed="above 0: the cut is divided by them", next_step='or take "normalised"')
    if balance is None and objective not in ("ratio", "normalised"):
        raise InputError(f"no balance for {objective!r}", allowed='a number, or objective "ratio" or "normalised"')
    if balance is not None and not 0 <= balance < np.inf:
        raise InputError(f"balance {balance}", allowed="0 or more: 0.03 is 3 %")
    if method == "multilevel" and not refine:
        raise InputError('method "multilevel" without refinement', allowed="refine=True", next_step='or take "clique"')


def _share(h: Hypergraph, parts: int) -> float:
    """Return an equal share of the node weight; of nodes of one weight, whole nodes."""
    one = float(h.node_weights.max())
    if one > 0 and float(np.ptp(h.node_weights)) == 0:
        return one * -(-h.nodes // parts)
    return float(h.node_weights.sum()) / parts


class _Task:
    """One call of ``partition``: what is asked for on each level, and what was tried on the whole."""

    def __init__(self, method: Method, refine: bool, rng: np.random.Generator) -> None:
        self.method, self.refine, self.rng = method, refine, rng
        self.chosen: Method = "multilevel" if method == "auto" else method
        self.tried: dict[str, float] = {}
        self.vector: Fiedler | None = None

    def split(self, h: Hypergraph, limits: Limits) -> Integers:
        """Return the partition of the whole hypergraph."""
        if limits.parts == 2:
            part, self.tried, self.vector = self.bisect(h, limits)
            if self.method == "auto":
                self.chosen = "clique" if self.tried["clique"] <= self.tried["multilevel"] else "multilevel"
            return part
        part = self.recurse(h, limits, limits.parts)
        if not self.refine:
            self.tried = {self.method: float(getattr(cuts(h, part), limits.objective))}
            return part
        if self.method in VECTORS:
            better, values = refined(h, part[None], limits, rng=self.rng)
            self.tried = {self.method: float(values[0])}
            return better[0]
        part, value = multilevel(h, limits, rng=self.rng, starts=part[None])
        self.tried = {"multilevel": value}
        return part

    def recurse(self, h: Hypergraph, limits: Limits, parts: int) -> Integers:
        """Return ``parts`` parts by halving the hypergraph, and the halves again."""
        if parts == 1:
            return np.zeros(h.nodes, np.int64)
        halves = np.array([(parts + 1) // 2, parts // 2])
        side = self.halved(h, limits, halves)
        found = np.zeros(h.nodes, np.int64)
        for number, first in ((0, 0), (1, halves[0])):
            own = side == number
            # For a cut, a hyperedge that is cut already costs no more inside. For the
            # connectivity its rest costs again.
            inner = h.inside(own, whole=limits.objective != "connectivity")
            found[own] = first + self.recurse(inner, limits, int(halves[number]))
        return found

    def halved(self, h: Hypergraph, limits: Limits, halves: Integers) -> Integers:
        """Return two sides that have room for so many parts each."""
        # What a part may weigh above its share is spread over the levels to come: (1 + e)^levels is what is allowed.
        parts, total = int(halves.sum()), float(h.node_weights.sum())
        shares = max(_share(h, parts), 1e-300) * halves
        loose = max(1.0, float(limits.most[0]) / max(_share(h, parts), 1e-300)) ** (1 / np.ceil(np.log2(parts)))
        side = self.bisect(h, Limits(limits.objective, np.minimum(shares * loose, total)))[0]
        if (np.bincount(side, minlength=2) < halves).any():  # too few nodes there
            order = np.argsort(side, kind="stable")
            side = np.ones(h.nodes, np.int64)
            side[order[: int(np.clip(round(h.nodes * halves[0] / parts), halves[0], h.nodes - halves[1]))]] = 0
        return side

    def bisect(self, h: Hypergraph, limits: Limits) -> tuple[Integers, dict[str, float], Fiedler | None]:
        """Return two parts, the objective of each method that was tried, and the Fiedler vector if there is one."""
        vector, tried, start = None, dict[str, float](), None
        if self.method != "multilevel":
            vector = fiedler(h, "clique" if self.method == "auto" else self.method)
            start, value = sweep(h, vector.vector, limits)
            if self.refine:
                better, values = refined(h, start[None], limits, rng=self.rng)
                start, value = better[0], float(values[0])
            tried["clique" if self.method == "auto" else self.method] = value
        if self.method in ("auto", "multilevel"):
            starts = None if start is None else start[None]
            part, tried["multilevel"] = multilevel(h, limits, rng=self.rng, starts=starts)
            return part, tried, vector
        assert start is not None
        return start, tried, vector


def sweep(h: Hypergraph, vector: Floats, limits: Limits) -> tuple[Integers, float]:
    """Return the two parts that cutting the nodes in the vector's order makes cheapest, and their objective.

    Among the cuts that fit the limits, or among those that come nearest to it if none does.
    """
    # A hyperedge is cut by the cuts between its first and its last node: +1 at the first, -1 at the last, added up.
    order = np.argsort(vector, kind="stable")
    rank = np.empty(h.nodes, np.int64)
    rank[order] = np.arange(h.nodes)
    first, last = (op.reduceat(rank[h.pins], h.starts[:-1]) if h.edges else h.sizes for op in (np.minimum, np.maximum))
    change = added(first, h.weights, h.nodes) - added(last, h.weights, h.nodes)
    value = np.cumsum(change)[:-1]
    load = np.cumsum(h.node_weights[order])[:-1]
    rest = float(h.node_weights.sum()) - load
    if limits.objective in ("ratio", "normalised"):
        size = h.node_weights if limits.objective == "ratio" else h.degrees
        left = np.cumsum(size[order])[:-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = value / left + value / (float(size.sum()) - left)
        value = np.where(value > 1e-12 * h.weights.max(initial=0.0), shares, 0.0)
    # The first nodes may be part 0 or part 1, whichever exceeds the limits less.
    low, high = (np.maximum(load - limits.most[i], 0) + np.maximum(rest - limits.most[1 - i], 0) for i in (0, 1))
    excess = np.minimum(low, high)
    at = int(np.lexsort((value, np.where(excess < 1e-9, 0.0, excess)))[0])
    part = (rank > at).astype(np.int64)
    return (part if low[at] <= high[at] else 1 - part), float(value[at])


def _filled(h: Hypergraph, part: Integers, parts: int) -> Integers:
    """Return the partition with a node in each part: an empty one takes the lightest node of the fullest."""
    count = np.bincount(part, minlength=parts)
    if (count > 0).all():
        return part
    part = part.copy()
    for empty in np.flatnonzero(count == 0):
        own = np.flatnonzero(part == count.argmax())
        node = own[h.node_weights[own].argmin()]
        count[part[node]] -= 1
        part[node], count[empty] = empty, 1
    return part
