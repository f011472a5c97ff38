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
from surgery.hypergraph.moves import Limits, refine
from surgery.hypergraph.ragged import added

__all__ = ["coarsen", "multilevel", "random_parts"]

_SMALLEST = 120  # nodes for each two parts: below, levels end
_WIDEST = 40  # hyperedges of more nodes rate no pairs; there would be too many
_STARTS, _KEPT = 48, 4
_WORK = 40_000  # gains that one level chooses from at a time


def multilevel(
    h: Hypergraph, limits: Limits, *, rng: np.random.Generator, starts: Integers | None = None, cycles: int = 2
) -> tuple[Integers, float]:
    """Return the best partition found and its objective; ``starts`` (S, n) are partitions to begin with, too."""
    kept, values = _cycle(h, limits, rng, None)
    if starts is not None:
        more, those = refine(h, starts, limits, rng=rng)
        kept, values = _best(np.concatenate([kept, more]), np.concatenate([values, those]), _KEPT)
    for _ in range(cycles):
        before = values.min()
        again, those = _cycle(h, limits, rng, kept)
        kept, values = _best(np.concatenate([kept, again]), np.concatenate([values, those]), _KEPT)
        if values.min() >= before:
            break
    return kept[0], float(values[0])


def _cycle(h: Hypergraph, limits: Limits, rng: np.random.Generator, kept: Integers | None) -> tuple[Integers, Floats]:
    """Go down the levels and back up; ``kept`` are partitions that all levels have to respect, and start from."""
    levels, maps = [h], []
    part = kept
    heaviest = max(float(h.node_weights.max(initial=0)), 1.5 * h.node_weights.sum() / (_SMALLEST * limits.parts / 2))
    while levels[-1].nodes > _SMALLEST * limits.parts / 2:
        apart = None if part is None else np.unique(part, axis=1, return_inverse=True)[1].reshape(-1)
        small, new = coarsen(levels[-1], rng=rng, heaviest=heaviest, apart=apart)
        if small.nodes > 0.95 * levels[-1].nodes:
            break
        if part is not None:
            first = np.zeros((len(part), small.nodes), np.int64)
            first[:, new] = part
            part = first
        levels.append(small)
        maps.append(new)
    if part is None:
        part = random_parts(levels[-1], limits, count=_STARTS, rng=rng)
    values = np.zeros(len(part))
    for number in range(len(levels) - 1, -1, -1):
        level = levels[number]
        part, values = refine(level, part, limits, rng=rng, patience=_patience(level))
        if number:
            fit = int(np.clip(_WORK // max(1, levels[number - 1].nodes * limits.parts), 2, _STARTS))
            part, values = _best(part, values, fit)
            part = part[:, maps[number - 1]]
    return _best(part, values, _KEPT)


def _patience(h: Hypergraph) -> int:
    return max(30, min(h.nodes // 100, 60))


def _best(part: Integers, values: Floats, count: int) -> tuple[Integers, Floats]:
    """Return the best partitions, each once, the best first."""
    _, first = np.unique(part, axis=0, return_index=True)
    order = first[np.argsort(values[first], kind="stable")][:count]
    return part[order], values[order]


def random_parts(h: Hypergraph, limits: Limits, *, count: int, rng: np.random.Generator) -> Integers:
    """Return partitions (count, n) by chance, whose parts weigh about what their limits say."""
    order = np.argsort(rng.random((count, h.nodes)), axis=1)
    weights = h.node_weights[order]
    most = np.where(np.isfinite(limits.most), limits.most, 1.0)
    ends = np.cumsum(most)[:-1] / most.sum() * max(h.node_weights.sum(), 1e-300)
    slots = np.searchsorted(ends, np.cumsum(weights, axis=1) - weights / 2, side="right")
    part = np.empty((count, h.nodes), np.int64)
    np.put_along_axis(part, order, slots, axis=1)
    return part


def coarsen(
    h: Hypergraph, *, rng: np.random.Generator, heaviest: float, apart: Integers | None = None
) -> tuple[Hypergraph, Integers]:
    """Return a smaller hypergraph and each node's number in it; nodes of different ``apart`` are never joined."""
    row, column, rating = _ratings(h, rng)
    allowed = h.node_weights[row] + h.node_weights[column] <= heaviest
    if apart is not None:
        allowed &= apart[row] == apart[column]
    row, column, rating = row[allowed], column[allowed], rating[allowed]
    partner = np.arange(h.nodes)
    for _ in range(4):
        best = np.full(h.nodes, -1)
        order = np.argsort(rating, kind="stable")
        best[row[order]] = column[order]  # the last written is the highest
        chosen = (best >= 0) & (best[best] == np.arange(h.nodes))
        partner[chosen] = best[chosen]
        free = partner == np.arange(h.nodes)
        left = free[row] & free[column]
        row, column, rating = row[left], column[left], rating[left]
        if not len(row):
            break
    kinds, new = np.unique(np.minimum(partner, np.arange(h.nodes)), return_inverse=True)
    return joined(h, new, len(kinds)), new


def _ratings(h: Hypergraph, rng: np.random.Generator) -> tuple[Integers, Integers, Floats]:
    """Return pairs of nodes in both orders, with their ratings."""
    small = h if h.sizes.max(initial=0) <= _WIDEST else h.subset(h.sizes <= _WIDEST)
    weight = small.weights / np.maximum(small.sizes - 1, 1)
    upper = sparse.triu(small.incidence.T @ (small.incidence * weight[:, None]), 1).tocoo()
    mass = np.maximum(h.node_weights, 1e-12 * max(h.node_weights.max(initial=0.0), 1e-300))
    rating = upper.data / (mass[upper.row] * mass[upper.col]) * (1 + 1e-3 * rng.random(upper.nnz))
    row, column = upper.row.astype(np.int64), upper.col.astype(np.int64)
    return np.concatenate([row, column]), np.concatenate([column, row]), np.concatenate([rating, rating])


def joined(h: Hypergraph, new: Integers, nodes: int) -> Hypergraph:
    """Return the hypergraph in which the nodes of one new number are one node; what then has one node is left out."""
    row = np.repeat(np.arange(h.edges), h.sizes)
    key = np.unique(row * nodes + new[h.pins])
    row, pins = np.divmod(key, nodes)
    sizes = np.bincount(row, minlength=h.edges)
    wide = sizes > 1
    kept = wide[row]
    return merged(pins[kept], sizes[wide], h.weights[wide], added(new, h.node_weights, nodes))
