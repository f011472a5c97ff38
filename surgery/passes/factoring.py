"""The chains of single sites: what calibration data say of each, and chains made of weights or data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from surgery.algebra import Chain, relative_error, split
from surgery.data.batch_norm import NormWatch, Reference, reestimate_batch_norm
from surgery.data.collect import collect, with_sensitivity
from surgery.data.factor import fit
from surgery.data.moments import Moments
from surgery.data.samples import Calibration, samples_in
from surgery.data.sequence import Originals, Target
from surgery.errors import CheckError, InputError, Refusal
from surgery.factorizations import SOLVERS, Factorization, Ranks, named
from surgery.factorizations.recut import recut
from surgery.kinds.registry import Model
from surgery.passes.original import Original
from surgery.plans.candidates import Candidate, Cost
from surgery.plans.plan import Decision
from surgery.sites import FactoredSite, JointSite, Site
from surgery.system.memory import give_back
from surgery.system.progress import Progress
from surgery.text import rank_text

__all__ = [
    "Made",
    "SiteData",
    "Substitute",
    "factor_site",
    "gather",
    "known_solver",
    "split_chain",
    "substitute",
    "weight_error",
]


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
        give_back(self.site.operator.weight.nbytes)  # what was used for other sites
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


_BACKWARD = 3  # times the work of a forward pass


@dataclass(frozen=True, eq=False)
class SiteData:
    """What calibration data say of the sites: moments by name, and of which the mean is taken up by what follows them.

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
        method, centred = named(name), site.name in self.centred
        # One of both is made, since each is as large as the moments.
        target = self.targets.get(site.name) or Target(site.operator, self.moments[site.name])
        bias = site.operator.bias if site.name in self.tied else None
        operator = target.operator if bias is None else target.operator.with_bias(None)
        chain = fit(method, operator, ranks, target.moments, solver=known_solver(solver, method), centred=centred)
        return chain if bias is None or isinstance(chain, Refusal) else chain.with_bias(bias)

    def groups(self, count: int, wanted: int | None) -> list[range]:
        """Return the places of so many sites, in order, in as many groups as are wanted, or as passes do not cost much.

        None of them is empty.
        """
        groups = min(count, self.samples.passes(self.macs) if wanted is None else wanted)
        # Example: 7 sites in 3 groups are cut at 0, 2, 4 and 7.
        cuts = [count * i // groups for i in range(groups + 1)] if groups else []
        return [range(start, stop) for start, stop in pairwise(cuts)]

    def after(self, changed: Model, sites: Collection[str]) -> SiteData:
        """Return the data for some sites as they are in a changed model, whose batch norms are corrected in place."""
        return replace(self, targets=self._originals.targets(changed, sites, self.norms, self.centred))

    @cached_property
    def _originals(self) -> Originals:
        return Originals(self.model, self.samples, self.moments)

    def correct(self, changed: Model, progress: Progress) -> None:
        """Re-estimate the batch norms of a changed model, in place."""
        reestimate_batch_norm(changed, self.samples, reference=self.norms, progress=progress)


def gather(original: Original, samples: Calibration, sites: Collection[str] | None, progress: Progress) -> SiteData:
    """Return what the samples say of some sites of a model, or of all, with sensitivities as far as there are any.

    Chains that stand there already are left out: they are cut without data. Of a large model only the samples that
    ``Calibration.affordable`` says are read.
    """
    model = original.model
    macs = original.totals.macs / samples_in(model, original.inputs)
    samples = samples.affordable(macs)
    norms = NormWatch()
    wanted = original.sites if sites is None else sites
    fitted = [name for name in wanted if not isinstance(original.sites[name], FactoredSite)]
    moments = collect(model, samples, sites=fitted, progress=progress, also_watch=norms)
    if unseen := [name for name in fitted if name not in moments]:
        what = f"the calibration samples do not run {unseen[0]}" + f" and {len(unseen) - 1} more" * (len(unseen) > 1)
        raise InputError(what, next_step="give samples that do, as example inputs as well, or exclude it")
    with suppress(InputError):  # what cannot be differentiated is fitted without: all errors of an output count alike
        moments = with_sensitivity(model, samples.affordable(_BACKWARD * macs, least=1), moments, progress=progress)
    # A bias takes up the mean of one site's error. One that several sites share cannot, so that it stays as it is.
    biases = Counter(address for site in original.sites.values() if (address := _bias(site)) is not None)
    owners = {name for name in moments if (at := _bias(original.sites[name])) is not None and biases[at] == 1}
    centred = frozenset(name for name in moments if name in owners or original.feeds_batch_norm(name))
    tied = frozenset(name for name in moments if _bias(original.sites[name]) is not None and name not in owners)
    return SiteData(model, samples, macs, moments, centred, norms.reference, tied)


def known_solver(solver: str, method: Factorization) -> str:
    """Return the solver, or the method's own where it has none of this name and another method has."""
    return solver if solver in method.solvers or solver not in SOLVERS else "auto"


def _bias(site: Site) -> int | None:
    """Return where the bias of a site is in memory, if it has one."""
    return None if site.operator.bias is None else site.operator.bias.data_ptr()
