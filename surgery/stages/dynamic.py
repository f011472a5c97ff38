"""Dynamic programming: the best way to cut one order of the blocks into stages that lie one after another in it.

A stage is a segment [i, j) of positions. What it costs is a sum over values and tensors, each of which counts for a
rectangle of pairs (i, j). So four numbers a rectangle and two running sums give the costs of all segments at once.

    a value given at position p and last read at l leaves [i, j) if i <= p < j <= l: rows 0..p, columns p+1..l
    read at r after the read at q, it comes into [i, j) for this read if q < i <= r < j: rows q+1..r, columns r+1..n

Then best[s][j] = min over i of max(best[s-1][i], cost[i, j]); among the cuts that reach the least largest cost, a
second round takes the one that sends least.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.stages.blocks import Blocks, Shared
from surgery.stages.problem import Problem

__all__ = ["Costs", "best_cut", "optimal"]

_Matrix = NDArray[np.float64]
_Span = tuple[int, int]
_Rectangle = tuple[_Span, _Span, int]  # the first and last i, the first and last j, and what it adds

_MOST_CUTS = 600


@dataclass(frozen=True, eq=False)
class Costs:
    """The load of each stage from i, a row, to j, a column, infinite where it holds too much, and its bytes sent."""

    load: _Matrix
    bytes: _Matrix


def best_cut(problem: Problem, blocks: Blocks, order: Sequence[int]) -> tuple[int, ...] | None:
    """Return the stage of each block, or None if no cut of this order has segments that hold little enough."""
    at = np.empty(len(order), int)
    at[np.array(order, int)] = np.arange(len(order))
    values = [Shared(tuple(at[list(value.blocks)].tolist()), value.bytes) for value in blocks.values]
    values = [Shared((one.blocks[0], *sorted(one.blocks[1:])), one.bytes) for one in values]
    tensors = [Shared(tuple(sorted(at[list(one.blocks)].tolist())), one.bytes) for one in blocks.tensors]
    cuts = _cuts(len(order), values, problem.stages)
    found = optimal(_costs(problem, _Sums(cuts), values, tensors, _times(blocks, order)), problem.stages)
    if found is None:
        return None
    stages = np.searchsorted(cuts[found[1]], at, side="right") - 1
    return tuple(stages.tolist())


def _times(blocks: Blocks, order: Sequence[int]) -> _Matrix:
    return np.concatenate([[0.0], np.cumsum(np.array([blocks.seconds[block] for block in order], float))])


def _cuts(count: int, values: Sequence[Shared], stages: int) -> NDArray[np.int_]:
    """Return where the order may be cut: everywhere, or in a long one, where least crosses among neighbours."""
    most = max(_MOST_CUTS, 2 * stages)
    if count <= most:
        return np.arange(count + 1)
    change = np.zeros(count + 2)
    for value in values:
        # ``crossing[p]`` will be the bytes given before position p and read at p or later: first < p <= last.
        change[value.blocks[0] + 1] += value.bytes
        change[value.blocks[-1] + 1] -= value.bytes
    crossing = np.cumsum(change)
    bounds = np.linspace(1, count, most).astype(int)
    inner = [low + int(np.argmin(crossing[low:high])) for low, high in itertools.pairwise(bounds)]
    return np.array([0, *inner, count])


class _Sums:
    """Sums over rectangles of segments, for those segments that start and end at one of the cuts."""

    def __init__(self, cuts: NDArray[np.int_]) -> None:
        self.cuts = cuts

    def __call__(self, rectangles: Sequence[_Rectangle]) -> _Matrix:
        size = len(self.cuts)
        total = np.zeros((size + 1, size + 1))
        if rectangles:
            spans = np.array([(*rows, *columns) for rows, columns, _ in rectangles], int)
            added = np.array([amount for _, _, amount in rectangles], float)
            # A sum over rows and columns fills a rectangle from its corners: + at its start, - behind its end
            # in one direction, + behind it in both. Example of 5 in row 0, columns 1 to 2: 5 at (0, 1) and
            # (1, 3), -5 at (1, 1) and (0, 3).
            top, left = (np.searchsorted(self.cuts, spans[:, column]) for column in (0, 2))
            bottom, right = (np.searchsorted(self.cuts, spans[:, column], side="right") for column in (1, 3))
            for row, column, sign in ((top, left, 1), (bottom, left, -1), (top, right, -1), (bottom, right, 1)):
                np.add.at(total, (row, column), sign * added)
        return total.cumsum(0).cumsum(1)[:size, :size]


def _costs(
    problem: Problem,
    sums: Callable[[Sequence[_Rectangle]], _Matrix],
    values: Sequence[Shared],
    tensors: Sequence[Shared],
    times: _Matrix,
) -> Costs:
    end = len(times) - 1
    cuts = sums.cuts if isinstance(sums, _Sums) else np.arange(end + 1)
    # A value lies across position p if first < p <= last. Relayed, it comes into [i, j) if it lies across i, and goes
    # on if it lies across j; ``going`` are those that the stage gives itself.
    passing = [((first + 1, last), (0, end), size) for first, last, size in map(_ends, values)]
    going = [((0, first), (first + 1, last), size) for first, last, size in map(_ends, values)]
    relayed = [((0, end), (first + 1, last), size) for first, last, size in map(_ends, values)]
    coming = [rectangle for value in values for rectangle in _firsts(value.blocks[0], value.blocks[1:], value, end)]
    received = sums(passing if problem.relay else coming)
    given = sums(going)
    traffic = received + (sums(relayed) if problem.relay else given)
    held = sums([r for one in tensors for r in _firsts(-1, one.blocks, one, end)])
    memory = held + received + given
    if problem.balance == "time":
        seconds = times[cuts][None, :] - times[cuts][:, None]
        load = seconds + (traffic / problem.link if problem.link else 0.0)
    else:
        load = held if problem.balance == "params" else memory
    allowed = np.triu(np.ones(load.shape, bool), 1)
    if problem.memory is not None:
        allowed &= memory <= problem.memory
    return Costs(np.where(allowed, load, np.inf), traffic)


def _ends(value: Shared) -> tuple[int, int, int]:
    return value.blocks[0], value.blocks[-1], value.bytes


def _firsts(before: int, readers: Sequence[int], shared: Shared, end: int) -> list[_Rectangle]:
    """Return the segments in which each reader is the first, so that together they count each segment once."""
    # Example of readers at 2 and 5, and -1 before them: from 0..2 to 3.. the first is 2, from 3..5 to 6.. it is 5.
    ends = zip((before, *readers), readers, strict=False)
    return [((last + 1, reader), (reader + 1, end), shared.bytes) for last, reader in ends]


def optimal(costs: Costs, stages: int) -> tuple[float, NDArray[np.int_], float] | None:
    """Return the least largest load, and where the stages start that reach it with the fewest bytes.

    The last number is the least largest load of as many stages or fewer.
    """
    load, size = np.ascontiguousarray(costs.load.T), len(costs.load)
    start = np.where(np.arange(size) == 0, 0.0, np.inf)
    best, joined, least = start, np.empty_like(load), np.inf
    for _ in range(stages):
        # joined[j, i] = max(best[i], load of [i, j)). After s rounds best[j] is that of the
        # first j positions in s stages.
        best = np.maximum(best, load, out=joined).min(1)
        least = min(least, best[-1])
    largest = best[-1]
    if not np.isfinite(largest):
        return None
    # The same once more with sums for maxima, over the segments that are no dearer than the best cut's dearest.
    within = np.where(load <= largest, costs.bytes.T, np.inf)
    best, chosen = start, []
    for _ in range(stages):
        chosen.append(np.add(best, within, out=joined).argmin(1))
        best = np.take_along_axis(joined, chosen[-1][:, None], 1)[:, 0]
    starts, end = np.empty(stages, int), size - 1
    for stage in reversed(range(stages)):
        end = starts[stage] = chosen[stage][end]
    return float(largest), starts, float(least)
