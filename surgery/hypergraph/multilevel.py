"""Partitions by levels: shrink the hypergraph, partition what is left from many starts, refine on the way back.

A level joins pairs of nodes that share heavy small hyperedges: each node looks for the neighbour with the highest
rating, sum of w_e / (|e| - 1) over the hyperedges of both, divided by both node weights; pairs that chose each other
become one node. Hyperedges of one node vanish, equal ones add their weights, so that a partition of the small
hypergraph costs exactly what it costs when it is carried back. (Heavy edge matching: Karypis and others, hMETIS, 1999.)

Then come cycles: the best partitions are kept, and levels are made anew that join no two nodes which any of them
separates. So all of them exist on every level, and refining there moves whole groups of nodes on which they agree.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from surgery.hypergraph.hypergraph import Floats, Hypergraph, Integers, merged
from surgery.hypergraph.moves import Limits, costs_of, refine
from surgery.hypergraph.ragged import added

__all__ = ["coarsen", "joined", "multilevel", "random_parts"]

_SMALLEST = 120  # nodes for each two parts: below, levels end
_WIDEST = 40  # hyperedges of more nodes rate no pairs; there would be too many
_STARTS, _KEPT, _FRESH = 48, 4, 2
_ROUNDS = 4  # of choosing partners, on each level
_STALLED = 0.95  # of the nodes are left: then there are no more levels
_WORK = 40_000  # gains that one level chooses from at a time


def multilevel(
    h: Hypergraph, limits: Limits, *, rng: np.random.Generator, starts: Integers | None = None, cycles: int = 4
) -> tuple[Integers, float]:
    """Return the best partition found and its objective; ``starts`` (S, n) are partitions to begin with, too."""
    found = [_cycle(h, limits, rng, None) for _ in range(_FRESH)]
    if starts is not None:
        found.append(refine(h, starts, limits, rng=rng)[0])
    kept, values = _best(h, np.concatenate(found), limits, _KEPT)
    for _ in range(cycles):
        before = values[0]
        again = _cycle(h, limits, rng, kept)
        kept, values = _best(h, np.concatenate([kept, again]), limits, _KEPT)
        if values[0] >= before:
            break
    return kept[0], float(values[0])


def _cycle(h: Hypergraph, limits: Limits, rng: np.random.Generator, kept: Integers | None) -> Integers:
    """Go down the levels and back up; ``kept`` are partitions that all levels have to respect, and start from."""
    # Invariant: ``part`` (S, n) are partitions of the smallest level so far, and on the way back of ``level``.
    levels, maps, part = [h], list[Integers](), kept
    heaviest = max(float(h.node_weights.max(initial=0)), 1.5 * h.node_weights.sum() / (_SMALLEST * limits.parts / 2))
    while levels[-1].nodes > _SMALLEST * limits.parts / 2:
        # A column is what all kept partitions say of a node. Example: 0011 and 0101 have the columns 00, 01,
        # 10, 11, and no two nodes are joined. Joined nodes agree in all partitions, so that ``carried`` is the
        # same whichever writes last.
        apart = None if part is None else np.unique(part, axis=1, return_inverse=True)[1].reshape(-1)
        small, new = coarsen(levels[-1], rng=rng, heaviest=heaviest, apart=apart)
        if small.nodes > _STALLED * levels[-1].nodes:
            break
        if part is not None:
            carried = np.zeros((len(part), small.nodes), np.int64)
            carried[:, new] = part
            part = carried
        levels.append(small)
        maps.append(new)
    if part is None:
        part = random_parts(levels[-1], limits, count=_STARTS, rng=rng)
    for number in range(len(levels) - 1, -1, -1):
        level = levels[number]
        part = refine(level, part, limits, rng=rng, patience=_patience(level))[0]
        if number:
            few = int(np.clip(_WORK // (levels[number - 1].nodes * limits.parts), 2, _STARTS))
            part = _best(level, part, limits, few)[0][:, maps[number - 1]]
    return _best(h, part, limits, _KEPT)[0]


def _patience(h: Hypergraph) -> int:
    return max(30, min(h.nodes // 100, 60))


def _best(h: Hypergraph, part: Integers, limits: Limits, count: int) -> tuple[Integers, Floats]:
    """Return the best partitions, each once, and their objectives; the best first, and what fits before what does not.

    What exceeds the limits comes by how much it does.
    """
    part = np.unique(part, axis=0)
    excess, values = costs_of(h, part, limits)
    order = np.lexsort((values, excess))[:count]
    return part[order], values[order]


def random_parts(h: Hypergraph, limits: Limits, *, count: int, rng: np.random.Generator) -> Integers:
    """Return partitions (count, n) by chance, whose parts weigh about what their limits say."""
    order = np.argsort(rng.random((count, h.nodes)), axis=1)
    weights = h.node_weights[order]
    most = np.where(np.isfinite(limits.most), limits.most, 1.0)
    # A node is in the part in which the middle of its weight lies. Example: 4 nodes of weight 1 for two equal parts
    # have middles at 0.5, 1.5, 2.5 and 3.5, and the end of the first part is at 2.
    ends = np.cumsum(most)[:-1] / (most.sum() or 1.0) * max(h.node_weights.sum(), 1e-300)
    slots = np.searchsorted(ends, np.cumsum(weights, axis=1) - weights / 2, side="right")
    part = np.empty((count, h.nodes), np.int64)
    np.put_along_axis(part, order, slots, axis=1)
    return part


def coarsen(
    h: Hypergraph, *, rng: np.random.Generator, heaviest: float, apart: Integers | None = None
) -> tuple[Hypergraph, Integers]:
    """Return a smaller hypergraph and each node's number in it; nodes of different ``apart`` are never joined."""
    row, column, rating = _ratings(h, rng)
    fine = h.node_weights[row] + h.node_weights[column] <= heaviest
    if apart is not None:
        fine &= apart[row] == apart[column]
    order = np.argsort(np.where(fine, rating, -1.0), kind="stable")[np.count_nonzero(~fine) :]
    row, column = row[order], column[order]  # by rising rating, so that of what is written to a node the best stays
    group, every = np.arange(h.nodes), (row, column)
    for _ in range(_ROUNDS):
        best = np.full(h.nodes, -1)
        # Pairs that chose each other: 0 chose 3 and 3 chose 0, so that both have group 0. Who
        # was not chosen tries again.
        best[row] = column
        chosen = (best >= 0) & (best[best] == np.arange(h.nodes))
        group[chosen] = np.minimum(best, np.arange(h.nodes))[chosen]
        free = np.bincount(group, minlength=h.nodes)[group] == 1
        both = free[row] & free[column]
        row, column = row[both], column[both]
        if not len(row):
            break
    group = _joined_up(h, group, *every, heaviest)
    group = _alone(h, group, heaviest, apart)
    kinds, new = np.unique(group, return_inverse=True)
    return joined(h, new, len(kinds)), new


