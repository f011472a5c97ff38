"""What the options of a site cost: measured seconds, multiply-accumulates, or parameters.

Measured: of the ranks asked for only some are timed, the cheapest, the dearest and a few between; for those in between
seconds are interpolated over the multiply-accumulates, and so they never leave the span of what was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np

from surgery.errors import InputError
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate
from surgery.plans.faster import Latencies
from surgery.plans.plan import Plan

__all__ = ["COSTS", "Cost", "Counted", "Measured", "Prices", "Ruled"]

Cost: TypeAlias = Literal["latency", "macs", "params"]
COSTS: tuple[str, ...] = get_args(Cost)


class Prices(Protocol):
    """Whatever says what a candidate costs at some ranks."""

    @property
    def what(self) -> str:
        """What costs are: one of ``COSTS``."""

    @property
    def measured(self) -> bool:
        """Whether costs are seconds that were measured."""

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        """Return the cost of the dense operator, and of each choice of ranks; InputError if it cannot be measured."""


@dataclass(frozen=True)
class Measured:
    """Seconds of what measures latencies, for all calls of one run; ``knots`` ranks are timed for each method."""

    latencies: Latencies
    knots: int = 4
    what: str = "latency"
    measured: bool = True

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        """Return the seconds of dense and of each choice."""
        macs = [candidate.cost(ranks).macs for ranks in choices]
        order = sorted(range(len(choices)), key=macs.__getitem__)
        picked = sorted({order[round(at)] for at in np.linspace(0, len(order) - 1, min(self.knots, len(order)))})
        dense, seconds = [], {}
        for index in picked:
            before, after = self._time(candidate, choices[index])
            dense.append(before)
            seconds[macs[index]] = after
        known = sorted(seconds)
        costs = np.interp(macs, known, [seconds[at] for at in known])
        return float(np.median(dense)), [float(cost) for cost in costs]

    def _time(self, candidate: Candidate, ranks: Ranks) -> tuple[float, float]:
        rows = [(n, self.latencies.compare(op, chain, shape)) for op, chain, shape, n in candidate.pairs(ranks)]
        return sum(n * row.dense_s for n, row in rows), sum(n * row.chain_s for n, row in rows)


@dataclass(frozen=True)
class Ruled:
    """Seconds in proportion to those that a plan has measured at its own ranks, for its own methods alone."""

    plan: Plan
    what: str = "latency"
    measured: bool = True

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        """Return the seconds of dense and of each choice; fewer multiply-accumulates than the plan's save nothing."""
        row = self.plan[candidate.site.name]
        if row.dense_latency is None or row.latency is None or not row.macs:
            raise InputError("the plan has no latency for it")
        shares = [max(1.0, candidate.cost(ranks).macs / row.macs) for ranks in choices]
        return row.dense_latency, [row.latency * share for share in shares]


@dataclass(frozen=True)
class Counted:
    """ "macs" or "params": costs that need no measuring."""

    what: str
    measured: bool = False

    def __post_init__(self) -> None:
        if self.what not in COSTS[1:]:
            raise InputError(f"cost={self.what!r}", allowed=", ".join(COSTS))

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        """Return the count of dense and of each choice."""
        name = "macs" if self.what == "macs" else "parameters"
        costs = [float(getattr(candidate.cost(ranks), name)) for ranks in choices]
        return float(getattr(candidate.dense_cost, name)), costs
