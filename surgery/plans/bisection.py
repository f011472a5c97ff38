"""The search for the largest budget at which a measured value keeps its limit.

Values grow with budgets, but are known by measuring alone, one by one. Each guess scales the last one by what was
measured, and stays inside the bracket of the largest budget that kept the limit and the least that did not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Trial", "largest_budget"]

_NEAR = 0.95  # a value of at least this share of its limit leaves nothing to gain
_AIM = 0.98  # of the limit, where the last value was not far from it
_CLOSE = 1.1  # a bracket as narrow as this, likewise
_STRETCH = 16.0  # from one guess to the next at most


@dataclass(frozen=True)
class Trial:
    """One budget, and the value that was measured for it."""

    budget: float
    value: float
    kept: bool


def largest_budget(
    measure: Callable[[float], float], *, limit: float, start: float, most: float, power: float = 1.0, trials: int = 8
) -> list[Trial]:
    """Return the trials of the search, in order; the best is the one with the largest budget that was kept.

    ``value ~ budget ** power`` is how the first guesses scale. No budget above ``most`` is tried: it changes nothing.
    """
    done: list[Trial] = []
    budget = min(start, most)
    for _ in range(trials):
        value = measure(budget)
        done.append(Trial(budget, value, value <= limit))
        low = max((trial for trial in done if trial.kept), key=lambda trial: trial.budget, default=None)
        high = min((trial for trial in done if not trial.kept), key=lambda trial: trial.budget, default=None)
        if low is not None and (low.value >= _NEAR * limit or low.budget >= most):
            break
        if low is not None and high is not None and high.budget <= low.budget * _CLOSE:
            break
        if low is None or high is None:
            budget = min(most, _scaled(done[-1], limit, power))
        else:
            budget = _between(low, high, limit)
    return done


def _scaled(last: Trial, limit: float, power: float) -> float:
    """Return the budget at which the value would be just below its limit; further on where there is no telling."""
    if last.kept and limit / 2 <= last.value and limit > 0:
        return last.budget * (_AIM * limit / last.value) ** (1 / power)
    scale = (limit / last.value) ** (1 / power) if last.value > 0 and limit > 0 else math.inf if last.kept else 0.0
    scale = max(scale, 2.0) if last.kept else min(scale, 0.5)
    return last.budget * min(_STRETCH, max(1 / _STRETCH, scale))


def _between(low: Trial, high: Trial, limit: float) -> float:
    """Return where the line through two trials meets the limit, in logarithms, and within the middle of the bracket."""
    share = 0.5
    if 0 < low.value < limit < high.value:
        share = math.log(limit / low.value) / math.log(high.value / low.value)
    return low.budget * (high.budget / low.budget) ** min(0.85, max(0.15, share))
