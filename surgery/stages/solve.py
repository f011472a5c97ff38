"""Solve: down-sets where these are few, else orders, dynamic programming and moves, put together to stages.

All budgets are counts, not seconds, so that the same problem always has the same answer. Only the proof that a user
asks for takes the time that it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import replace

from surgery.errors import InputError
from surgery.stages.blocks import Blocks, blocks_of
from surgery.stages.bounds import SLACK, crossing_bound, prove, simple_bound
from surgery.stages.downsets import down_sets, optimum
from surgery.stages.dynamic import best_cut
from surgery.stages.loads import Loads
from surgery.stages.orders import orders
from surgery.stages.problem import Assignment, Problem, Repeated
from surgery.stages.reduce import reduced
from surgery.stages.refine import refine, rejoin

__all__ = ["assess", "solve"]

_SETS, _MORE_SETS = 2000, 5000  # down-sets: by default, and where a proof is asked for
_LOSS = 1e-3  # of the simple bound: what may be lost to make the down-sets fewer
_CELLS = 30_000_000  # segments of all orders, times the rounds over them
_FEWEST_ORDERS, _MOST_ORDERS = 3, 13
_REFINED, _TRIES = 3, 20_000  # cuts that are moved, and moves tried for each


def solve(problem: Problem, *, prove_seconds: float = 0.0) -> Assignment:
    """Return the stages of a network, and how far they may be from the best.

    Without ``prove_seconds``, the answer depends on the problem alone. With it, an integer program has so many seconds
    to raise the bound or to find a better cut, where neither was settled before.

    Raises:
        InputError: there are more stages than operations that can be apart, or no cut found fits in the memory.
    """
    blocks = blocks_of(problem)
    _check(problem, blocks)
    name, best, bound = _best(problem, blocks, prove_seconds)
    rejoin(best)
    return _assignment(problem, best, name, bound)


def _best(problem: Problem, blocks: Blocks, prove_seconds: float) -> tuple[str, Loads, float]:
    """Return how the best cut was found, the cut, and a bound."""
    bound = simple_bound(problem, blocks)
    exact = _exact(problem, blocks, loss=_LOSS * bound, most=_MORE_SETS if prove_seconds else _SETS)
    if exact is not None:
        return "down-sets", exact[0], max(bound, exact[1])
    name, best = _planned(problem, blocks)
    if best.score()[1] > bound:
        bound = crossing_bound(problem, blocks, low=bound, high=best.score()[1])
    if prove_seconds and best.score()[1] > bound * (1 + SLACK):
        proof = prove(problem, blocks, seconds=prove_seconds)
        bound = max(bound, proof.bound)
        if proof.stage_of is not None:
            other = Loads(problem, blocks, proof.stage_of)
            refine(other, tries=_TRIES)
            name, best = ("integer program", other) if other.score() < best.score() else (name, best)
    return name, best, bound


def _exact(problem: Problem, blocks: Blocks, *, loss: float, most: int) -> tuple[Loads, float] | None:
    """Return the best cut and a bound, or a cut that ``loss`` may part from it; None for a graph of many down-sets."""
    sets = down_sets(blocks, most=most)
    if sets is not None:
        found = optimum(problem, blocks, sets)
        return None if found is None else (Loads(problem, blocks, found.stage_of), found.load)
    smaller, lost = reduced(problem, loss=loss)
    few = blocks_of(smaller)
    sets = down_sets(few, most=most) if len(few) >= problem.stages else None
    found = None if sets is None else optimum(smaller, few, sets)
    if found is None:
        return None
    stages = {block: found.stage_of[other] for block, other in zip(blocks.block_of, few.block_of, strict=True)}
    loads = Loads(problem, blocks, [stages[block] for block in range(len(blocks))])
    refine(loads, tries=_TRIES)
    # Any cut, with its cheap operations moved, is one of the smaller problem into as many stages or fewer, and
    # dearer by ``lost`` at most.
    return loads, found.load_of_fewer - lost


def assess(problem: Problem, stage_of: Sequence[int]) -> Assignment:
    """Return what a cut that is given costs: the number of the stage of each operation, and a bound on any cut.

    Raises:
        InputError: a stage needs more than the memory.
    """
    blocks = blocks_of(problem)
    stages = dict(zip(blocks.block_of, stage_of, strict=True))
    loads = Loads(problem, blocks, [stages[block] for block in range(len(blocks))])
    found = _assignment(problem, loads, "given", simple_bound(problem, blocks))
    most = max(found.memory)
    if problem.memory is not None and most > problem.memory:
        what = f"stage {found.memory.index(most)} of this cut needs {most} bytes"
        raise InputError(what, allowed=f"{problem.memory} bytes", next_step="cut at other values, or allow more memory")
    return found


def _check(problem: Problem, blocks: Blocks) -> None:
    """Raise an error if there are fewer blocks than stages."""
    if problem.stages <= len(blocks):
        return
    most, free = len(blocks), len(blocks_of(replace(problem, ties="copy")))
    parts = f"{most} parts that can be apart" if most > 1 else "operations that all have to stay together"
    step = f"operations that read the same tensor stay together; ties='copy' (--ties copy) allows {free} stages"
    whole = "a model cannot be cut within loops, checks and writes to its inputs or buffers"
    allowed = f"1 to {most} stages" if most > 1 else "1 stage"
    next_step = step if free > most else None if most > 1 else whole
    raise InputError(f"{problem.stages} stages for {parts}", allowed=allowed, next_step=next_step)


def _planned(problem: Problem, blocks: Blocks) -> tuple[str, Loads]:
    """Return the best cut of all orders, and the name of its order."""
    found: list[tuple[tuple[int, float, int], str, Loads]] = []
    # Example of 600 blocks or more in 8 stages: 30,000,000 // (601^2 * 12) = 6 orders; 100 blocks in 4 have all 13.
    rounds = _CELLS // ((min(len(blocks), 600) + 1) ** 2 * (problem.stages + 4))
    most = min(_MOST_ORDERS, max(_FEWEST_ORDERS, rounds))
    for name, order in itertools.islice(orders(blocks), most):
        stages = best_cut(problem, blocks, order)
        if stages is not None:
            loads = Loads(problem, blocks, stages)
            found.append((loads.score(), name, loads))
    if not found:
        return "least memory", _smallest(problem, blocks)
    found.sort(key=lambda one: one[0])
    for _, _, loads in found[:_REFINED]:
        refine(loads, tries=_TRIES)
    return min(((name, loads) for _, name, loads in found[:_REFINED]), key=lambda one: one[1].score())


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
        proven=max(loads.load(stage) for stage in stages) <= bound * (1 + 2 * SLACK),
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
