"""The chains of one site of a plan, with errors: factored, shared out among joint sites, or cut to lower ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from surgery.algebra.chain import Chain, relative_error
from surgery.algebra.stack import split
from surgery.data.batch_norm import NormWatch, Reference, feeds_batch_norm, reestimate_batch_norm
from surgery.data.collect import Progress, collect
from surgery.data.factor import fit
from surgery.data.moments import Moments
from surgery.data.samples import Calibration, samples_in
from surgery.data.sensitivity import with_sensitivity
from surgery.data.sequence import Originals, Target
from surgery.errors import CheckError, InputError, Refusal
from surgery.factorizations import SOLVERS, Factorization, Ranks, named
from surgery.factorizations.recut import recut
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import Model, open_model
from surgery.plans.candidates import Candidate
from surgery.plans.plan import Decision, Plan
from surgery.sites.find import find
from surgery.sites.joint import JointSite
from surgery.sites.site import FactoredSite, Site
from surgery.text import rank_text

__all__ = ["Made", "SiteData", "factor_site", "gather", "plain", "split_chain", "weight_error"]


_BACKWARD = 3  # times the work of a forward pass


@dataclass(frozen=True, eq=False)
class SiteData:
    """What calibration data say of the sites: moments by name, and which have their mean taken up behind them.

    ``norms`` is what reaches the batch norms of the original on the same ``samples``, of ``macs`` each. ``tied`` are
    sites whose bias others have, too, so that it stays as it is. ``targets`` stand for sites whose inputs have changed.
    """

    model: Model
    samples: Calibration
    macs: float
    moments: Mapping[str, Moments]
    centred: frozenset[str]
    norms: Reference
    tied: frozenset[str] = frozenset()
    targets: Mapping[str, Target] = field(default_factory=dict)

    def fits(self, unit: Site) -> bool:
        """Whether a site is fitted to data: not joint ones, for what they share would have to serve all of them."""
        return unit.name in self.moments and not isinstance(unit, JointSite | FactoredSite)

    def fit(self, site: Site, name: str, ranks: Ranks, solver: str = "auto") -> Chain | Refusal:
        """Return the chain of a site by the factorization of this name, fitted to the data."""
        method, own = named(name), Target(site.operator, self.moments[site.name])
        target, centred = self.targets.get(site.name, own), site.name in self.centred
        bias = site.operator.bias if site.name in self.tied else None
        operator = target.operator if bias is None else target.operator.with_bias(None)
        chain = fit(method, operator, ranks, target.moments, solver=_known(solver, method), centred=centred)
        return chain if bias is None or isinstance(chain, Refusal) else chain.with_bias(bias)

    def stages(self, count: int, wanted: int | None) -> list[range]:
        """Return the places of so many sites, in order, in as many runs as are wanted, or as passes do not cost much.

        None of them is empty.
        """
        stages = min(count, self.samples.passes(self.macs) if wanted is None else wanted)
        cuts = [count * i // stages for i in range(stages + 1)] if stages else []
        return [range(start, stop) for start, stop in pairwise(cuts)]

    def behind(self, changed: Model, sites: Collection[str]) -> SiteData:
        """Return the data for some sites as they are in a changed model, whose batch norms are corrected in place."""
        return replace(self, targets=self._originals.targets(changed, sites, self.norms, self.centred))

    @cached_property
    def _originals(self) -> Originals:
        return Originals(self.model, self.samples, {name: m for name, m in self.moments.items() if m.dense})

    def correct(self, changed: Model, progress: Progress) -> None:
        """Re-estimate the batch norms of a changed model, in place."""
        reestimate_batch_norm(changed, self.samples, reference=self.norms, progress=progress)


@dataclass(frozen=True, eq=False)
class Made:
    """The chain of a site, the decision as it was carried out, and the measured relative error of the weight."""

    site: Site
    chain: Chain
    decision: Decision
    error: float


def gather(
    model: Model, inputs: Inputs, samples: Calibration, sites: Collection[str] | None, progress: Progress
) -> SiteData:
    """Return what the samples say of some sites of a model, or of all, with sensitivities as far as there are any.

    Of a large model only the samples that ``Calibration.affordable`` says are read.
    """
    graph = open_model(model, inputs, copies=False)
    found = find(graph.flow)
    macs = found.totals.macs / samples_in(model, inputs)
    samples = samples.affordable(macs)
    norms = NormWatch()
    moments = collect(model, samples, sites=sites, progress=progress, beside=norms)
    with suppress(InputError):  # what cannot be differentiated is fitted without: all errors of an output count alike
        moments = with_sensitivity(model, samples.affordable(_BACKWARD * macs, least=1), moments, progress=progress)
    spots = [spot for spot in found.placements if spot.site.name in moments]
    biases = Counter(
        spot.site.operator.bias.data_ptr() for spot in found.placements if spot.site.operator.bias is not None
    )
    own = {
        s.site.name: s.site.operator.bias is not None and biases[s.site.operator.bias.data_ptr()] == 1 for s in spots
    }
    centred = frozenset(spot.site.name for spot in spots if own[spot.site.name] or feeds_batch_norm(graph.flow, spot))
    tied = frozenset(s.site.name for s in spots if s.site.operator.bias is not None and not own[s.site.name])
    return SiteData(model, samples, macs, moments, centred, norms.reference, tied)


def factor_site(unit: Site, plan: Plan, solver: str, data: SiteData | None = None) -> dict[str, Made] | Refusal:
    """Return the chain of each member of a site by name, fitted to data if there are any.

    Refuses where a factored site has no good factors at lower ranks.
    """
    decision = plan[unit.name]
    if decision.factorization is None or decision.rank is None:
        raise CheckError(f"the plan has no factorization for {unit.name}")
    method = named(decision.factorization)
    if isinstance(unit, FactoredSite):
        return _recut(unit, plan, decision.rank)
    if data is not None and data.fits(unit):
        chain = data.fit(unit, method.name, decision.rank, solver)
    else:
        chain = plain(unit, method.name, decision.rank, solver)
    if isinstance(chain, Refusal):
        return factor_site(unit, _fallback(unit, plan, chain), "auto", data)
    chains = split_chain(chain, unit)
    pairs = zip(unit.members, chains, strict=True)
    return {site.name: Made(site, chain, plan[site.name], weight_error(site, chain)) for site, chain in pairs}


def plain(site: Site, name: str, ranks: Ranks, solver: str = "auto") -> Chain | Refusal:
    """Return the chain of a site by the factorization of this name, from its weight alone."""
    method = named(name)
    return method.factor(site.operator, ranks, solver=_known(solver, method))


def _recut(site: FactoredSite, plan: Plan, ranks: Ranks) -> dict[str, Made] | Refusal:
    cut = recut(named(site.made_by[0]), site.operator, site.chain, ranks)
    return cut if isinstance(cut, Refusal) else {site.name: Made(site, cut.chain, plan[site.name], cut.error)}


def weight_error(site: Site, chain: Chain) -> float:
    """Return the relative error of the weight that a chain stands for."""
    composed = chain.compose()
    if isinstance(composed, Refusal):
        raise CheckError(f"the chain of {site.name} is not one operator: {composed.reason}")
    return relative_error(composed.weight, site.operator.weight)


def _known(solver: str, method: Factorization) -> str:
    """Return the solver, or the method's own where it has none of this name and another method has."""
    return solver if solver in method.solvers or solver not in SOLVERS else "auto"


def _fallback(unit: Site, plan: Plan, refusal: Refusal) -> Plan:
    """Return the plan with Tucker at the same ranks for a site whose planned method found no good factors."""
    tucker, decision = named("tucker"), plan[unit.name]
    ranks = tuple(min(max(decision.rank or (1,)), limit) for limit in tucker.max_ranks(unit.operator))
    reason = f"{decision.factorization} {rank_text(decision.rank)}: {refusal.reason}; tucker took its place"
    costs = Candidate(unit, tucker).costs(ranks)
    for site, cost in zip(unit.members, costs, strict=True):
        changed = replace(plan[site.name], factorization=tucker.name, rank=ranks, reason=reason, error=None)
        costed = replace(changed, parameters=cost.parameters, macs=cost.macs, dense_latency=None, latency=None)
        plan = plan.replaced(costed)
    return plan


def split_chain(chain: Chain, unit: Site) -> tuple[Chain, ...]:
    """Return the chain of each member of a site from that of the whole."""
    members = [member.operator for member in unit.members]
    chains = split(chain, members) if isinstance(unit, JointSite) else (chain,)
    if isinstance(chains, Refusal):
        raise CheckError(f"the joint sites of {unit.name} cannot share factors: {chains.reason}")
    return chains
