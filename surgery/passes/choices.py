"""Plans of choices: one option for each site that has any, and the reasons of all others to stay dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from surgery.factorizations import Ranks, named
from surgery.plans.candidates import Candidate, Cost
from surgery.plans.goal import Goal
from surgery.plans.options import Option, Options
from surgery.plans.plan import Decision, Plan
from surgery.sites.site import Site

__all__ = ["ChoicePlans"]

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
