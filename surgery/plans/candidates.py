"""Candidates: one site with one factorization that fits it; its spectra, costs and errors at any ranks.

A candidate computes its spectra once, when they are first asked for, and each cost once. Costs are counted on the chain
that the factorization would build, with weights on the meta device.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from surgery.algebra import Chain, Operator, Shape, own_parameters, split
from surgery.errors import InputError, Refusal
from surgery.factorizations import Factorization, Ranks, Spectrum, fitting, named
from surgery.factorizations.recut import chain_spectra
from surgery.sites import FactoredSite, JointSite, Site

__all__ = ["Candidate", "Choice", "Cost", "candidates_of", "say_ranks", "standing"]


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of all calls in one run."""

    parameters: int
    macs: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """One factorization that fits the operator of one site."""

    site: Site
    factorization: Factorization
    _costs: dict[Ranks, Cost] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def max_ranks(self) -> Ranks:
        """The full rank of each unfolding; of a chain its own ranks."""
        if isinstance(self.site, FactoredSite):
            return self.site.made_by[1]
        return self.factorization.max_ranks(self.site.operator)

    @functools.cached_property
    def spectra(self) -> tuple[Spectrum, ...]:
        """The singular values of each unfolding: the expensive part."""
        if isinstance(self.site, FactoredSite):
            return chain_spectra(self.factorization, self.site.operator, self.site.chain)
        return self.factorization.spectra(self.site.operator)

    @functools.cached_property
    def levels(self) -> tuple[npt.NDArray[np.float64], ...]:
        """Pooled singular values of each unfolding over the norm of the weight, descending."""
        pooled = [spectrum.pooled.double().cpu().numpy() for spectrum in self.spectra]
        return tuple(values / (np.linalg.norm(values) or 1.0) for values in pooled)

    @functools.cached_property
    def dense_cost(self) -> Cost:
        """The cost of the operator as it is."""
        return Cost(self.site.parameters, self.site.macs)

    def chains(self, ranks: Ranks) -> tuple[Chain, ...] | Refusal:
        """Return the chain of each member of the site on the meta device; or why they cannot share one."""
        chain = self.factorization.skeleton(self.site.operator, ranks)
        members = [member.operator for member in self.site.members]
        return split(chain, members) if isinstance(self.site, JointSite) else (chain,)

    def cost(self, ranks: Ranks) -> Cost:
        """Return the cost of the chain at these ranks."""
        if ranks not in self._costs:
            costs = self.costs(ranks)
            self._costs[ranks] = Cost(sum(c.parameters for c in costs), sum(c.macs for c in costs))
        return self._costs[ranks]

    def costs(self, ranks: Ranks) -> list[Cost]:
        """Return the cost for each member of the site; parameters that several share count for the first."""
        chains = self.chains(ranks)
        if isinstance(chains, Refusal):
            raise InputError(f"{self.site.name!r} cannot share factors: {chains.reason}")
        calls = [Counter(member.input_shapes) for member in self.site.members]
        rows = zip(chains, calls, own_parameters(chains), strict=True)
        return [Cost(own, sum(n * chain.macs(shape) for shape, n in times.items())) for chain, times, own in rows]

    def pairs(self, ranks: Ranks) -> list[tuple[Operator | Chain, Operator | Chain, Shape, int]]:
        """Return what to time: what stands there and the chain, an input shape, and how many calls have it."""
        chains = self.chains(ranks)
        if isinstance(chains, Refusal):
            return []
        return [
            (standing(member), member.placed(chain), shape, count)
            for member, chain in zip(self.site.members, chains, strict=True)
            for shape, count in Counter(member.input_shapes).items()
        ]

    def settled(self, counts: Ranks) -> Ranks:
        """Return the ranks that keep so many singular values of each unfolding, between 1 and the full ranks."""
        ranks = self.factorization.settle(counts, self.max_ranks)
        return tuple(max(1, min(rank, full)) for rank, full in zip(ranks, self.max_ranks, strict=True))

    def error(self, ranks: Ranks) -> float:
        """Return the predicted weight error: root of the energy that the unfoldings lose, at most 1.

        With one unfolding that is the error of the truncated SVD (Eckart-Young), with several an upper bound on the
        error of a truncated higher-order SVD (De Lathauwer et al. 2000, property 10) or a train (Oseledets 2011). For
        cp and tr it is a lower bound: what no chain of these ranks can keep.
        """
        if ranks == self.max_ranks:
            return 0.0
        counts = self.factorization.counts(ranks)
        lost = [float(np.square(v[c:]).sum()) for v, c in zip(self.levels, counts, strict=True)]
        # each unfolding alone bounds the error from below, and all of them together from above
        return min(1.0, math.sqrt(max(lost) if self.factorization.bound == "at least" else sum(lost)))

    def widened(self, ranks: Ranks, cost: str) -> Ranks:
        """Return these ranks, or with one mode at its full rank where the chain then costs less.

        A full mode needs no factor of its own, so its error and its cost may both be lower. ``cost`` is "parameters" or
        "macs". The cost of what comes back never grows when the ranks shrink.
        """
        options = [ranks]
        if len(ranks) > 1:
            options += [(*ranks[:i], full, *ranks[i + 1 :]) for i, full in enumerate(self.max_ranks)]
        return min(options, key=lambda option: getattr(self.cost(option), cost))


