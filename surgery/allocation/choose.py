"""One option for each site: the least cost within a budget of damage, or the least damage within a budget of cost.

A multiple-choice knapsack, solved by SciPy's HiGHS as an integer programme to a relative gap that is below what
measuring can tell: minimise sum c_ij x_ij with sum_j x_ij = 1 for each site i and sum d_ij x_ij <= budget, x in {0, 1}.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from surgery.allocation.options import Option, Options

__all__ = ["choose_damage", "choose_least_cost", "frontier"]

_GAP = 1e-3
_SECONDS = 10.0


def choose_least_cost(sites: Sequence[Options], damage: float) -> list[Option]:
    """Return the options of least cost whose damages sum to at most ``damage``; dense everywhere where that is 0."""
    return _solve(
        sites, [o.cost for s in sites for o in s.options], [o.damage for s in sites for o in s.options], damage
    )


def choose_damage(sites: Sequence[Options], cost: float) -> list[Option] | None:
    """Return the options of least damage whose costs sum to at most ``cost``; None where the cheapest cost more."""
    if sum(min(o.cost for o in site.options) for site in sites) > cost:
        return None
    return _solve(sites, [o.damage for s in sites for o in s.options], [o.cost for s in sites for o in s.options], cost)


def frontier(sites: Sequence[Options], points: int = 24) -> list[tuple[float, float]]:
    """Return (damage, cost) of the best choices from dense to the cheapest, by increasing damage.

    For each price of damage every site takes its best option by itself (Lagrange), which is exact on the convex hull.
    """
    prices = np.geomspace(1e-6, 1e6, points * 4)
    scale = sum(s.dense.cost for s in sites) / max(1e-30, sum(max(o.damage for o in s.options) for s in sites))
    found: dict[tuple[float, float], None] = {}
    for price in prices * scale:
        chosen = [min(site.options, key=lambda option: option.cost + price * option.damage) for site in sites]
        found[sum(o.damage for o in chosen), sum(o.cost for o in chosen)] = None
    return sorted(found)


def _solve(sites: Sequence[Options], goal: Sequence[float], weight: Sequence[float], limit: float) -> list[Option]:
    options = [option for site in sites for option in site.options]
    if not options:
        return []
    owner = np.repeat(np.arange(len(sites)), [len(site.options) for site in sites])
    one_each = scipy.sparse.csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    goals, weights = np.array(goal) / (max(goal) or 1.0), np.array(weight) / (limit or 1.0)
    result = milp(
        goals,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weights[None], -np.inf, 1.0 if limit else 0.0)],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if result.x is None:  # no time for any solution: dense is always one where damage is limited
        return [site.dense for site in sites]
    picked = np.flatnonzero(result.x > 0.5)
    return [options[index] for index in picked]
