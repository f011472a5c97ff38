"""``keep_params`` and ``keep_macs``: one threshold on all singular values, so that the whole model meets a budget.

The rank of a mode is the number of its pooled singular values with ``sigma / ||W|| >= t``, at least 1. With that, each
site takes the cheapest of its candidates, or stays dense where none is cheaper, so the model's cost falls as t grows;
bisection over all distinct values of ``sigma / ||W||`` finds the least t that meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.errors import RankError, Refusal
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate, Choice
from surgery.plans.quality import RankRule, SiteRule
from surgery.sites.site import Totals

__all__ = ["Keep", "Threshold"]

_NAMES = {"parameters": "keep_params", "macs": "keep_macs"}


@dataclass(frozen=True)
class Threshold(SiteRule):
    """A settled budget: ranks by one level for all sites; the cheapest candidate by ``cost``, if cheaper than dense."""

    level: float
    cost: str

    def __str__(self) -> str:
        return f"sigma>={self.level:g}"

    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Return the cheapest candidate at this level, or refuse if dense costs no more."""
        choices = [Choice(candidate, self.ranks(candidate)) for candidate in candidates]
        best = min(choices, key=lambda choice: (getattr(choice.cost, self.cost), choice.order))
        return best if best.saves(self.cost) else best.refuse(self.cost)

    def ranks(self, candidate: Candidate) -> Ranks:
        """Return the number of singular values at or above the level in each mode, at least 1."""
        counts = [int(np.searchsorted(-levels, -self.level, side="right")) for levels in candidate.levels]
        return candidate.widened(candidate.settled(tuple(max(1, count) for count in counts)), self.cost)


@dataclass(frozen=True)
class Keep(RankRule):
    """Keep at most this fraction of the whole model's "parameters" or "macs", and as near to it as possible."""

    cost: str
    fraction: float

    def __str__(self) -> str:
        return f"{_NAMES[self.cost]}={self.fraction:g}"

    def settle(self, sites: Sequence[Sequence[Candidate]], totals: Totals) -> Threshold:
        """Return the least threshold at which the model, with these candidates for each site, meets the budget.

        Raises:
            RankError: the budget is out of reach even at rank 1; the message has the smallest fraction in reach.
        """
        before = getattr(totals, self.cost)
        rest = before - sum(getattr(candidates[0].dense_cost, self.cost) for candidates in sites)
        values = [levels for candidates in sites for candidate in candidates for levels in candidate.levels]
        levels = [*np.unique(np.concatenate(values)).tolist(), math.inf] if values else [math.inf]

        def after(level: float) -> int:
            return rest + sum(self._cheapest(candidates, level) for candidates in sites)

        low, high = 0, len(levels) - 1
        if (least := after(math.inf)) > self.fraction * before:
            raise self._out_of_reach(least / before)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if after(levels[middle]) <= self.fraction * before else (middle + 1, high)
        return Threshold(levels[high], self.cost)

    def _cheapest(self, candidates: Sequence[Candidate], level: float) -> int:
        choice = Threshold(level, self.cost).choose(candidates)
        return getattr(candidates[0].dense_cost if isinstance(choice, Refusal) else choice.cost, self.cost)

    def _out_of_reach(self, fraction: float) -> RankError:
        name = _NAMES[self.cost]
        least = math.ceil(fraction * 1e4) / 1e4
        return RankError(
            f"{self} cannot be met: with every site that may change at rank 1 the model keeps {least:g}",
            allowed=f"{name} from {least:g} to 1",
            next_step=f"say {name}={least:g} or more, or include more sites",
        )