@dataclass(frozen=True, eq=False)
class Choice:
    """A candidate at ranks; latencies in seconds for all calls of one run, where they were measured."""

    candidate: Candidate
    ranks: Ranks
    dense_latency: float | None = None
    latency: float | None = None

    @property
    def cost(self) -> Cost:
        """The cost of the chain."""
        return self.candidate.cost(self.ranks)

    @property
    def order(self) -> tuple[int, int]:
        """What to sort by so that the fewest MACs come first."""
        return self.cost.macs, self.cost.parameters

    def saves(self, *costs: str) -> bool:
        """Whether any of these costs ("parameters", "macs") is below that of the dense operator."""
        dense = self.candidate.dense_cost
        return any(getattr(self.cost, cost) < getattr(dense, cost) for cost in costs)

    def refuse(self, cost: str) -> Refusal:
        """Return the refusal of a chain that saves nothing, as ``rank 30 of svd would cost more than dense (...)``."""
        chain, dense = getattr(self.cost, cost), getattr(self.candidate.dense_cost, cost)
        name = "MACs" if cost == "macs" else cost
        what = f"rank {say_ranks(self.ranks)} of {self.candidate.factorization.name}"
        if chain <= dense:
            return Refusal(f"{what} would cost as much as dense ({chain} {name})")
        times = f"{chain / dense:.2g}x" if dense and chain / dense >= 1.05 else f"{dense} -> {chain}"
        return Refusal(f"{what} would cost more than dense ({name} {times})")


def standing(site: Site) -> Operator | Chain:
    """Return what stands at a site now, in its place: the operator, or the chain that is there already."""
    return site.placed(site.chain if isinstance(site, FactoredSite) else site.operator)


def candidates_of(site: Site, factorization: str) -> list[Candidate] | Refusal:
    """Return the candidates of a site, the preferred one first, or why there is none.

    ``factorization`` is a name, or "auto" for all that fit.

    Raises:
        InputError: an unknown name, or a weight with values that are not finite.
    """
    if isinstance(site, FactoredSite):
        return _candidates_of_chain(site, factorization)
    weight = site.operator.weight.detach()
    if weight.numel() == 0:
        return Refusal("its weight is empty")
    fits = fitting(site.operator, factorization)
    if isinstance(fits, Refusal):
        return fits
    if not bool(torch.isfinite(weight).all()):
        raise InputError(
            f"the weight of {site.name!r} has values that are not finite",
            next_step="repair the model first, or exclude this site",
        )
    candidates = [Candidate(site, fit) for fit in fits]
    if not isinstance(site, JointSite):
        return candidates
    shared = {c: c.chains(c.max_ranks) for c in candidates}
    refusals = [f"{c.factorization.name}: {why.reason}" for c, why in shared.items() if isinstance(why, Refusal)]
    return [c for c, chains in shared.items() if not isinstance(chains, Refusal)] or Refusal("; ".join(refusals))


def _candidates_of_chain(site: FactoredSite, factorization: str) -> list[Candidate] | Refusal:
    method, _ = site.made_by
    if factorization not in ("auto", method):
        return Refusal(f"it is factored by {method} already; recompose it first for another method")
    return [Candidate(site, named(method))]


def say_ranks(ranks: Ranks) -> str:
    """Return ranks as they are written in a spec: ``16,32``."""
    return ",".join(map(str, ranks))
