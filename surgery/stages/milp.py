"""The cut as a mixed integer program, for HiGHS: its optimum, or how far the solver's bound got in its time.

The variables are z[b, s], 1 if block b is in the first s + 1 stages; so it is in stage s by y[b, s] = z[b, s] minus
z[b, s - 1].
A value comes into stage s by at least y[reader, s] - y[producer, s], and leaves it by y[producer, s] - y[reader, s];
relayed, it crosses the boundary after s by z[producer, s] - z[reader, s]. A tensor is in s by at least y[b, s].
The load of each stage is at most the last variable, which is minimised.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from surgery.stages.blocks import Blocks
from surgery.stages.problem import Problem

__all__ = ["program"]

_Row = dict[int, float]
_Amounts = list[tuple[int, float]]


class _Program:
    """Rows of a program, each a sum of variables that is at most 0, or at most a number."""

    def __init__(self, problem: Problem, blocks: Blocks) -> None:
        self.problem, self.blocks = problem, blocks
        self.whole = len(blocks) * (problem.stages - 1)  # the variables that are 0 or 1 come first
        self.count = self.whole
        self.rows: list[tuple[_Row, float]] = []

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def within(self, block: int, stage: int) -> tuple[_Row, float]:
        """Return z[block, stage] as variables and a constant."""
        last = self.problem.stages - 1
        if stage < 0 or stage >= last:
            return {}, float(stage >= last)
        return {block * last + stage: 1.0}, 0.0

    def at(self, block: int, stage: int) -> tuple[_Row, float]:
        """Return y[block, stage]."""
        return _minus(self.within(block, stage), self.within(block, stage - 1))

    def at_most(self, row: tuple[_Row, float], other: tuple[_Row, float]) -> None:
        variables, constant = _minus(row, other)
        if variables:
            self.rows.append((variables, -constant))

    def above(self, *rows: tuple[_Row, float]) -> int:
        """Return a new variable that is at least each row, and at least 0."""
        # Where less is better, the least such number is the largest of the rows: a maximum in linear terms.
        variable = self.new()
        for row in rows:
            self.at_most(row, ({variable: 1.0}, 0.0))
        return variable


def _minus(one: tuple[_Row, float], other: tuple[_Row, float]) -> tuple[_Row, float]:
    row = dict(one[0])
    for variable, factor in other[0].items():
        row[variable] = row.get(variable, 0.0) - factor
    return row, one[1] - other[1]


def program(problem: Problem, blocks: Blocks, *, seconds: float) -> tuple[float, tuple[int, ...] | None]:
    """Return a bound on the largest load, and the cut that the solver found, if any."""
    made = _Program(problem, blocks)
    stages, limit = range(problem.stages), made.new()
    for block in range(len(blocks)):
        for stage in stages:
            # What is in the first s stages is in the first s + 1; and what reads a block is there only if the block is.
            made.at_most(made.within(block, stage - 1), made.within(block, stage))
            for after in blocks.after[block]:
                made.at_most(made.within(after, stage), made.within(block, stage))
    scale = _scale(problem, blocks)
    received, sent, relayed = _flows(made)
    tensors = [
        [(made.above(*(made.at(b, s) for b in one.blocks)), float(one.bytes)) for one in blocks.tensors] for s in stages
    ]
    for stage in stages:
        memory = tensors[stage] + received[stage] + sent[stage]
        load = tensors[stage] if problem.balance == "params" else memory
        row, constant = _nothing()
        if problem.balance == "time":
            row, constant = _times(made, stage)
            link = problem.link
            load = [(v, b / link) for v, b in received[stage] + relayed[stage]] if link else []
        for variable, amount in load:
            row[variable] = row.get(variable, 0.0) + amount
        made.at_most(({v: a / scale for v, a in row.items()}, constant / scale), ({limit: 1.0}, 0.0))
        if problem.memory is not None:
            held: _Row = {}
            for variable, size in memory:
                held[variable] = held.get(variable, 0.0) + size / problem.memory
            made.at_most((held, 0.0), ({}, 1.0))
        # No stage is empty.
        made.at_most(({}, 1.0), _sum([made.at(block, stage) for block in range(len(blocks))]))
    return _solved(made, limit, scale, seconds)


def _nothing() -> tuple[_Row, float]:
    return {}, 0.0


def _sum(rows: list[tuple[_Row, float]]) -> tuple[_Row, float]:
    total, constant = _nothing()
    for row, more in rows:
        constant += more
        for variable, factor in row.items():
            total[variable] = total.get(variable, 0.0) + factor
    return total, constant


def _scale(problem: Problem, blocks: Blocks) -> float:
    if problem.balance == "time":
        return sum(blocks.seconds) or 1.0
    return float(sum(one.bytes for one in (*blocks.tensors, *blocks.values))) or 1.0


def _times(made: _Program, stage: int) -> tuple[_Row, float]:
    row, constant = dict[int, float](), 0.0
    for block, seconds in enumerate(made.blocks.seconds):
        part, more = made.at(block, stage)
        row |= {variable: factor * seconds for variable, factor in part.items()}
        constant += more * seconds
    return row, constant


def _flows(made: _Program) -> tuple[list[_Amounts], list[_Amounts], list[_Amounts]]:
    """Return for each stage the variables and bytes of what it takes, what it gives of its own, and all it sends."""
    stages = range(made.problem.stages)
    received: list[_Amounts] = [[] for _ in stages]
    sent: list[_Amounts] = [[] for _ in stages]
    relayed: list[_Amounts] = [[] for _ in stages]
    for value in made.blocks.values:
        first, *later = value.blocks
        for stage in stages:
            here = made.at(first, stage)
            out = made.above(*(_minus(here, made.at(reader, stage)) for reader in later))
            sent[stage].append((out, value.bytes))
            if not made.problem.relay:
                come = made.above(*(_minus(made.at(reader, stage), here) for reader in later))
                received[stage].append((come, value.bytes))
                relayed[stage].append((out, value.bytes))
            elif stage < made.problem.stages - 1:
                over = made.above(*(_minus(made.within(first, stage), made.within(r, stage)) for r in later))
                relayed[stage].append((over, value.bytes))
                received[stage + 1].append((over, value.bytes))
    return received, sent, relayed


def _solved(made: _Program, limit: int, scale: float, seconds: float) -> tuple[float, tuple[int, ...] | None]:
    entries = [(number, v, a) for number, (row, _) in enumerate(made.rows) for v, a in row.items()]
    rows, columns, factors = zip(*entries, strict=True)
    matrix = csr_array((factors, (rows, columns)), shape=(len(made.rows), made.count))
    aim: NDArray[np.float64] = np.zeros(made.count)
    aim[limit] = 1
    whole = (np.arange(made.count) < made.whole).astype(int)
    upper = np.where(whole, 1.0, np.inf)
    found = milp(
        aim,
        integrality=whole,
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(matrix, -np.inf, np.array([most for _, most in made.rows])),
        options={"time_limit": seconds, "mip_rel_gap": 1e-7},
    )
    bound = 0.0 if found.mip_dual_bound is None else float(found.mip_dual_bound) * scale
    if found.x is None:
        return bound, None
    # z of a block in stage t is 0 before t and 1 from there. Example of three stages: 1 1 is stage 2 - 2 =
    # 0, 0 1 is 1, and 0 0 is 2.
    held = np.round(found.x[: made.whole]).reshape(len(made.blocks), -1)
    return bound, tuple((made.problem.stages - 1 - held.sum(1)).astype(int).tolist())
