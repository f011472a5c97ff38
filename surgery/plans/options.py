"""What each site could become: dense, or a factorization at some ranks, each with its damage and its cost.

Damage is the expected squared relative error that an option alone would cause in the model's output,

    tr(G D C D^T)        D = W - W', C the second moment of the site's inputs, G the output's sensitivity

and damages of different sites add up, as errors that are independent do. It is read off the spectra of ``G^(1/2) W
C^(1/2)``: exact for a truncated SVD, a bound for the others, and good to rank options with. Absolute truth is measured
later, on the whole model. Without a sensitivity it is the relative error of the site's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from surgery.data.factor import RIDGE
from surgery.data.moments import Moments
from surgery.errors import InputError, Refusal
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate, candidates_of
from surgery.plans.faster import FACTORED_ALREADY, snap
from surgery.plans.prices import Prices
from surgery.sites.joint import JointSite
from surgery.sites.site import FactoredSite, Site
from surgery.solvers.weighted import roots, times_channels, triangle

__all__ = ["Option", "Options", "options_of"]

_JOINT = 576  # columns; above, the root over channels and taps at once costs more than it tells
_SURE = 0.03  # of measured costs
_LEVELS = 40  # thresholds on singular values, from the largest to a thousandth of it


@dataclass(frozen=True)
class Option:
    """One thing that a site could become; ``factorization`` and ``ranks`` are None for dense.

    ``cost`` is in the unit of the prices (seconds, multiply-accumulates or parameters), for all calls of one run.
    """

    site: str
    factorization: str | None
    ranks: Ranks | None
    damage: float
    cost: float


@dataclass(frozen=True)
class Options:
    """All options of a site that none of the others beats in both damage and cost; the first is dense."""

    site: Site
    options: tuple[Option, ...]

    @property
    def dense(self) -> Option:
        """The site as it is."""
        return self.options[0]

    @property
    def middle(self) -> Option:
        """The option whose cost is nearest to half-way from dense to the cheapest."""
        half = (self.dense.cost + min(option.cost for option in self.options)) / 2
        return min(self.options, key=lambda option: abs(option.cost - half))

    def with_damages(self, damages: Sequence[float]) -> Options:
        """Return the options with other damages, in the same order."""
        return replace(self, options=tuple(replace(o, damage=d) for o, d in zip(self.options, damages, strict=True)))


def options_of(
    site: Site,
    moments: Moments,
    prices: Prices,
    *,
    factorization: str = "auto",
    multiple: int | None = None,
    centred: bool = False,
) -> Options | Refusal:
    """Return the options of a site with at most its dense cost, or why it has none but dense.

    ``centred`` leaves the mean of the site's inputs out of account, which a bias or a normalisation takes up.
    """
    if isinstance(site, FactoredSite | JointSite):
        return Refusal(FACTORED_ALREADY)
    plain = candidates_of(site, factorization)
    if isinstance(plain, Refusal):
        return plain
    whitened, scale = _whitened(site, moments, centred=centred)
    found: list[Option] = []
    reasons: list[str] = []
    dense: float | None = None
    for candidate in plain:
        guide = Candidate(whitened, candidate.factorization)
        choices = [r for r in _rank_grid(guide, multiple) if candidate.cost(r).macs < candidate.dense_cost.macs]
        if not choices:
            reasons.append(f"{candidate.factorization.name}: no rank needs fewer MACs than dense")
            continue
        try:
            dense, costs = prices.price(candidate, choices)
        except InputError as error:
            reasons.append(f"{candidate.factorization.name} cannot be measured: {error.what}")
            continue
        name = candidate.factorization.name
        for ranks, cost in zip(choices, costs, strict=True):
            found.append(Option(site.name, name, ranks, scale * guide.error(ranks) ** 2, cost))
    if dense is None:
        return Refusal("; ".join(reasons))
    best = _undominated(Option(site.name, None, None, 0.0, dense), found, _SURE if prices.measured else 0.0)
    if len(best) == 1:
        return Refusal("no chain measured faster than dense" if prices.measured else "no chain costs less than dense")
    return Options(site, tuple(best))


def _undominated(dense: Option, options: Sequence[Option], sure: float) -> list[Option]:
    """Return dense, and the options that no other of less damage is as cheap as, the dearest first.

    ``sure`` is the share by which costs must differ: what is gained by less may be chance, and the damage is not.
    """
    kept = [dense]
    for option in sorted(options, key=lambda option: (option.damage, option.cost)):
        if option.cost < (1 - sure) * kept[-1].cost:
            kept.append(option)
    return kept


def _rank_grid(candidate: Candidate, multiple: int | None) -> list[Ranks]:
    """Return snapped ranks from one threshold on the singular values of all unfoldings after another, without full."""
    groups = candidate.site.operator.kernel.shape[0]
    found: dict[Ranks, None] = {}
    for level in np.geomspace(1.0, 1e-3, _LEVELS):
        counts = tuple(max(1, int((values > level * values[0]).sum())) for values in candidate.levels)
        rows = zip(candidate.settled(counts), candidate.max_ranks, strict=True)
        found[tuple(min(full, snap(rank, groups=groups, multiple=multiple)) for rank, full in rows)] = None
    return [ranks for ranks in found if ranks != candidate.max_ranks]


def _whitened(site: Site, moments: Moments, *, centred: bool) -> tuple[Site, float]:
    """Return the site with ``G^(1/2) W C^(1/2)`` as its kernel, and the damage of losing all of it."""
    operator = site.operator
    kernel = operator.kernel.detach().double()
    metric = moments.centred if centred else moments.metric
    if metric.factors[0].shape[-1] > _JOINT and metric.factors[0].dim() == 3:
        metric = metric.separated()
    mixed = metric.taps > 1 and len(metric.factors) == 1  # a root over channels and taps at once must be symmetric
    first, *rest = (roots(f, RIDGE)[0] if mixed else triangle(f, RIDGE) for f in metric.factors)
    rows = times_channels(kernel.flatten(2), first, metric.taps if rest else 1)
    if rest:
        split = rows.unflatten(-1, (-1, metric.taps))
        rows = torch.einsum("grik,gkl->gril", split, rest[0]).flatten(2)
    total = float(moments.metric.energy(kernel.flatten(2)))
    if moments.sensitivity is None:
        scale = float(rows.square().sum()) / total if total > 0 else 0.0
    else:
        rows = triangle(moments.sensitivity, RIDGE).mT @ rows
        scale = float(rows.square().sum())
    return replace(site, operator=operator.with_bias(None).with_kernel(rows.view_as(kernel))), scale
