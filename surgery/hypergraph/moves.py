"""Fiduccia-Mattheyses refinement of many partitions at once, on the true objective, for any number of parts.

A pass moves each node at most once, always the one whose move gains most and fits, even where the gain is negative;
then it goes back to the best partition on its way. Passes go on while they gain (Fiduccia and Mattheyses 1982).

The gain of moving u from its part a to b is a sum over its hyperedges e, with c_p the number of e's nodes in part p:

    connectivity   w_e [c_a = 1] - w_e [c_b = 0]
    cut            w_e [c_b = |e| - 1] - w_e [c_a = |e|]

that is ``leave(e, a) - enter(e, b)``. A move from a to b changes ``leave`` and ``enter`` of its hyperedges at a and b
alone, and only where a count comes to or goes from a bound. Of two parts, both gains are the same, and the move changes

    the gain of what is still in a by w_e ([c_a = 2] + [c_b = 0])
    the gain of what is in b by      -w_e ([c_b = 1] + [c_a = 1])          (c as it was before the move)

For instance e = {u, v, x} with u, v in a and x in b, when u moves: v's gain grows by w_e, since v is then the last of e
in a; x's falls by w_e, since x alone no longer keeps e cut.

One Python step moves a node in each of the partitions, so that they share its cost. Ratio and normalised cuts choose
their moves by the cut's gain, and the best partition on the way by their own value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.hypergraph.costs import Objective, cuts, part_sizes
from surgery.hypergraph.hypergraph import Floats, Hypergraph, Integers
from surgery.hypergraph.ragged import added, places

__all__ = ["Limits", "costs_of", "refine"]

_Counts = NDArray[np.int32]
_Mask = NDArray[np.bool_]
_TINY = 1e-9


@dataclass(frozen=True, eq=False)
class Limits:
    """What a partition is refined for, and the most node weight that each part may have (infinite for no bound)."""

    objective: Objective
    most: Floats

    @property
    def parts(self) -> int:
        """The number of parts."""
        return len(self.most)


@dataclass(frozen=True, eq=False)
class _Step:
    """One move in each of some partitions: the partitions' numbers, and the nodes that go from source to target."""

    rows: Integers
    node: Integers
    source: Integers
    target: Integers


@dataclass(frozen=True, eq=False)
class _Touched:
    """The hyperedges of the nodes that move: which move, which hyperedge, and its nodes in source and target before."""

    move: Integers
    edge: Integers
    source: _Counts
    target: _Counts

    def only(self, chosen: _Mask) -> _Touched:
        return _Touched(self.move[chosen], self.edge[chosen], self.source[chosen], self.target[chosen])


def refine(
    h: Hypergraph, part: Integers, limits: Limits, *, rng: np.random.Generator, passes: int = 20, patience: int = 200
) -> tuple[Integers, Floats]:
    """Return refined partitions (S, n) and their objectives (S,); ``part`` (S, n) are the partitions to start from.

    None of them gets worse. What is above its limit comes first: the excess falls as far as the moves allow, and a
    partition within its limits stays so. A pass ends when nothing gained in the last ``patience`` moves.
    """
    part = part.copy()
    going, values = np.arange(len(part)), np.zeros(len(part))
    for _ in range(passes):
        batch = _Batch(h, part[going], limits, rng)
        part[going], values[going], gained = batch.run(patience)
        going = going[gained]
        if not len(going):
            break
    return part, values


def costs_of(h: Hypergraph, part: Integers, limits: Limits) -> tuple[Floats, Floats]:
    """Return by how much node weight each of the partitions (S, n) is above the limits, and their objectives."""
    loads = np.stack([part_sizes(p, h.node_weights, limits.parts) for p in part])
    excess = np.maximum(loads - limits.most, 0.0).sum(axis=1)
    values = np.array([getattr(cuts(h, p), limits.objective) for p in part])
    return np.where(excess < _TINY, 0.0, excess), values


