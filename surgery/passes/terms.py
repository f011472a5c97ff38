"""What ``auto`` is asked for, and how the options of sites are made and priced."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.cost.base import Backend
from surgery.passes.goals import Evaluate, Goal
from surgery.plans.plan import Plan
from surgery.plans.prices import Counted, Measured, Prices, Ruled

__all__ = ["Asked", "Terms"]

_SECONDS = 3.0


@dataclass(frozen=True)
class Asked:
    """What the user wants: the goal with its metric, what is to be low, and how factors are found."""

    goal: Goal
    evaluate: Evaluate | None = None
    cost: str = "latency"
    solver: str = "auto"
    stages: int | None = None
    inplace: bool = False
    best_effort: bool = False


@dataclass(frozen=True)
class Terms:
    """What is asked for, and how options are made and priced.

    ``ruled`` is a plan whose sites, methods and latencies are taken over: nothing but whole models is timed then.
    """

    asked: Asked
    latencies: Backend
    factorization: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    multiple: int | None = None
    seconds: float = _SECONDS
    ruled: Plan | None = None

    @property
    def goal(self) -> Goal:
        """The goal."""
        return self.asked.goal

    @property
    def prices(self) -> Prices:
        """What options cost."""
        if self.asked.cost != "latency":
            return Counted(self.asked.cost)
        return Measured(self.latencies) if self.ruled is None else Ruled(self.ruled)
