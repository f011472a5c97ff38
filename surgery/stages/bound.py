"""A certificate: a largest load below which no cut can come, and the cut that reaches it where one was found.

Cheap bounds hold for every cut: some stage has at least an equal part of the whole, and some stage has the largest
block. Where the graph has few down-sets, dynamic programming over them gives the optimum. Where it has many, a mixed
integer program does, or, where its time is over, the bound that it has reached.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from surgery.stages.blocks import Blocks
from surgery.stages.downsets import down_sets, optimum
from surgery.stages.loads import Loads
from surgery.stages.milp import program
from surgery.stages.problem import Problem

__all__ = ["Certificate", "certificate", "simple_bound"]

_FEW, _MORE = 900, 4000  # down-sets within a second, and with more time
_MANY_SECONDS = 2.0
_MOST_VARIABLES = 20_000


@dataclass(frozen=True)
class Certificate:
    """The bound, in seconds or bytes, and a cut that was found on the way to it, with the name of its method."""

    bound: float
    name: str = "equal parts"
    stage_of: tuple[int, ...] | None = None


def certificate(problem: Problem, blocks: Blocks, known: Loads, *, end: float) -> Certificate:
    """Return the best bound that there is time for; ``known`` is a cut that need not be found again."""
    simple = Certificate(simple_bound(problem, blocks))
    if problem.stages == 1 or known.score()[1] <= simple.bound * (1 + 1e-9):
        return simple
    left = end - time.monotonic()
    sets = down_sets(blocks, most=_FEW if left < _MANY_SECONDS else _MORE, end=end)
    if sets is not None:
        found = optimum(problem, blocks, sets)
        return simple if found is None else Certificate(max(simple.bound, found[0]), "down-sets", found[1])
    left = end - time.monotonic()
    if left < _MANY_SECONDS or len(blocks) * problem.stages > _MOST_VARIABLES:
        return simple
    bound, stage_of = program(problem, blocks, seconds=left)
    return Certificate(max(simple.bound, bound), "integer program", stage_of)


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