class _Batch:
    """The partitions of one pass: counts (S, m, K) and gains (S, K, n), both kept true from move to move.

    The gain of a node towards its own part, and of a node that has moved, is minus infinity.
    """

    def __init__(self, h: Hypergraph, part: Integers, limits: Limits, rng: np.random.Generator) -> None:
        self.h, self.limits, self.parts, self.part = h, limits, limits.parts, part
        self.cut, self.shares = limits.objective != "connectivity", limits.objective in ("ratio", "normalised")
        self.size_of = h.degrees if limits.objective == "normalised" else h.node_weights
        self.load = np.stack([part_sizes(p, h.node_weights, self.parts) for p in part])
        self.size = np.stack([part_sizes(p, self.size_of, self.parts) for p in part])
        # One room for all where all nodes weigh the same; a part may exceed it by one node, so that two change places.
        self.masses = h.node_weights[:1] if h.nodes and np.ptp(h.node_weights) == 0 else h.node_weights
        self.slack = h.node_weights.max(initial=0.0) + _TINY
        self.counts = self._counted()
        # (S, m): lambda_e in each partition. ``border`` (S, K) is the weight of the cut
        # hyperedges that touch each part.
        touched = (self.counts > 0).sum(axis=2)
        self.total = (np.minimum(touched - 1, 1) if self.cut else touched - 1) @ h.weights
        split = (touched > 1)[:, :, None] & (self.counts > 0)
        self.border = np.einsum("smk,m->sk", split, h.weights) if self.shares else np.zeros(self.load.shape)
        self.noise = rng.random(part.shape) * (1e-7 * h.weights.max(initial=0.0))  # breaks ties by chance
        self.gain = self._gains()

    def _counted(self) -> _Counts:
        h, count = self.h, len(self.part)
        inside = (
            (self.part[:, :, None] == np.arange(self.parts)).transpose(1, 0, 2).reshape(h.nodes, count * self.parts)
        )
        # (m, n) @ (n, S K): one product counts for all partitions.
        found = h.incidence @ inside.astype(np.float64)
        return np.ascontiguousarray(found.reshape(h.edges, count, self.parts).transpose(1, 0, 2)).astype(np.int32)

    def _gains(self) -> Floats:
        leave, enter = (self._summed(bound) for bound in self._bounds(self.counts, self.h.sizes[:, None]))
        own = self.part[:, None, :]
        gain = np.take_along_axis(leave, own, axis=1) - enter + self.noise[:, None, :]
        np.put_along_axis(gain, own, -np.inf, axis=1)
        return gain

    def _bounds(self, counts: _Counts, sizes: Integers) -> tuple[_Counts, _Counts]:
        """Return leave and enter for hyperedges of weight 1."""
        # Only gain = leave(e, a) - enter(e, b) counts, so that signs may be shared out: for a cut, leaving a whole
        # hyperedge costs, [c_a = |e|], and entering what is whole but for this node gains, [c_b = |e| - 1].
        if self.cut:
            return -(counts == sizes).astype(np.int32), -(counts == sizes - 1).astype(np.int32)
        return (counts == 1).astype(np.int32), (counts == 0).astype(np.int32)

    def _summed(self, bound: _Counts) -> Floats:
        """Return the weighted sums over each node's hyperedges: (S, m, K) to (S, K, n)."""
        h, count = self.h, len(self.part)
        each = (bound * h.weights[:, None]).transpose(1, 0, 2).reshape(h.edges, count * self.parts)
        return np.ascontiguousarray((h.around @ each).reshape(h.nodes, count, self.parts).transpose(1, 2, 0))

    def key(self) -> tuple[Floats, Floats]:
        """Return how much node weight is above the limits or lacking, and its objective: both shall be low."""
        excess = np.maximum(self.load - self.limits.most, 0.0).sum(axis=1)
        excess += self.slack * (self.load <= 0).sum(axis=1)  # an empty part is none
        if not self.shares:
            return excess, self.total.copy()
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where(self.border > _TINY, self.border / self.size, 0.0).sum(axis=1)
        return excess, value

    def run(self, patience: int) -> tuple[Integers, Floats, _Mask]:
        """Make one pass; return the best partitions, their objectives, and which are better than before."""
        # Invariant: (excess, best) is the lowest key so far, that after ``kept`` moves. No node moves twice, so that
        # undoing what came later gives that partition. Example: values 5, 6, 3, 4 keep two moves and undo the last.
        excess, best = self.key()
        first, lowest = excess.copy(), best.copy()
        kept, steps = np.zeros(len(best), np.int64), list[_Step]()
        while len(steps) < self.h.nodes and len(steps) - kept.max() < patience:
            step = self._choose()
            if not len(step.rows):
                break
            self._apply(step)
            steps.append(step)
            heavy, value = self.key()
            lower = (heavy < excess - _TINY) | ((heavy < excess + _TINY) & (value < best - _TINY * np.abs(best)))
            kept[lower] = len(steps)
            excess[lower], best[lower] = heavy[lower], value[lower]
        for number, step in enumerate(steps, start=1):
            undone = kept[step.rows] < number
            self.part[step.rows[undone], step.node[undone]] = step.source[undone]
        return self.part, best, (excess < first) | (best < lowest)

    def _choose(self) -> _Step:
        """Return the best move of each partition that has one."""
        # Within its limits, a partition may exceed them by a node on its way, so that two nodes can change places. Once
        # a part is over, moves have to fit, and the excess only falls.
        room = self.limits.most - self.load
        over = (room < -_TINY).any(axis=1)
        room += np.where(over, _TINY, self.slack)[:, None]
        if len(self.masses) == 1:
            node = self.gain.argmax(axis=2)
            gain = np.take_along_axis(self.gain, node[:, :, None], axis=2)[:, :, 0]
            gain[self.masses[0] > room] = -np.inf
        else:
            fitting = np.where(self.masses <= room[:, :, None], self.gain, -np.inf)
            node = fitting.argmax(axis=2)
            gain = np.take_along_axis(fitting, node[:, :, None], axis=2)[:, :, 0]
        target = gain.argmax(axis=1)
        rows = np.flatnonzero(gain[np.arange(len(gain)), target] > -np.inf)
        target = target[rows]
        node = node[rows, target]
        return _Step(rows, node, self.part[rows, node], target)

    def _apply(self, step: _Step) -> None:
        h, (rows, node, source, target) = self.h, (step.rows, step.node, step.source, step.target)
        self.total[rows] -= self.gain[rows, target, node] - self.noise[rows, node]
        for load, weight in ((self.load, h.node_weights), (self.size, self.size_of)):
            load[rows, source] -= weight[node]
            load[rows, target] += weight[node]
        self.part[rows, node] = target
        self.gain[rows, :, node] = -np.inf
        place, degree = places(h.around.indptr, node)
        edge, move = h.around.indices[place], np.repeat(np.arange(len(rows)), degree)
        # Count (s, e, p) of (S, m, K) is number (s m + e) K + p. In this step no two moves are in one partition, so
        # that no number comes twice and the changes may be made at once.
        flat, at = self.counts.reshape(-1), (rows[move] * h.edges + edge) * self.parts
        at_source, at_target = at + source[move], at + target[move]
        touched = _Touched(move, edge, flat[at_source], flat[at_target])
        flat[at_source] -= 1
        flat[at_target] += 1
        if self.shares:
            self._shift_border(step, touched)
        if self.parts == 2:
            self._spread_two(step, touched.only((touched.source <= 2) | (touched.target <= 1)))
        else:
            self._spread(step, touched)

    def _spread_two(self, step: _Step, touched: _Touched) -> None:
        """Keep the gains of two parts true; see the formulae at the top."""
        weight = self.h.weights[touched.edge]
        # The node's own part in the formulae is a or b; its gain is the one towards the other part, number
        # (2 s + 1 - own) n + u of (S, 2, n). Nodes that have moved stay at minus infinity whatever is added.
        stay = weight * ((touched.source == 2) * 1.0 + (touched.target == 0))
        there = -weight * ((touched.target == 1) * 1.0 + (touched.source == 1))
        u, of, row = self._nodes(step, touched)
        own = self.part.reshape(-1)[row * self.h.nodes + u]
        change = np.where(own == step.source[touched.move][of], stay[of], there[of])
        np.add.at(self.gain.reshape(-1), (2 * row + 1 - own) * self.h.nodes + u, change)

    def _spread(self, step: _Step, touched: _Touched) -> None:
        """Keep the gains of more than two parts true: those to source and target, and those of what lies in them."""
        sizes, nodes = self.h.sizes[touched.edge], self.h.nodes
        # Leave and enter of a hyperedge change at the source, which loses one node, and at the target,
        # which gets one. ``enter`` counts for every node of the hyperedge towards that part, ``leave`` for
        # those in it towards all parts.
        ends = []
        for count, by in ((touched.source, -1), (touched.target, 1)):
            before, after = self._bounds(count, sizes), self._bounds(count + by, sizes)
            ends.append((after[0] - before[0], after[1] - before[1]))
        some = (ends[0][0] | ends[0][1] | ends[1][0] | ends[1][1]) != 0
        touched = touched.only(some)
        weight = self.h.weights[touched.edge]
        u, of, row = self._nodes(step, touched)
        own, gain = self.part.reshape(-1)[row * nodes + u], self.gain.reshape(-1)
        for part, (leave, enter) in zip((step.source, step.target), ends, strict=True):
            end = part[touched.move][of]
            np.add.at(gain, (row * self.parts + end) * nodes + u, -(enter[some] * weight)[of])
            inside, change = own == end, (leave[some] * weight)[of]
            inside &= change != 0
            at, change = (row * self.parts * nodes + u)[inside], change[inside]
            for other in range(self.parts):
                np.add.at(gain, at + other * nodes, change)

    def _nodes(self, step: _Step, touched: _Touched) -> tuple[Integers, Integers, Integers]:
        """Return the nodes of these hyperedges one after another, the place of each one's hyperedge, and its row."""
        place, sizes = places(self.h.starts, touched.edge)
        of = np.repeat(np.arange(len(sizes)), sizes)
        return self.h.pins[place], of, step.rows[touched.move][of]

    def _shift_border(self, step: _Step, touched: _Touched) -> None:
        """Keep the weight of the hyperedges that leave each part true."""
        sizes, weight = self.h.sizes[touched.edge], self.h.weights[touched.edge]
        # A hyperedge counts at a part that it touches if it is cut. At the source it was cut if c_a < |e|,
        # and still touches if c_a > 1; at the target it touched if c_b > 0, and is cut if c_b + 1 < |e|. At
        # other parts nothing changes.
        left = (touched.source > 1) * 1.0 - (touched.source < sizes)
        come = (touched.target + 1 < sizes) * 1.0 - (touched.target > 0)
        for part, change in ((step.source, left), (step.target, come)):
            self.border[step.rows, part] += added(touched.move, change * weight, len(step.rows))
