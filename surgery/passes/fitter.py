"""The fitter: chains for the plans of one model, by the one loop that fits groups of sites, and models with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from surgery.algebra.chain import Chain
from surgery.errors import Refusal
from surgery.factorizations import Ranks
from surgery.passes.evidence import Evidence
from surgery.passes.factoring import Made, factor_site, substitute
from surgery.passes.fitting import Fitted, Fitting
from surgery.passes.original import Original
from surgery.passes.site_data import SiteData
from surgery.plans.joining import join, joint_groups
from surgery.plans.plan import Decision, Plan
from surgery.plans.planner import Progress
from surgery.sites.site import Site

__all__ = ["FitOptions", "Fitter"]

_UnitKey: TypeAlias = tuple[tuple[str, ...], str, Ranks]  # names, factorization, ranks


@dataclass(frozen=True)
class FitOptions:
    """How chains are fitted.

    ``groups`` is the number of groups of sites; None is as many as passes over the data do not cost much. With
    ``substitutes`` Tucker takes the place of a method that finds no good factors; else the site stays dense.
    """

    solver: str = "auto"
    groups: int | None = None
    substitutes: bool = True


class Fitter:
    """Fits the chains of plans, and remembers them; ``refused`` has the sites without good factors, with reasons.

    The same plan gives the same chains each time.
    """

    def __init__(self, original: Original, evidence: Evidence | None, options: FitOptions, progress: Progress) -> None:
        self._original, self._evidence, self._options, self._progress = original, evidence, options, progress
        self._data = None if evidence is None else evidence.fit_to
        self._units: dict[tuple[_UnitKey, bool], dict[str, Made]] = {}
        self._fitted: dict[tuple[_UnitKey, ...], Fitted] = {}
        self._latest: tuple[tuple[_UnitKey, ...], Any] | None = None
        self.refused: dict[str, str] = {}

    def fit(self, plan: Plan) -> Fitted:
        """Return the chains of a plan, without a model."""
        units = self._units_of(plan)
        key = tuple(_key(unit, plan) for unit in units)
        if key not in self._fitted:
            self._fitted[key] = replace(self._run(plan, units), model=None)
        return self._fitted[key]

    def build(self, plan: Plan) -> Any:
        """Return a copy of the model with the chains of a plan, batch norms re-estimated; the original for none.

        The last one is kept, and no other: models are large.
        """
        units = self._units_of(plan)
        key = tuple(_key(unit, plan) for unit in units)
        if not units:
            return self._original.model
        if self._latest is None or self._latest[0] != key:
            self._latest = None
            fitted = self._fitted.get(key) or self._run(plan, units)
            model = self._finished(fitted) if fitted.model is None else fitted.model
            self._latest, self._fitted[key] = (key, model), replace(fitted, model=None)
        return self._latest[1]

    def build_direct(self, plan: Plan) -> Any:
        """Return what ``build`` does, but fitted to the original's inputs alone, which is quick."""
        units = self._units_of(plan)
        if not units:
            return self._original.model
        made = {name: one for unit in units for name, one in self._fit(unit, plan, self._data).items()}
        return self._finished(Fitted(made, None, way="direct"))

    def chain(self, decision: Decision) -> Chain | None:
        """Return the chain of one site, fitted to the original's inputs; None where there is no good one."""
        made = self._fit(self._original.sites[decision.site], Plan((decision,)), self._data).get(decision.site)
        return None if made is None else made.chain

    def correct(self, changed: Any, fitted: Fitted) -> None:
        """Re-estimate the batch norms of a model with fitted chains, in place."""
        if self._data is not None and fitted.made and fitted.way != "plain":
            self._data.correct(changed, self._progress)

    def latest(self, plan: Plan) -> Any | None:
        """Return the model of a plan if it is the last that was built."""
        key = tuple(_key(unit, plan) for unit in self._units_of(plan))
        return self._latest[1] if self._latest is not None and self._latest[0] == key else None

    def in_groups(self, count: int) -> bool:
        """Whether so many sites are fitted in more than one group."""
        return self._data is not None and len(self._data.groups(count, self._options.groups)) > 1

    def _units_of(self, plan: Plan) -> list[Site]:
        chosen = [site for name, site in self._original.sites.items() if not plan[name].dense]
        return join(chosen, joint_groups(plan))

    def _run(self, plan: Plan, units: Sequence[Site]) -> Fitted:
        """Return the chains of all units, by the loop where there are data to fit to, and with the model if it has."""
        if self._data is None or self._evidence is None:
            return self._without_data(plan, units)
        data = self._data
        names = [frozenset({unit.name} if data.fits(unit) else ()) for unit in units]

        def fit(at: int, seen: SiteData | None) -> dict[str, Made]:
            return self._fit(units[at], plan, seen)

        loop = Fitting(data, self._evidence.held_out, names, fit, self._with, self._progress)
        return loop.run(data.groups(len(units), self._options.groups))

    def _without_data(self, plan: Plan, units: Sequence[Site]) -> Fitted:
        made: dict[str, Made] = {}
        for done, unit in enumerate(units):
            self._progress("factor", done, len(units))
            made |= self._fit(unit, plan, None)
        self._progress("factor", len(units), len(units))
        return Fitted(made, None, way="plain")

    def _fit(self, unit: Site, plan: Plan, data: SiteData | None) -> dict[str, Made]:
        """Return the chains of the members of a unit; those fitted to the original's inputs, or to none, are kept."""
        if data is not None and data is not self._data:
            return self._factored(unit, plan, data)
        key = _key(unit, plan), data is not None
        if key not in self._units:
            self._units[key] = self._factored(unit, plan, data)
        return self._units[key]

    def _factored(self, unit: Site, plan: Plan, data: SiteData | None) -> dict[str, Made]:
        decision = plan[unit.name]
        made = factor_site(unit, decision, self._options.solver, data)
        if isinstance(made, Refusal) and self._options.substitutes:
            made = substitute(unit, decision, made, data)
        if isinstance(made, Refusal):
            self.refused[unit.name] = made.reason
            return {}
        return made

    def _with(self, made: Mapping[str, Made]) -> Any:
        return self._original.with_chains({name: one.chain for name, one in made.items()})

    def _finished(self, fitted: Fitted) -> Any:
        model = self._with(fitted.made)
        self.correct(model, fitted)
        return model


def _key(unit: Site, plan: Plan) -> _UnitKey:
    decision = plan[unit.name]
    return tuple(site.name for site in unit.members), decision.factorization or "", decision.rank or ()
