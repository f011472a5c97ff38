"""Carry out a plan: fit the chains, splice them in, check that they run, and measure how far the outputs have moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.data.samples import Calibration
from surgery.data.standin import GLANCE, stand_in
from surgery.errors import InputError, Refusal
from surgery.kinds.base import OpenModel
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import Model, open_model
from surgery.passes.factoring import Made, SiteData, factor_site, gather
from surgery.passes.fitting import Fitting, judged
from surgery.passes.goals import HeldOut, Seen
from surgery.plans.joining import join, joint_groups
from surgery.plans.plan import Plan
from surgery.plans.planning import Progress
from surgery.sites.edit import Replace
from surgery.sites.find import find
from surgery.sites.placement import Found
from surgery.sites.site import Site

__all__ = ["CarriedOut", "Means", "carry_out"]

Prepared = tuple[OpenModel, Found, Plan]


@dataclass(frozen=True)
class Means:
    """How a plan is carried out: with which data, by which solver, in how many stages."""

    samples: Calibration | None
    solver: str
    stages: int | None
    progress: Progress
    inplace: bool = False


@dataclass(frozen=True, eq=False)
class CarriedOut:
    """The changed model, the sites of the original, the plan as it went, the chains by site, and the output error."""

    model: Any
    found: Found
    plan: Plan
    made: Mapping[str, Made]
    seen: Seen | None


def carry_out(model: Model, inputs: Inputs, prepared: Prepared, means: Means) -> CarriedOut:
    """Return the model with the chains of a plan, fitted to data if there are any; ``prepared`` is its open graph.

    With data, most of the samples are fitted to, and the others decide what of the fit stays.
    """
    graph, found, plan = prepared
    work = join([spot.site for spot in found.placements if not plan[spot.site.name].dense], joint_groups(plan))
    held = _HeldOut.of(model, inputs, found, means) if work else None
    job = _Job(model, inputs, plan, work, means)
    data = None
    if held is None or held.fit is None:
        made, way = job.all_plain(), "plain"
    else:
        data = gather(model, inputs, held.fit, {site.name for unit in work for site in unit.members}, means.progress)
        fitted = job.fitting(data, held.outputs).run(data.stages(len(work), means.stages), plain=True)
        made, way = dict(fitted.made), fitted.way
    plan = job.plan_of(made)
    if means.inplace:  # nothing of the model has changed so far
        graph = open_model(model, inputs, copies=False, inplace=True)
        found = find(graph.flow)
    graph = _spliced(graph, found, made)
    for name, reason in graph.verify().items():
        plan, made = plan.edit(name, rank=None, reason=reason), {key: one for key, one in made.items() if key != name}
    changed = graph.finish()
    means.progress("factor", len(work), len(work))
    if data is not None and made and way != "plain":
        data.correct(changed, means.progress)
    seen = None if held is None or not made else held.see(changed)
    return CarriedOut(changed, found, plan, made, seen)


def _spliced(graph: OpenModel, found: Found, made: Mapping[str, Made]) -> OpenModel:
    """Put chains in the places of their sites, and return the graph."""
    spots = {spot.site.name: spot for spot in found.placements}
    spots |= graph.reopen([spot for spot in found.placements if spot.chain is not None and spot.site.name in made])
    for name, one in made.items():
        graph.apply(Replace(spots[name], one.chain))
    return graph


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """The original's outputs to measure others against, what they are outputs of, and the samples to fit to, if any."""

    outputs: HeldOut
    what: str
    fit: Calibration | None

    @classmethod
    def of(cls, model: Model, inputs: Inputs, found: Found, means: Means) -> _HeldOut | None:
        """Return those of held-out calibration samples, else of made-up ones; None where none can be made."""
        if means.samples is not None:
            fit, aside = judged(means.samples)
            return cls(HeldOut(model, aside), f"{aside.count} calibration samples", fit)
        made = stand_in(model, inputs, found, effort=GLANCE, progress=means.progress)
        try:
            return None if isinstance(made, Refusal) else cls(HeldOut(model, made.samples), made.what, None)
        except InputError:  # no output of numbers
            return None

    def see(self, changed: Model) -> Seen:
        """Return how far the outputs of a changed model are from the original's."""
        return Seen(self.outputs.error(changed)[0], self.what)


@dataclass(eq=False)
class _Job:
    """The units of a plan that are to be factored, and how."""

    model: Model
    inputs: Inputs
    plan: Plan
    work: Sequence[Site]
    means: Means
    _refused: dict[str, str] = field(init=False, default_factory=dict)

    def fitting(self, data: SiteData, held_out: HeldOut) -> Fitting[Made]:
        """Return the loop over all units."""
        names = [frozenset({unit.name} if data.fits(unit) else ()) for unit in self.work]
        return Fitting(data, held_out, names, self.fit, self.build, self.means.progress)

    def fit(self, at: int, data: SiteData | None) -> dict[str, Made]:
        """Return the chains of the members of a unit."""
        made = factor_site(self.work[at], self.plan, self.means.solver, data)
        if isinstance(made, Refusal):
            self._refused[self.work[at].name] = made.reason
            return {}
        return made

    def all_plain(self) -> dict[str, Made]:
        """Return the chains of all units, without data."""
        made: dict[str, Made] = {}
        for done in range(len(self.work)):
            self.means.progress("factor", done, len(self.work))
            made |= self.fit(done, None)
        return made

    def build(self, made: Mapping[str, Made]) -> Any:
        """Return a copy of the model with chains."""
        graph = open_model(self.model, self.inputs)
        return _spliced(graph, find(graph.flow), made).finish()

    def plan_of(self, made: Mapping[str, Made]) -> Plan:
        """Return the plan as it went."""
        plan = self.plan
        for one in made.values():
            plan = plan.replaced(one.decision)
        for name, reason in self._refused.items():
            kept = replace(plan[name], factorization=None, rank=None, reason=reason, error=None)
            plan = plan.replaced(replace(kept, parameters=None, macs=None))
        return plan
