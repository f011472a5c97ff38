"""The rank rules: of one site at a time, and of one threshold for the whole model.

The rank of a mode is the number of its pooled singular values with ``sigma / ||W|| >= t``, at least 1. With that, each
site takes the cheapest of its candidates, or stays dense where none is cheaper, so the model's cost falls as t grows;
bisection over all distinct values of ``sigma / ||W||`` finds the least t that meets the budget.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.errors import RankError, Refusal
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate, Choice, say_ranks
from surgery.plans.vbmf import evbmf_rank
from surgery.sites import Totals

__all__ = [
    "Energy",
    "Fixed",
    "Full",
    "Keep",
    "QualityRule",
    "RankRule",
    "SiteRule",
    "Threshold",
    "Vbmf",
    "energy_counts",
    "vbmf_counts",
]


class RankRule(ABC):
    """How ranks are chosen; ``str(rule)`` is the spec that says it."""

    @abstractmethod
    def settle(self, sites: Sequence[Sequence[Candidate]], totals: Totals) -> SiteRule:
        """Return the rule for single sites, given the candidates of all sites and the costs of the whole model."""


class SiteRule(RankRule):
    """A rule that decides for each site by itself."""

    def settle(self, sites: Sequence[Sequence[Candidate]], totals: Totals) -> SiteRule:
        """Return itself."""
        return self

    @abstractmethod
    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Choose among the candidates of one site (at least one, the preferred first), or say why it stays dense."""


@dataclass(frozen=True)
class Full(SiteRule):
    """Full ranks everywhere, whatever they cost: the chain is exact."""

    def __str__(self) -> str:
        return "full"

    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Return the preferred candidate at its full ranks."""
        return Choice(candidates[0], candidates[0].max_ranks)


@dataclass(frozen=True)
class Fixed(SiteRule):
    """The same ranks everywhere: one for all modes, or one for each mode of a method with as many."""

    ranks: Ranks

    def __str__(self) -> str:
        return say_ranks(self.ranks)

    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Return the first candidate with as many ranks, each clamped to its full rank; refuse where none bites."""
        fits = [c for c in candidates if len(self.ranks) in (1, len(c.max_ranks))]
        if not fits:
            takes = ", ".join(f"{c.factorization.name} {len(c.max_ranks)}" for c in candidates)
            return Refusal(f"no method that fits it takes {len(self.ranks)} ranks ({takes})")
        full = fits[0].max_ranks
        wanted = self.ranks * len(full) if len(self.ranks) == 1 else self.ranks
        if all(rank >= limit for rank, limit in zip(wanted, full, strict=True)):
            return Refusal(f"rank {self} is at or above its full rank {say_ranks(full)}")
        return Choice(fits[0], tuple(map(min, wanted, full)))


class QualityRule(SiteRule):
    """A rule that fixes how much of a weight to keep: the factorization with the fewest MACs is the best one."""

    @abstractmethod
    def ranks(self, candidate: Candidate) -> Ranks | Refusal:
        """Return the ranks that keep as much, or why the candidate is out."""

    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Return the choice with the fewest MACs of those that save parameters or MACs."""
        found = [(candidate, self.ranks(candidate)) for candidate in candidates]
        choices = [Choice(candidate, ranks) for candidate, ranks in found if not isinstance(ranks, Refusal)]
        if not choices:
            reasons = dict.fromkeys(ranks.reason for _, ranks in found if isinstance(ranks, Refusal))
            return Refusal("; ".join(reasons))
        saving = [choice for choice in choices if choice.saves("parameters", "macs")]
        best = min(saving or choices, key=lambda choice: choice.order)
        return best if saving else best.refuse("macs")


@dataclass(frozen=True)
class Energy(QualityRule):
    """The smallest ranks that keep this share of the squared singular values of each unfolding."""

    share: float

    def __str__(self) -> str:
        return f"energy={self.share:g}"

    def ranks(self, candidate: Candidate) -> Ranks:
        """Return the smallest ranks that keep the share of each unfolding."""
        return candidate.settled(energy_counts(candidate, self.share))


@dataclass(frozen=True)
class Vbmf(QualityRule):
    """The ranks that EVBMF finds in each unfolding; a site without any signal above its noise stays dense."""

    def __str__(self) -> str:
        return "vbmf"

    def ranks(self, candidate: Candidate) -> Ranks | Refusal:
        """Return the ranks that keep the signal of each unfolding, or that one of them has none."""
        counts = vbmf_counts(candidate)
        if 0 in counts:
            return Refusal("EVBMF finds no signal above the noise in its weight (rank 0)")
        return candidate.settled(counts)


def energy_counts(candidate: Candidate, share: float) -> Ranks:
    """Return how few singular values of each unfolding keep this share of the energy, pooled over the groups."""
    # Example: shares 0.7, 0.2, 0.1 sum to 0.7, 0.9, 1: for 0.9 of the energy, the place 1 is
    # found, and two values stay.
    kept = [np.cumsum(np.square(levels)) for levels in candidate.levels]
    return tuple(min(len(k), int(np.searchsorted(k, share * k[-1])) + 1) for k in kept)


def vbmf_counts(candidate: Candidate) -> Ranks:
    """Return the EVBMF rank of each unfolding, the largest over the groups; 0 where all is noise."""
    return tuple(evbmf_rank(s.values, s.rows, s.columns) for s in candidate.spectra)


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
        # How many of the descending values are at the level or above. Example: of 0.9, 0.5, 0.1 at a level of 0.5, two.
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

        # Invariant: ``levels[high]`` meets the budget and nothing below ``levels[low]`` does. At the last level, which
        # is infinite, every site is at rank 1.
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
