"""What calibration data say of the sites of a model: all that fits need, gathered once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from surgery.algebra.chain import Chain
from surgery.data.batch_norm import NormWatch, Reference, reestimate_batch_norm
from surgery.data.collect import collect
from surgery.data.factor import fit
from surgery.data.moments import Moments
from surgery.data.samples import Calibration, samples_in
from surgery.data.sensitivity import with_sensitivity
from surgery.data.sequence import Originals, Target
from surgery.errors import InputError, Refusal
from surgery.factorizations import SOLVERS, Factorization, Ranks, named
from surgery.kinds.registry import Model
from surgery.passes.original import Original
from surgery.plans.planner import Progress
from surgery.sites.joint import JointSite
from surgery.sites.site import FactoredSite, Site

__all__ = ["SiteData", "gather", "known_solver"]

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
        method, own = named(name), Target(site.operator, self.moments[site.name])
        target, centred = self.targets.get(site.name, own), site.name in self.centred
        bias = site.operator.bias if site.name in self.tied else None
        operator = target.operator if bias is None else target.operator.with_bias(None)
        chain = fit(method, operator, ranks, target.moments, solver=known_solver(solver, method), centred=centred)
        return chain if bias is None or isinstance(chain, Refusal) else chain.with_bias(bias)

    def groups(self, count: int, wanted: int | None) -> list[range]:
        """Return the places of so many sites, in order, in as many groups as are wanted, or as passes do not cost much.

        None of them is empty.
        """
        groups = min(count, self.samples.passes(self.macs) if wanted is None else wanted)
        cuts = [count * i // groups for i in range(groups + 1)] if groups else []
        return [range(start, stop) for start, stop in pairwise(cuts)]

    def after(self, changed: Model, sites: Collection[str]) -> SiteData:
        """Return the data for some sites as they are in a changed model, whose batch norms are corrected in place."""
        return replace(self, targets=self._originals.targets(changed, sites, self.norms, self.centred))

    @cached_property
    def _originals(self) -> Originals:
        return Originals(self.model, self.samples, {name: m for name, m in self.moments.items() if m.dense})

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
    with suppress(InputError):  # what cannot be differentiated is fitted without: all errors of an output count alike
        moments = with_sensitivity(model, samples.affordable(_BACKWARD * macs, least=1), moments, progress=progress)
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
