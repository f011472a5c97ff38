"""Solve: orders, dynamic programming, moves and a bound, put together to the stages of a network."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import replace

from surgery.errors import InputError
from surgery.stages.blocks import Blocks, blocks_of
from surgery.stages.bound import certificate
from surgery.stages.dynamic import best_cut
from surgery.stages.loads import Loads
from surgery.stages.orders import orders
from surgery.stages.problem import Assignment, Problem, Repeated
from surgery.stages.refine import refine

__all__ = ["solve"]


def solve(problem: Problem, *, seconds: float = 0.5) -> Assignment:
    """Return the stages of a network, and how far they may be from the best.

    ``seconds`` is about the time that may be spent; one order is cut in any case. Half of it goes to the proof.

    Raises:
        InputError: there are more stages than operations that can be apart, or no cut found fits in the memory.
    """
    start = time.monotonic()
    blocks = blocks_of(problem)
    if problem.stages > len(blocks):
        what = f"{problem.stages} stages for {len(blocks)} operations that can be apart"
        raise InputError(what, allowed=f"at most {len(blocks)} stages")
    name, best = _planned(problem, blocks, start + seconds / 2)
    end = start + seconds
    proof = certificate(problem, blocks, best, end=end)
    if proof.stage_of is not None:
        other = Loads(problem, blocks, proof.stage_of)
        refine(other, end=end)
        if other.score() < best.score():
            name, best = proof.name, other
    return _assignment(problem, best, name, proof.bound)


def _planned(problem: Problem, blocks: Blocks, end: float) -> tuple[str, Loads]:
    """Return the best cut of all orders for which there is time, and the name of its order."""
    found: list[tuple[tuple[int, float, int], str, Loads]] = []
    for name, order in orders(blocks):
        for relay in {problem.relay, True}:
            stages = best_cut(problem, blocks, order, relay=relay)
            if stages is not None:
                loads = Loads(problem, blocks, stages)
                found.append((loads.score(), name, loads))
        if found and time.monotonic() > end:
            break
    if not found:
        return "least memory", _smallest(problem, blocks)
    found.sort(key=lambda one: one[0])
    for _, _, loads in found[:3]:
        refine(loads, end=end)
    return min(((name, loads) for _, name, loads in found[:3]), key=lambda one: one[1].score())


def _smallest(problem: Problem, blocks: Blocks) -> Loads:
    """Return the cut that needs the least memory, for problems of which no order has a cut that fits."""
    least = solve(replace(problem, balance="memory", memory=None))
    if problem.memory is not None and least.bottleneck > problem.memory:
        what = f"no cut into {problem.stages} stages was found whose largest needs at most {problem.memory} bytes"
        raise InputError(what, allowed=f"memory of {int(least.bottleneck)} bytes or more")
    stages = dict(zip(blocks.block_of, least.stage_of, strict=True))
    return Loads(problem, blocks, [stages[block] for block in range(len(blocks))])


def _assignment(problem: Problem, loads: Loads, order: str, bound: float) -> Assignment:
    stages = range(problem.stages)
    stage_of = tuple(loads.stage_of[block] for block in loads.blocks.block_of)
    return Assignment(
        stage_of=stage_of,
        seconds=tuple(loads.seconds),
        received=tuple(loads.received),
        sent=tuple(loads.sent),
        tensors=tuple(loads.tensors),
        memory=tuple(loads.memory(stage) for stage in stages),
        loads=tuple(loads.load(stage) for stage in stages),
        bound=bound,
        proven=max(loads.load(stage) for stage in stages) <= bound * (1 + 1e-9),
        order=order,
        repeated=_repeated(problem, stage_of),
    )


def _repeated(problem: Problem, stage_of: tuple[int, ...]) -> tuple[Repeated, ...]:
    network = problem.network
    names, stages = dict[Hashable, dict[str, None]](), dict[Hashable, set[int]]()
    for operation, stage in zip(network.operations, stage_of, strict=True):
        for name in operation.tensors:
            key = network.keys.get(name, name)
            names.setdefault(key, {})[name] = None
            stages.setdefault(key, set()).add(stage)
    return tuple(
        Repeated(tuple(names[key]), max(network.bytes_of.get(name, 0) for name in names[key]), tuple(sorted(found)))
        for key, found in stages.items()
        if len(found) > 1
    )
