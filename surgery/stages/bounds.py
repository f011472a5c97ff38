"""Bounds: the largest load below which no cut into stages can come.

Minimum cuts bound by what has to cross around each block: they know the link. A stage S takes t(S) seconds for its
operations and c(S) for what crosses its border. Around a block v, the least of c(S) + p t(S) over all sets S with v in
them is a minimum cut, m(v, p), for any price p of a second. It bounds in two ways, whatever the cut into stages is; let
B be its largest load, and k the number of stages:

    p = 1    the stage with v in it takes m(v, 1), so B is at least that
    p < 1    t(S) <= B - c(S), so the stage with v has c(S) >= c(v) = (m(v, p) - p B) / (1 - p). What is left of B is
             for operations. So v takes at least the share t(v) / (B - c(v)) of a stage, and all shares sum to k at most

For example ten operations of 1 s in a row, each with 1 s of bytes to the next, in two stages: the set of all costs
10 p, one with two borders 2 + p, so that for p = 0.2 the operations in the middle have m = 2, and for B = 6 s
c = (2 - 1.2) / 0.8 = 1. The true optimum is 6 s, and equal parts alone bound it by 5.

Simple bounds hold for every cut as well: some stage has at least an equal part of the whole, and some stage has the
largest block. An integer program can prove more. Where the graph has few down-sets, ``downsets`` finds the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from surgery.stages.blocks import Blocks
from surgery.stages.milp import program
from surgery.stages.problem import Problem

__all__ = ["SLACK", "Certificate", "crossing_bound", "prove", "simple_bound"]

SLACK = 1e-6  # the solver keeps its conditions to about this share; a bound is lowered by it
_MOST_VARIABLES = 20_000  # of an integer program
_UNITS = 1e8  # of a flow, in the largest load of one block; SciPy's flows are 32-bit integers
_MOST = 100  # blocks that minimum cuts are sought around, the longest ones
_PRICES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times that at which all blocks together cost what crosses around one
_DEAREST = 0.9
_HALVINGS = 40


def crossing_bound(problem: Problem, blocks: Blocks, *, low: float, high: float) -> float:
    """Return a bound between ``low``, which is one already, and ``high``, the largest load of a cut; in time alone."""
    if problem.balance != "time" or problem.link is None or problem.stages == 1:
        return low
    seconds, sent = np.array(blocks.seconds), np.zeros(len(blocks))
    for value in blocks.values:
        sent[list(value.blocks)] += value.bytes / problem.link
    alone = seconds + sent  # a stage with one block costs this, if it has nothing else
    around = _Around(blocks, problem.link, float(alone.max()))
    for block in np.argsort(-alone)[:_MOST].tolist():
        if alone[block] <= low:
            break
        low = max(low, *around.least([block], 1.0))
    longest = np.argsort(-seconds)[:_MOST].tolist()
    scale = float(np.median(sent[longest])) / (seconds.sum() or 1.0)
    prices = sorted({min(_DEAREST, scale * factor) for factor in _PRICES} - {0.0})
    least = np.array([around.least(longest, price) for price in prices]).reshape(len(prices), len(longest))
    return _enough_room(problem.stages, seconds, longest, np.array(prices), least, low=low, high=high)


def _enough_room(
    stages: int,
    seconds: NDArray[np.float64],
    longest: Sequence[int],
    prices: NDArray[np.float64],
    least: NDArray[np.float64],
    *,
    low: float,
    high: float,
) -> float:
    """Return the largest load, from ``low`` to ``high``, at which the shares of all blocks are more than the stages."""
    # Invariant: the shares sum to more than the stages at ``low``, once it has moved. They fall as the load grows.
    for _ in range(_HALVINGS):
        load = (low + high) / 2
        crossing = np.zeros(len(seconds))
        if len(prices):
            crossing[list(longest)] = ((least - prices[:, None] * load) / (1 - prices[:, None])).max(axis=0).clip(0.0)
        room = load - crossing
        too_many = bool((room <= 0).any()) or float((seconds / np.maximum(room, 1e-300)).sum()) > stages
        low, high = (load, high) if too_many else (low, load)
    return low


class _Around:
    """The least that crosses around blocks, with the seconds inside at a price."""

    # Blocks on the side of v are the set S. An edge to the last node takes the seconds of each block in S. A value with
    # the ends a, b, c has two nodes, in -> out, and edges of no limit a -> in and out -> a: its bytes are cut just if
    # some of its ends are in S and others are not. Capacities are rounded down, so that a flow is never too large.
    #
    #     a 2 s -> 1 s of bytes -> b 9 s, around a at the price 1: min(a alone 2 + 1, both 2 + 9) = 3

    def __init__(self, blocks: Blocks, link: float, largest: float) -> None:
        self._unit, self._last = largest / _UNITS, len(blocks) + 2 * len(blocks.values)
        self._seconds = np.array(blocks.seconds)
        count, free = len(blocks), 2 * int(_UNITS)
        edges = []
        for number, value in enumerate(blocks.values):
            inner, outer = count + 2 * number, count + 2 * number + 1
            edges.append((inner, outer, int(value.bytes / link / self._unit)))
            edges += [edge for end in value.blocks for edge in ((end, inner, free), (outer, end, free))]
        self._edges = np.array(edges, np.int32).reshape(-1, 3)

    def least(self, blocks: Sequence[int], price: float) -> list[float]:
        """Return for each block the least of c(S) + ``price`` t(S) over the sets S with the block in them."""
        count = len(self._seconds)
        ends = np.stack([np.arange(count), np.full(count, self._last), price * self._seconds // self._unit], axis=1)
        sources, targets, limits = np.concatenate([self._edges, ends.astype(np.int32)]).T
        graph = csr_array((limits, (sources, targets)), shape=(self._last + 1, self._last + 1))
        return [int(maximum_flow(graph, block, self._last).flow_value) * self._unit for block in blocks]


@dataclass(frozen=True)
class Certificate:
    """The bound, in seconds or bytes, and a cut that was found on the way to it."""

    bound: float
    stage_of: tuple[int, ...] | None = None


def prove(problem: Problem, blocks: Blocks, *, seconds: float) -> Certificate:
    """Return the bound that an integer program reaches in so many seconds; none for a graph that is too large."""
    if len(blocks) * problem.stages > _MOST_VARIABLES:
        return Certificate(0.0)
    bound, stage_of = program(problem, blocks, seconds=seconds)
    return Certificate(bound * (1 - SLACK), stage_of)


def simple_bound(problem: Problem, blocks: Blocks) -> float:
    """Return the larger of an equal part of all that is in the stages, and of the largest block."""
    if problem.balance == "time":
        parts = list(blocks.seconds)
        return max(sum(parts) / problem.stages, *parts)
    largest = [0] * len(blocks)
    for tensor in blocks.tensors:
        for block in tensor.blocks:
            largest[block] += tensor.bytes
    return max(sum(tensor.bytes for tensor in blocks.tensors) / problem.stages, *largest)
