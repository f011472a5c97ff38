"""Bounds: a largest load below which no cut can come, cheap ones and the one of an integer program.

Cheap bounds hold for every cut: some stage has at least an equal part of the whole, and some stage has the largest
block. Where the graph has few down-sets, none is needed: ``downsets`` finds the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.stages.blocks import Blocks
from surgery.stages.milp import program
from surgery.stages.problem import Problem

__all__ = ["SLACK", "Certificate", "prove", "simple_bound"]

SLACK = 1e-6  # the solver keeps its conditions to about this share; a bound is lowered by it
_MOST_VARIABLES = 20_000


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
