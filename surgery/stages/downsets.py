"""The optimum over all cuts of a graph: dynamic programming over its down-sets, where these are few.

A down-set has with each block all that come before it. The first s stages of a cut are a down-set, so a cut is a chain
of them, from the empty one to the whole; a stage is what one has more than the one before. Networks are almost chains,
and have a few thousand:

    a -> b -> d, a -> c -> d:   {}, {a}, {a b}, {a c}, {a b c}, {a b c d}

(Piper of Tarnawski et al., 2021, plans over down-sets too.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.stages.blocks import Blocks, Shared
from surgery.stages.dynamic import Costs, optimal
from surgery.stages.problem import Problem

__all__ = ["Optimum", "down_sets", "optimum"]

_Matrix = NDArray[np.float64]


def down_sets(blocks: Blocks, *, most: int) -> _Matrix | None:
    """Return the down-sets as rows of zeros and ones, smaller ones first, or None if there are more than ``most``."""
    # Bit b of a number says whether it has block b. ``new`` holds all down-sets of one size: each is found from those
    # of one block less. Example of a -> b: 0, then 01, then 11; 10 has b without a.
    before = [sum(1 << one for one in found) for found in blocks.before]
    seen, new = {0}, [0]
    while new:
        grown = set()
        for one in new:
            for block, needed in enumerate(before):
                if not one >> block & 1 and one & needed == needed:
                    grown.add(one | 1 << block)
        seen |= grown
        new = list(grown)
        if len(seen) > most:
            return None
    sizes = sorted(seen, key=lambda one: (one.bit_count(), one))
    width = (len(blocks) + 7) // 8
    raw = np.frombuffer(b"".join(one.to_bytes(width, "little") for one in sizes), np.uint8).reshape(len(sizes), width)
    return np.unpackbits(raw, axis=1, count=len(blocks), bitorder="little").astype(float)


@dataclass(frozen=True)
class Optimum:
    """The least largest load, of as many stages as asked for and of at most as many, and a cut that reaches the first.

    ``stage_of`` has the stage of each block.
    """

    load: float
    load_of_fewer: float
    stage_of: tuple[int, ...]


def optimum(problem: Problem, blocks: Blocks, sets: _Matrix) -> Optimum | None:
    """Return the best cut; None if no cut fits in the memory."""
    costs = _costs(problem, blocks, sets)
    found = optimal(costs, problem.stages)
    if found is None:
        return None
    largest, starts, least = found
    return Optimum(largest, least, tuple(_stage(sets[starts])))


def _stage(chosen: _Matrix) -> list[int]:
    """Return the stage of each block, given the down-sets with which the stages start: how many do not have it."""
    # Example of a -> b -> c with stages that start at {} and {a b}: a is not in one of them, c
    # not in two: stages 0 and 1.
    found: list[int] = ((1 - chosen).sum(0) - 1).astype(int).tolist()
    return found


def _costs(problem: Problem, blocks: Blocks, sets: _Matrix) -> Costs:
    # All is for the pairs of a stage [D', D), of rows D' and columns D; D' is part of D if no block of it is
    # outside of D. (S, n) @ (n, S)
    inside = (sets @ (1 - sets).T) == 0
    np.fill_diagonal(inside, False)
    # (S, values): the bytes of what crosses behind D, and whether D has its producer.
    crossing = np.array([_crosses(value, sets) * value.bytes for value in blocks.values]).reshape(-1, len(sets)).T
    given = np.array([sets[:, value.blocks[0]] for value in blocks.values]).reshape(-1, len(sets)).T
    cut = crossing.sum(1)
    # What crosses behind D, without what was given in D' already.
    sent_here = cut[None, :] - given @ crossing.T
    received = cut[:, None] + 0 * sent_here if problem.relay else _touched(blocks.values, sets, skip=1)
    held = _touched(blocks.tensors, sets, skip=0)
    traffic = received + (cut[None, :] if problem.relay else sent_here)
    memory = held + received + sent_here
    if problem.balance == "time":
        seconds = sets @ np.array(blocks.seconds)
        load = seconds[None, :] - seconds[:, None] + (traffic / problem.link if problem.link else 0.0)
    else:
        load = held if problem.balance == "params" else memory
    if problem.memory is not None:
        inside &= memory <= problem.memory
    return Costs(np.where(inside, load, np.inf), traffic)


def _crosses(value: Shared, sets: _Matrix) -> _Matrix:
    # The producer is in D, and not all readers are.
    return np.asarray(sets[:, value.blocks[0]] * (1 - sets[:, list(value.blocks[1:])].min(1)))


def _touched(things: tuple[Shared, ...], sets: _Matrix, *, skip: int) -> _Matrix:
    """Return the bytes that each stage [D', D) reads: of each thing if more of its readers are in D than in D'.

    That is a sum over t of [t readers in D'] x [more than t in D]. With ``skip``, the first block gives the value, and
    has to be in D'.
    """
    # Example of two readers, one in D' and both in D: t = 0 gives 0 * 1, and t = 1 gives 1 * 1, so that it counts once.
    old, new = [], []
    for thing in things:
        readers = sets[:, list(thing.blocks[skip:])].sum(1)
        given = sets[:, thing.blocks[0]] if skip else np.ones(len(sets))
        for number in range(len(thing.blocks) - skip):
            old.append((readers == number) * given * thing.bytes)
            new.append((readers > number).astype(float))
    shape = (-1, len(sets))
    return np.asarray(np.array(old).reshape(shape).T @ np.array(new).reshape(shape))
