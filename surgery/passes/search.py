"""The searches for a goal: the cheapest choice that keeps a quality, and the least damaged one of a speed.

Choices are timed with factors of random values; what passes is fitted, and timed once more and for longer. Where that
misses the target, more is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from surgery.passes.choices import ChoicePlans
from surgery.passes.clock import Clock, Speeds
from surgery.passes.damages import Damages
from surgery.passes.evidence import TRIALS, HeldOut
from surgery.passes.fitting import Fitter
from surgery.plans.choose import Trial, choose_damage, choose_least_cost, largest_budget
from surgery.plans.options import Option
from surgery.plans.plan import Plan
from surgery.runtime.bench import Timing

__all__ = ["DRIFT", "QualitySearch", "SpeedSearch", "Yardstick", "is_dense"]

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


DRIFT = 1.02  # times the target: what a model is seen to be faster at one time, it may not be at another
_SKETCHES, _BUILDS = 3, 3  # trials for a speed-up: timed with random factors, then fitted too
_FAR, _MOST = 1.15, 8  # a speed-up that is so many times its target, or none, has more trials to come nearer
_HOPELESS = 5  # trials that are not sure of the target, after which the fastest model is tried
_LEAST_STEP = 0.01  # of the whole latency, from one trial to the next
_AIM = 1.04  # times the target at most: what the first trials are to measure; each that is not sure of it adds as much
_NEAR = 1.02  # a speed-up that is above that by less leaves nothing to gain


class SpeedSearch:
    """Searches the choice for a ``target``; ``reached`` has the speed-up and the output error of each built model.

    No timing tells a speed-up from the fastest that is below it by less than ``margin``.
    """

    def __init__(
        self,
        damages: Damages,
        plans: ChoicePlans,
        fitter: Fitter,
        speeds: Speeds,
        clock: Clock,
        *,
        held_out: HeldOut,
        margin: float,
    ) -> None:
        self._damages, self._plans, self._fitter = damages, plans, fitter
        self._speeds, self._clock, self._held_out, self._margin = speeds, clock, held_out, margin
        self._reached: dict[tuple[object, ...], tuple[float, float]] = {}

    @property
    def reached(self) -> tuple[tuple[float, float], ...]:
        """The speed-ups that were within reach, with the output error of each."""
        return tuple(sorted(self._reached.values()))

    def run(self, target: float) -> tuple[list[Trial], list[Option], Timing]:
        """Return the trials, the choice (the fastest where none is fast enough), and its timing."""
        goal, seconds = DRIFT * target, self._clock.seconds
        sketches = self._sketched(goal)
        done = [trial for trial, _ in sketches]
        least = (1 + self._margin) * sum(option.cost for option in self._fastest())
        limit = max((trial.budget for trial in done if trial.kept), default=least)
        best: tuple[Trial, list[Option], Timing] | None = None
        for _ in range(_BUILDS):
            chosen = self._choose(limit)
            if best is not None and chosen == best[1]:
                break
            timing = self._clock.time(self._fitter.build(self._plans.plan(chosen)), goal=goal, final=True)
            found = timing.comparisons[0]
            done.append(trial := Trial(limit, found.speedup, found.low >= goal))
            self._reach(chosen, found.speedup)
            if best is None or trial.kept or trial.value > best[0].value:
                best = trial, chosen, timing
            if trial.kept or limit <= least:
                break
            # Example of 10 ms: sure of 1.2 times (8.33 ms) where 1.25 (8 ms) is the goal, so that
            # 0.33 ms more are to be saved.
            limit = max(least, limit + min(seconds / goal - seconds / found.low, -_LEAST_STEP * seconds))
        assert best is not None  # there is at least one trial
        if not best[0].kept:
            for trial, chosen in sketches:
                self._reach(chosen, trial.value)
        return done, best[1], best[2]

    def _sketched(self, goal: float) -> list[tuple[Trial, list[Option]]]:
        """Return trials of costs of all sites, with factors of random values, and what was chosen for each.

        They draw near to the largest cost at which the whole model is as fast as asked for. On a noisy machine timings
        are not sure of what is only just fast enough: the next trial is to be faster by a little more than the last.
        """
        total = self._clock.seconds
        dense = sum(site.dense.cost for site in self._damages.sites)
        # What the sites may cost if the rest stays. Example: 10 ms, of which sites take 8, for a goal of 1.25 are to be
        # 8 ms, so that the sites may take 6. Invariant: at a cost of ``low`` the goal was kept (or nothing costs less),
        # and at ``high`` it was not.
        limit = dense - (total - total / goal)
        low, high = sum(option.cost for option in self._fastest()), dense
        done: list[tuple[Trial, list[Option]]] = []
        best, unsure = math.inf, 0  # the least speed-up that was fast enough, and how many trials were not
        while len(done) < (_SKETCHES if best <= _FAR * goal else _MOST):
            limit = low if best == math.inf and unsure == _HOPELESS else min(high, max(low, limit))
            self._damages.settle(partial(self._choose, limit))
            chosen = self._choose(limit)
            found = self._speeds.compare(chosen, goal)
            done.append((trial := Trial(limit, found.speedup, found.low >= goal), chosen))
            low, high = (limit, high) if trial.kept else (low, limit)
            best, unsure = (min(best, found.speedup), unsure) if trial.kept else (best, unsure + 1)
            aim = goal * min(found.speedup / found.low, _AIM ** (1 + unsure))  # which a timing can tell from the goal
            if high - low < _LEAST_STEP * total or (trial.kept and found.speedup < _NEAR * aim):
                break
            saved = dense - sum(option.cost for option in chosen)
            # Example: sites that saved 2 ms of 10 made it 1.2 times as fast, 1 - 1/1.2 = 0.167 of the time; for an aim
            # of 1.25, 0.2 of it, they are to save 2.4.
            again = dense - saved * (1 - 1 / aim) / max(1 - 1 / found.speedup, _LEAST_STEP)  # sites save together so
            again = again if trial.kept else min(again, limit - _LEAST_STEP / 2 * total)
            limit = again if low < again < high else (low + high) / 2
        return done

    def _reach(self, chosen: Sequence[Option], speedup: float) -> None:
        key = tuple((option.site, option.factorization, option.ranks) for option in chosen)
        if key not in self._reached:
            self._reached[key] = speedup, self._held_out.error(self._fitter.build(self._plans.plan(chosen)))[0]

    def _choose(self, cost: float) -> list[Option]:
        return choose_damage(self._damages.sites, cost) or self._fastest()

    def _fastest(self) -> list[Option]:
        return [min(site.options, key=lambda option: option.cost) for site in self._damages.sites]
