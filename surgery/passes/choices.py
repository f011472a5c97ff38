"""Plans of choices: one option for each site that has any, and the reasons of all others to stay dense.

What each site of a model could become, with the damage and the cost of each, by the moments of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from surgery.errors import Refusal
from surgery.factorizations import Ranks, named
from surgery.passes.factoring import SiteData
from surgery.plans.candidates import Candidate, Cost
from surgery.plans.goal import Goal
from surgery.plans.options import Option, Options, Prices, options_of
from surgery.plans.plan import Decision, Plan
from surgery.sites import Site
from surgery.system.progress import Progress

__all__ = ["ChoicePlans", "Pricing", "SiteOptions", "list_options"]


@dataclass(frozen=True)
class Pricing:
    """How options are made and priced.

    ``ruled`` is a plan whose factorizations are taken over; ``multiple`` is the number of channels that kernels like.
    """

    prices: Prices
    factorization: str = "auto"
    multiple: int | None = None
    ruled: Plan | None = None

    def factorization_of(self, site: str) -> str:
        """Return the factorization that a site may have, or "auto"."""
        return self.factorization if self.ruled is None else self.ruled[site].factorization or "auto"


@dataclass(frozen=True, eq=False)
class SiteOptions:
    """The options of the sites that have any, and why the others have none, by name."""

    sites: tuple[Options, ...]
    reasons: dict[str, str]


def list_options(sites: Iterable[Site], data: SiteData, pricing: Pricing, progress: Progress) -> SiteOptions:
    """Return the options of each site."""
    wanted = tuple(sites)
    found: list[Options] = []
    reasons: dict[str, str] = {}
    for done, site in enumerate(wanted):
        progress("measure", done, len(wanted))
        options = _options(site, data, pricing)
        if isinstance(options, Refusal):
            reasons[site.name] = options.reason
        else:
            found.append(options)
    progress("measure", len(wanted), len(wanted))
    return SiteOptions(tuple(found), reasons)


def _options(site: Site, data: SiteData, pricing: Pricing) -> Options | Refusal:
    if site.name not in data.moments:
        return Refusal("no calibration input reaches it")
    return options_of(
        site,
        data.moments[site.name],
        pricing.prices,
        factorization=pricing.factorization_of(site.name),
        multiple=pricing.multiple,
        centred=site.name in data.centred,
    )


_TOO_DEAR = "every chain would cost more of the promise than it gains"


@dataclass(eq=False)
class ChoicePlans:
    """Makes plans of choices; ``reasons`` has the sites that stay dense in any case, or have no option."""

    sites: Mapping[str, Site]
    options: Sequence[Options]
    reasons: Mapping[str, str]
    goal: Goal
    held_out: float | None
    _costs: dict[tuple[str, str, Ranks], Cost] = field(init=False, default_factory=dict)

    def plan(self, chosen: Sequence[Option]) -> Plan:
        """Return the decisions for all sites, dense where no chain is chosen, with the reasons."""
        choice = {option.site: option for option in chosen}
        measured = self.goal.cost == "latency"
        dense = {options.site.name: options.dense.cost for options in self.options} if measured else {}
        decisions = []
        for name, site in self.sites.items():
            decision = Decision(
                name, dense_parameters=site.parameters, dense_macs=site.macs, dense_latency=dense.get(name)
            )
            option = choice.get(name)
            if option is None or option.factorization is None or option.ranks is None:
                decisions.append(replace(decision, reason=self.reasons.get(name, _TOO_DEAR)))
            else:
                decisions.append(self._chosen(decision, option, option.factorization, option.ranks))
        return Plan(tuple(decisions), ranks=str(self.goal), held_out=self.held_out)

    def dense(self, reason: str) -> Plan:
        """Return the plan in which all sites stay dense; for this reason, unless they have one of their own."""
        rows = [d if d.site in self.reasons else replace(d, reason=reason) for d in self.plan(())]
        return replace(self.plan(()), decisions=tuple(rows))

    def _chosen(self, decision: Decision, option: Option, factorization: str, ranks: Ranks) -> Decision:
        cost = self._cost(option.site, factorization, ranks)
        return replace(
            decision,
            factorization=factorization,
            rank=ranks,
            error=option.damage**0.5,
            parameters=cost.parameters,
            macs=cost.macs,
            latency=option.cost if self.goal.cost == "latency" else None,
        )

    def _cost(self, site: str, factorization: str, ranks: Ranks) -> Cost:
        key = site, factorization, ranks
        if key not in self._costs:
            self._costs[key] = Candidate(self.sites[site], named(factorization)).cost(ranks)
        return self._costs[key]