def _joined_up(h: Hypergraph, group: Integers, row: Integers, column: Integers, heaviest: float) -> Integers:
    """Let nodes that are alone join the group of their best neighbour, the lightest first, while that stays light."""
    size = np.bincount(group, minlength=h.nodes)
    alone = (size[group] == 1)[row] & (size[group] > 1)[column]
    best = np.full(h.nodes, -1)
    best[row[alone]] = column[alone]
    nodes = np.flatnonzero(best >= 0)
    return _filled_up(h, group, nodes, group[best[nodes]], heaviest)


def _alone(h: Hypergraph, group: Integers, heaviest: float, apart: Integers | None) -> Integers:
    """Join nodes that no hyperedge ties to others: they cost nothing wherever they are, and only slow things down."""
    nodes = np.flatnonzero(h.degrees == 0)
    if len(nodes) < 2:
        return group
    side = np.zeros(len(nodes), np.int64) if apart is None else apart[nodes]
    nodes = nodes[np.argsort(side, kind="stable")]
    pair = nodes[0 : len(nodes) - 1 : 2], nodes[1::2]
    same = h.node_weights[pair[0]] + h.node_weights[pair[1]] <= heaviest
    if apart is not None:
        same &= apart[pair[0]] == apart[pair[1]]
    group = group.copy()
    group[pair[1][same]] = group[pair[0][same]]
    return group


def _filled_up(h: Hypergraph, group: Integers, nodes: Integers, wanted: Integers, heaviest: float) -> Integers:
    """Add nodes to the groups that they want, the lightest first, as long as a group stays within ``heaviest``."""
    if not len(nodes):
        return group
    # ``total - before`` is the weight of what wants the same group so far. Example: 1, 2, 3 want one group and 4
    # another: totals 1, 3, 6, 10, before 0, 0, 0, 6. As the lightest come first, nothing fits after one that did not.
    order = np.lexsort((h.node_weights[nodes], wanted))
    nodes, wanted = nodes[order], wanted[order]
    total = np.cumsum(h.node_weights[nodes])
    first = np.flatnonzero(np.diff(wanted, prepend=-1))
    before = np.repeat(total[first] - h.node_weights[nodes[first]], np.diff(first, append=len(nodes)))
    weight = np.bincount(group, h.node_weights, minlength=h.nodes)
    fit = weight[wanted] + total - before <= heaviest
    group = group.copy()
    group[nodes[fit]] = wanted[fit]
    return group


def _ratings(h: Hypergraph, rng: np.random.Generator) -> tuple[Integers, Integers, Floats]:
    """Return pairs of nodes in both orders, with their ratings."""
    small = h if h.sizes.max(initial=0) <= _WIDEST else h.subset(h.sizes <= _WIDEST)
    weight = small.weights / np.maximum(small.sizes - 1, 1)
    upper = sparse.triu(small.incidence.T @ (small.incidence * weight[:, None]), 1).tocoo()
    mass = np.maximum(h.node_weights, 1e-12 * (h.node_weights.max(initial=0.0) or 1.0))
    rating = upper.data / (mass[upper.row] * mass[upper.col]) * (1 + 1e-3 * rng.random(upper.nnz))
    row, column = upper.row.astype(np.int64), upper.col.astype(np.int64)
    return np.concatenate([row, column]), np.concatenate([column, row]), np.concatenate([rating, rating])


def joined(h: Hypergraph, new: Integers, nodes: int) -> Hypergraph:
    """Return the hypergraph in which the nodes of one new number are one node; what then has one node is left out."""
    row = np.repeat(np.arange(h.edges), h.sizes)
    # (hyperedge, new node) as one number, so that nodes that became one count once in a hyperedge.
    key = np.unique(row * nodes + new[h.pins])
    row, pins = np.divmod(key, nodes)
    sizes = np.bincount(row, minlength=h.edges)
    wide = sizes > 1
    kept = wide[row]
    return merged(pins[kept], sizes[wide], h.weights[wide], added(new, h.node_weights, nodes))
