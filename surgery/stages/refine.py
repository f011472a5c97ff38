"""Moves of Fiduccia and Mattheyses (1982) that keep the stages in order: on the largest load, then on the bytes sent.

A block may go to any stage from the latest of those before it to the earliest of those after it, so no value ever goes
backwards. A pass moves blocks out of or into the most loaded stage, each at most once, the best move first even if it
makes things worse, and goes back to the best state that it saw. Passes end when one brings nothing, or when so many
moves were tried that the work would no longer be little; their number, not a clock, decides, so that the same network
is always cut in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

from surgery.stages.loads import Loads

__all__ = ["refine", "rejoin"]

_PATIENCE = 12  # moves in a row that bring nothing
_NOTHING = 1e-6  # of the longest time: what a block takes that a runtime computes in the kernel of another


def refine(loads: Loads, *, tries: int) -> None:
    """Move blocks as long as that helps, and until about ``tries`` moves were tried; never makes a cut worse."""
    while tries > 0:
        better, tried = _pass(loads, tries)
        tries = tries - tried if better else 0


def rejoin(loads: Loads) -> None:
    """Move each block that takes next to no time to the stage of the one block that it reads, if nothing gets dearer.

    A runtime computes such a block in the kernel before it, so that a cut between the two would make it a kernel more.
    """
    # conv | norm relu -> conv2, where norm and relu cost nothing, becomes conv norm relu | conv2
    excess, largest, sent = loads.score()
    least = _NOTHING * max(loads.blocks.seconds)
    for block, before in enumerate(loads.blocks.before):
        old = loads.stage_of[block]
        if len(before) != 1 or loads.stage_of[before[0]] == old or loads.count[old] == 1:
            continue
        if loads.blocks.seconds[block] <= least:
            loads.move(block, loads.stage_of[before[0]])
            now = loads.score()
            if now[0] > excess or now[1] > largest * (1 + _NOTHING) or now[2] > sent:
                loads.move(block, old)


def _pass(loads: Loads, tries: int) -> tuple[bool, int]:
    """Return whether a pass made the cut better, and how many moves it tried."""
    first, best, spent = loads.score(), loads.score(), 0
    done: list[tuple[int, int]] = []
    kept, moved = 0, set[int]()
    while len(done) - kept < _PATIENCE and spent < tries:
        tried = [(_tried(loads, block, stage), block, stage) for block, stage in _moves(loads, moved)]
        if not tried:
            break
        spent += len(tried)
        score, block, stage = min(tried)
        done.append((block, loads.stage_of[block]))
        loads.move(block, stage)
        moved.add(block)
        if score < best:
            best, kept = score, len(done)
    # ``done`` has where each block was: moved back from the last on, all is as after the first ``kept`` moves.
    for block, stage in reversed(done[kept:]):
        loads.move(block, stage)
    return _better(best, first), spent


def _better(new: tuple[int, float, int], old: tuple[int, float, int]) -> bool:
    """Return whether a score is less by more than what floats lose when blocks go there and back."""
    return new[0] < old[0] or (new[0] == old[0] and (new[1] < old[1] * (1 - 1e-12) or new[2] < old[2]))


def _tried(loads: Loads, block: int, stage: int) -> tuple[int, float, int]:
    old = loads.stage_of[block]
    loads.move(block, stage)
    score = loads.score()
    loads.move(block, old)
    return score


def _moves(loads: Loads, moved: set[int]) -> Iterator[tuple[int, int]]:
    """Yield the moves out of and into the stage of the largest load, or out of those that hold too much."""
    stages = range(loads.problem.stages)
    most = loads.problem.memory
    worst = {max(stages, key=loads.load)} | {s for s in stages if most is not None and loads.memory(s) > most}
    blocks, stage_of, last = loads.blocks, loads.stage_of, loads.problem.stages - 1
    for block, old in enumerate(stage_of):
        # The last block of a stage stays, so that none gets empty.
        if block in moved or loads.count[old] == 1:
            continue
        low = max((stage_of[one] for one in blocks.before[block]), default=0)
        high = min((stage_of[one] for one in blocks.after[block]), default=last)
        for stage in range(max(low, old - 2), min(high, old + 2) + 1):
            if stage != old and (old in worst or stage in worst):
                yield block, stage
