"""What each site could become: dense, or a factorization at some ranks, each with its damage and its cost.

Damage is the expected squared relative error that an option alone would cause in the model's output,

    tr(G D C D^T)        D = W - W', C the second moment of the site's inputs, G the output's sensitivity

and damages of different sites add up, as errors that are independent do. It is read off the spectra of ``G^(1/2) W
C^(1/2)``: exact for a truncated SVD, a bound for the others, and good to rank options with. Absolute truth is measured
later, on the whole model. Without a sensitivity it is the relative error of the site's own output.

What the options of a site cost: measured seconds, multiply-accumulates, or parameters.

Measured: of the ranks asked for only some are timed, the cheapest, the dearest and a few between; for those in between
seconds are interpolated over the multiply-accumulates, and so they never leave the span of what was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from surgery.data.factor import RIDGE
from surgery.data.moments import Moments
from surgery.errors import InputError, Refusal
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate, candidates_of
from surgery.plans.faster import FACTORED_ALREADY, Latencies, snap
from surgery.plans.plan import Plan
from surgery.sites import FactoredSite, JointSite, Site
from surgery.solvers.weighted import root_of, symmetric_root, times_channels, times_rows

__all__ = ["COSTS", "CostKind", "Counted", "Measured", "Option", "Options", "Prices", "Ruled", "options_of"]

CostKind: TypeAlias = Literal["latency", "macs", "params"]
COSTS: tuple[str, ...] = get_args(CostKind)


class Prices(Protocol):
    """Whatever says what a candidate costs at some ranks."""

    @property
    def what(self) -> str:
        """What costs are: one of ``COSTS``."""

    @property
    def measured(self) -> bool:
        """Whether costs are seconds that were measured."""

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        """Return the cost of the dense operator, and of each choice of ranks; InputError if it cannot be measured."""


@dataclass(frozen=True)
class Measured:
    """Seconds of what measures latencies, for all calls of one run; ``knots`` ranks are timed for each method."""

    latencies: Latencies
    knots: int = 4
    what: str = "latency"
    measured: bool = True

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        """Return the seconds of dense and of each choice."""
        macs = [candidate.cost(ranks).macs for ranks in choices]
        # Places even over the order of costs. Example: of 10 choices, 4 knots time the cheapest,
        # the dearest, and 3 and 6.
        order = sorted(range(len(choices)), key=macs.__getitem__)
        picked = sorted({order[round(at)] for at in np.linspace(0, len(order) - 1, min(self.knots, len(order)))})
        dense, seconds = [], {}
        for index in picked:
            before, after = self._time(candidate, choices[index])
            dense.append(before)
            seconds[macs[index]] = after
        known = sorted(seconds)
        costs = np.interp(macs, known, [seconds[at] for at in known])
        return float(np.median(dense)), [float(cost) for cost in costs]

    def _time(self, candidate: Candidate, ranks: Ranks) -> tuple[float, float]:
        rows = [(n, self.latencies.compare(op, chain, shape)) for op, chain, shape, n in candidate.pairs(ranks)]
        return sum(n * row.dense_s for n, row in rows), sum(n * row.chain_s for n, row in rows)


@dataclass(frozen=True)
class Ruled:
    """Seconds in proportion to those that a plan has measured at its own ranks, for its own methods alone."""

    plan: Plan
    what: str = "latency"
    measured: bool = True

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        """Return the seconds of dense and of each choice; fewer multiply-accumulates than the plan's save nothing."""
        row = self.plan[candidate.site.name]
        if row.dense_latency is None or row.latency is None or not row.macs:
            raise InputError("the plan has no latency for it")
        shares = [max(1.0, candidate.cost(ranks).macs / row.macs) for ranks in choices]
        return row.dense_latency, [row.latency * share for share in shares]


@dataclass(frozen=True)
class Counted:
    """ "macs" or "params": costs that need no measuring."""

    what: str
    measured: bool = False

    def __post_init__(self) -> None:
        if self.what not in COSTS[1:]:
            raise InputError(f"cost={self.what!r}", allowed=", ".join(COSTS))

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        """Return the count of dense and of each choice."""
        name = "macs" if self.what == "macs" else "parameters"
        costs = [float(getattr(candidate.cost(ranks), name)) for ranks in choices]
        return float(getattr(candidate.dense_cost, name)), costs


_JOINT = 576  # columns; above, the root over channels and taps at once costs more than it tells
_ROWS = 256  # rows or columns of a weight that are multiplied at once
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
    # Invariant: by rising damage, costs fall by more than ``sure``. Example of dense (0, 4) and (1, 2), (2, 2.1),
    # (3, 1): the second of these is dearer than the first at more damage, and goes.
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
    kernel = operator.kernel.detach().to(torch.float64, copy=True)  # twice as large as the weight, and changed below
    shape, taps, columns = kernel.shape, moments.metric.taps, kernel[0, 0].numel()
    rows = kernel.flatten(2)
    del kernel
    total = float(moments.metric.energy(rows)) if moments.sensitivity is None else 0.0
    joint = taps == 1 or (moments.dense and columns <= _JOINT)

    def factor(number: int) -> Tensor:
        metric = moments.new_metric(centred=centred)
        return (metric if joint else metric.separated()).factors[number]

    # Invariant: with C = L L^T and G = S S^T, |S^T W L|^2 = tr(G W C W^T), so that the singular values that are cut off
    # are the damage. W is (g, O, I K); where C = A (x) B, the root of A multiplies the channels, that of B the taps. A
    # root over channels and taps at once must be symmetric.
    if joint and taps > 1:
        root, extent = symmetric_root(factor(0), RIDGE), 1
    else:
        root, extent = root_of(partial(factor, 0), RIDGE), taps
    for block in rows.split(_ROWS, dim=1):
        block.copy_(times_channels(block, root.matrix, extent))
    del root
    if not joint:
        second = root_of(partial(factor, 1), RIDGE).matrix
        rows = torch.einsum("grik,gkl->gril", rows.unflatten(-1, (-1, taps)), second).flatten(2)
    if moments.sensitivity is None:
        scale = _energy(rows) / total if total > 0 else 0.0
    else:
        turned = root_of(moments.sensitivity.clone, RIDGE).turned
        for block in rows.split(_ROWS, dim=-1):
            block.copy_(times_rows(turned, block))
        scale = _energy(rows)
    return replace(site, operator=operator.with_bias(None).with_kernel(rows.view(shape))), scale


def _energy(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) ** 2
