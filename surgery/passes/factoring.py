"""The chains of one site of a plan, with errors: factored, shared out among joint sites, or cut to lower ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from surgery.algebra.chain import Chain, relative_error
from surgery.algebra.stack import split
from surgery.errors import CheckError, Refusal
from surgery.factorizations import Ranks, named
from surgery.factorizations.recut import recut
from surgery.passes.site_data import SiteData, known_solver
from surgery.plans.candidates import Candidate, Cost
from surgery.plans.plan import Decision
from surgery.sites.joint import JointSite
from surgery.sites.site import FactoredSite, Site
from surgery.text import rank_text

__all__ = ["Made", "Substitute", "factor_site", "split_chain", "substitute", "weight_error"]


@dataclass(frozen=True)
class Substitute:
    """The chain that took the place of the planned one: its method, its ranks, its costs, and why."""

    factorization: str
    rank: Ranks
    cost: Cost
    reason: str


@dataclass(frozen=True, eq=False)
class Made:
    """The chain of a site, and what took the place of the planned factorization, if that found no good factors."""

    site: Site
    chain: Chain
    substitute: Substitute | None = None
    cut_error: float | None = None  # of a chain that was cut to lower ranks

    @cached_property
    def error(self) -> float:
        """The measured relative error of the weight."""
        return weight_error(self.site, self.chain) if self.cut_error is None else self.cut_error

    def carried(self, decision: Decision) -> Decision:
        """Return the decision as it was carried out."""
        found = self.substitute
        if found is None:
            return decision
        changed = replace(decision, factorization=found.factorization, rank=found.rank, reason=found.reason, error=None)
        return replace(
            changed, parameters=found.cost.parameters, macs=found.cost.macs, dense_latency=None, latency=None
        )


def factor_site(unit: Site, decision: Decision, solver: str, data: SiteData | None = None) -> dict[str, Made] | Refusal:
    """Return the chain of each member of a site by name, fitted to data if there are any.

    Refuses where the method finds no good factors.
    """
    if decision.factorization is None or decision.rank is None:
        raise CheckError(f"the plan has no factorization for {unit.name}")
    if isinstance(unit, FactoredSite):
        return _recut(unit, decision.rank)
    chain = _chain(unit, decision.factorization, decision.rank, solver, data)
    if isinstance(chain, Refusal):
        return chain
    return {s.name: Made(s, c) for s, c in zip(unit.members, split_chain(chain, unit), strict=True)}


def substitute(unit: Site, decision: Decision, refusal: Refusal, data: SiteData | None) -> dict[str, Made] | Refusal:
    """Return Tucker chains at the same ranks for a site whose planned method found no good factors."""
    if isinstance(unit, FactoredSite) or decision.factorization == "tucker":
        return refusal
    tucker = named("tucker")
    ranks = tuple(min(max(decision.rank or (1,)), limit) for limit in tucker.max_ranks(unit.operator))
    reason = f"{decision.factorization} {rank_text(decision.rank)}: {refusal.reason}; tucker took its place"
    chain = _chain(unit, tucker.name, ranks, "auto", data)
    if isinstance(chain, Refusal):
        return chain
    costs = Candidate(unit, tucker).costs(ranks)
    rows = zip(unit.members, split_chain(chain, unit), costs, strict=True)
    return {s.name: Made(s, c, Substitute(tucker.name, ranks, cost, reason)) for s, c, cost in rows}


def _chain(unit: Site, name: str, ranks: Ranks, solver: str, data: SiteData | None) -> Chain | Refusal:
    if data is not None and data.fits(unit):
        return data.fit(unit, name, ranks, solver)
    method = named(name)
    return method.factor(unit.operator, ranks, solver=known_solver(solver, method))


def _recut(site: FactoredSite, ranks: Ranks) -> dict[str, Made] | Refusal:
    cut = recut(named(site.made_by[0]), site.operator, site.chain, ranks)
    return cut if isinstance(cut, Refusal) else {site.name: Made(site, cut.chain, cut_error=cut.error)}


def weight_error(site: Site, chain: Chain) -> float:
    """Return the relative error of the weight that a chain stands for."""
    composed = chain.compose()
    if isinstance(composed, Refusal):
        raise CheckError(f"the chain of {site.name} is not one operator: {composed.reason}")
    return relative_error(composed.weight, site.operator.weight)


def split_chain(chain: Chain, unit: Site) -> tuple[Chain, ...]:
    """Return the chain of each member of a site from that of the whole."""
    members = [member.operator for member in unit.members]
    chains = split(chain, members) if isinstance(unit, JointSite) else (chain,)
    if isinstance(chains, Refusal):
        raise CheckError(f"the joint sites of {unit.name} cannot share factors: {chains.reason}")
    return chains
