"""One option for each site: the least cost within a budget of damage, or the least damage within a budget of cost.

This is a multiple-choice knapsack: minimise sum c_ij x_ij with sum_j x_ij = 1 for each site i and sum d_ij x_ij <=
budget, x in {0, 1}. SciPy's HiGHS solves it as an integer programme, to a relative gap below what measuring can tell.

Example: two sites with the same three options (cost, damage): dense (4, 0), (2, 1) and (1, 3). Within a damage of 2 the
least cost is 2 + 2. A damage of 4 allows 2 + 1, and 6 allows 1 + 1.

The search for the largest budget at which a measured value keeps its limit.

Values grow with budgets, but are known by measuring alone, one by one. Each guess scales the last one by what was
measured, and stays inside the bracket of the largest budget that kept the limit and the least that did not.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from surgery.plans.options import Option, Options

__all__ = ["Trial", "choose_damage", "choose_least_cost", "frontier", "largest_budget"]

_GAP = 1e-3
_SECONDS = 10.0
_PRICES = 96  # of damage, on the frontier


def choose_least_cost(sites: Sequence[Options], damage: float) -> list[Option]:
    """Return the options of least cost whose damages sum to at most ``damage``; all dense if that is 0."""
    costs, damages = _columns(sites)
    return _solve(sites, costs, damages, damage) or [site.dense for site in sites]


def choose_damage(sites: Sequence[Options], cost: float) -> list[Option] | None:
    """Return the options of least damage whose costs sum to at most ``cost``; None if even the cheapest cost more."""
    cheapest = [min(site.options, key=lambda option: option.cost) for site in sites]
    if sum(option.cost for option in cheapest) > cost:
        return None
    costs, damages = _columns(sites)
    return _solve(sites, damages, costs, cost) or cheapest


def frontier(sites: Sequence[Options]) -> list[tuple[float, float]]:
    """Return (damage, cost) of the best choices from dense to the cheapest, by increasing damage.

    For each price of damage every site takes its best option by itself (Lagrange), which is exact on the convex hull.
    """
    # Invariant: a choice that minimises cost + price * damage is the cheapest of all choices of its damage or less.
    # Example of the options above: at a price of 1 they come to 4, 3 and 4, so that each site takes (2, 1).
    prices = np.geomspace(1e-6, 1e6, _PRICES)
    scale = sum(s.dense.cost for s in sites) / max(1e-30, sum(max(o.damage for o in s.options) for s in sites))
    found: dict[tuple[float, float], None] = {}
    for price in prices * scale:
        chosen = [min(site.options, key=lambda option: option.cost + price * option.damage) for site in sites]
        found[sum(o.damage for o in chosen), sum(o.cost for o in chosen)] = None
    return sorted(found)


def _columns(sites: Sequence[Options]) -> tuple[list[float], list[float]]:
    """Return the costs and the damages of all options, site by site."""
    options = [option for site in sites for option in site.options]
    return [option.cost for option in options], [option.damage for option in options]


def _solve(
    sites: Sequence[Options], goal: Sequence[float], weight: Sequence[float], limit: float
) -> list[Option] | None:
    """Return the choice of the least goal whose weights sum to at most the limit; None if time ran out before any."""
    options = [option for site in sites for option in site.options]
    if not options:
        return []
    owner = np.repeat(np.arange(len(sites)), [len(site.options) for site in sites])
    one_each = scipy.sparse.csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    # The solver's tolerances are absolute: goals are at most 1, and the budget is 1.
    goals = np.array(goal) / (max(goal) or 1.0)
    with np.errstate(over="ignore"):  # an option of more than the limit cannot be taken, however much it is
        weights = np.minimum(np.array(weight) / (limit or 1.0), 2.0)
    budget = LinearConstraint(weights[None], -np.inf, 1.0 if limit else 0.0)
    with _silence():
        result = milp(
            goals,
            constraints=[LinearConstraint(one_each, 1, 1), budget],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if result.x is None:
        return None
    picked = np.flatnonzero(result.x > 0.5)
    return [options[index] for index in picked]


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what C code prints: HiGHS may write a line to the output, whatever its options."""
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    # What was printed before belongs to the old output, in Python's buffer as in that of C.
    sys.stdout.flush()
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)  # while there is nowhere to print to
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


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
    # Invariant: ``low`` is the largest budget that was kept, ``high`` the least that was not;
    # guesses stay between them.
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
        # Example of a limit of 0.05: a budget of 4 that gave 0.04 is followed by 4 * 0.98 * 0.05 / 0.04 = 4.9.
        return last.budget * (_AIM * limit / last.value) ** (1 / power)
    # A value far from its limit says little: a kept one at least doubles the budget, another at least halves it.
    scale = (limit / last.value) ** (1 / power) if last.value > 0 and limit > 0 else math.inf if last.kept else 0.0
    scale = max(scale, 2.0) if last.kept else min(scale, 0.5)
    return last.budget * min(_STRETCH, max(1 / _STRETCH, scale))


def _between(low: Trial, high: Trial, limit: float) -> float:
    """Return where the line through two trials meets the limit, in logarithms, and within the middle of the bracket."""
    # Example of a limit of 0.04: budgets 1 (value 0.02) and 4 (value 0.08) have it half-way in logarithms, at 2.
    share = 0.5
    if 0 < low.value < limit < high.value:
        share = math.log(limit / low.value) / math.log(high.value / low.value)
    return low.budget * (high.budget / low.budget) ** min(0.85, max(0.15, share))
