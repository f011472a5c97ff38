"""Bounds: a largest load below which no cut can come, cheap ones and the one of an integer program.

Cheap bounds hold for every cut: some stage has at least an equal part of the whole, and some stage has the largest
block. That block has to be fed, or its stage holds what feeds it: the cheapest set of blocks around it, with what
crosses its border, is a minimum cut. Where the graph has few down-sets, none is needed: ``downsets`` finds the optimum.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from surgery.stages.blocks import Blocks
from surgery.stages.milp import program
from surgery.stages.problem import Problem

__all__ = ["SLACK", "Certificate", "prove", "simple_bound", "surrounded_bound"]

SLACK = 1e-6  # the solver keeps its conditions to about this share; a bound is lowered by it
_MOST_VARIABLES = 20_000
_MOST_FLOWS = 30  # blocks that a minimum cut is sought around
_UNITS = 1e8  # of a flow, in the largest single load; SciPy's flows are 32-bit integers


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


def surrounded_bound(problem: Problem, blocks: Blocks) -> float:
    """Return the most that a stage with one certain block must take, in time, with what it receives and sends."""
    if problem.balance != "time" or problem.link is None:
        return 0.0
    sent = np.zeros(len(blocks))
    for value in blocks.values:
        sent[list(value.blocks)] += value.bytes / problem.link
    alone = np.array(blocks.seconds) + sent  # a stage with this block costs this at most, if it has nothing else
    graph, unit = _flows(problem.link, blocks, float(alone.max()))
    found = 0.0
    for block in np.argsort(-alone)[:_MOST_FLOWS].tolist():
        if alone[block] <= found:
            break
        found = max(found, maximum_flow(graph, block, graph.shape[0] - 1).flow_value * unit)
    return found


def _flows(link: float, blocks: Blocks, largest: float) -> tuple[csr_array, float]:
    """Return a graph whose cuts between a block and the last node are the loads of stages, and its unit in seconds."""
    # The blocks on the block's side are the stage S. An edge to the last node takes the seconds of each block in S. A
    # value with the ends a, b, c has two nodes, in -> out, and edges of no limit end -> in and out -> end: its bytes
    # are cut just if some of its ends are in S and others are not. Capacities are rounded down, so flows bound below.
    #
    #     a 2 s -> 1 s of bytes -> b 9 s, around a: min(a alone 2 + 1, both 2 + 9) = 3
    count, values = len(blocks), blocks.values
    ends = [(count + 2 * number, end) for number, value in enumerate(values) for end in value.blocks]
    last, unit = count + 2 * len(values), largest / _UNITS
    edges = [(block, last, int(time / unit)) for block, time in enumerate(blocks.seconds)]
    edges += [(count + 2 * at, count + 2 * at + 1, int(v.bytes / link / unit)) for at, v in enumerate(values)]
    free = int(_UNITS) * 2
    edges += list(itertools.chain.from_iterable(((end, at, free), (at + 1, end, free)) for at, end in ends))
    sources, targets, sizes = np.array(edges, np.int32).T
    return csr_array((sizes, (sources, targets)), shape=(last + 1, last + 1)), unit
