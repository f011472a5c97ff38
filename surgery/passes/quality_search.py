"""The search for a promise of quality: the cheapest choice whose error, or drop of a metric, keeps its limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.passes.choices import ChoicePlans
from surgery.passes.confidence import TRIALS
from surgery.passes.damages import Damages
from surgery.passes.fitter import Fitter
from surgery.plans.bisection import Trial, largest_budget
from surgery.plans.choose import choose_least_cost
from surgery.plans.options import Option
from surgery.plans.plan import Plan

__all__ = ["QualitySearch", "Yardstick", "is_dense"]

_GROUPED = 2  # trials for a limit that are fitted in groups, of all


@dataclass(frozen=True)
class Yardstick:
    """What is measured of a whole model, and its limit.

    The value grows with the ``power`` of the budget of damage, of which ``start`` is the first to try.
    """

    value: Callable[[Any], float]
    limit: float
    power: float
    start: float


class QualitySearch:
    """Searches the largest budget of damage that keeps the limit, and the cheapest choice within it."""

    def __init__(self, damages: Damages, plans: ChoicePlans, fitter: Fitter, yardstick: Yardstick) -> None:
        self._damages, self._plans, self._fitter, self._yardstick = damages, plans, fitter, yardstick

    def run(self) -> tuple[list[Trial], list[Option]]:
        """Return the trials, and the choice."""
        start = self._yardstick.start
        self._damages.settle(lambda: self._cheapest(start))
        if not self._fitter.in_groups(len(self._damages.sites)):
            done = self._search(self._fitter.build, start, TRIALS)
        else:  # fits in groups take long, and lower the value: they are tried from where direct fits get
            direct = self._search(self._fitter.build_direct, start, TRIALS - _GROUPED)
            near = max((trial.budget for trial in direct if trial.kept), default=min(trial.budget for trial in direct))
            done = self._search(self._fitter.build, near, _GROUPED)
        kept = [trial.budget for trial in done if trial.kept]
        return done, self._cheapest(max(kept, default=0.0))

    def _search(self, build: Callable[[Plan], Any], start: float, trials: int) -> list[Trial]:
        yardstick = self._yardstick
        most = sum(max(option.damage for option in site.options) for site in self._damages.sites)

        def measure(budget: float) -> float:
            return yardstick.value(build(self._plans.plan(self._cheapest(budget))))

        return largest_budget(
            measure, limit=yardstick.limit, start=start, most=most, power=yardstick.power, trials=trials
        )

    def _cheapest(self, damage: float) -> list[Option]:
        return list(choose_least_cost(self._damages.sites, damage))


def is_dense(chosen: Sequence[Option]) -> bool:
    """Whether a choice changes nothing."""
    return all(option.factorization is None for option in chosen)
