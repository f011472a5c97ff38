"""Fit the chains of a plan: the one loop that fits groups of sites, judged on samples that no fit saw.

    for each group of sites, in graph order
        fit its chains to the original's inputs                                              (direct)
        fit them again to the inputs that they receive after the earlier groups are factored (grouped)
        at each check: keep the grouped ones if the model's output is nearer to the original's with them
    answer: grouped, direct or, at the same ranks without any data, plain, whichever has the least output error

So data never make a model worse on held-out samples than none, nor groups than fits to the original's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

from surgery.algebra import Chain
from surgery.errors import Refusal
from surgery.factorizations import Ranks
from surgery.passes.evidence import Evidence, HeldOut
from surgery.passes.factoring import Made, SiteData, factor_site, substitute
from surgery.passes.original import Original
from surgery.plans.plan import Decision, Plan
from surgery.plans.rules import join, joint_groups
from surgery.sites import Site
from surgery.system.memory import give_back
from surgery.system.progress import Progress
from surgery.system.recent import Recent

__all__ = ["FitOptions", "Fitted", "Fitter", "Fitting", "Way"]

_PARTS = 4  # of the groups, with a check against the direct fits between each two; it builds two models

Way: TypeAlias = Literal["grouped", "direct", "plain"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was made for each site, the model with it if it was built, and the way."""

    made: Mapping[str, Made]
    model: Any
    way: Way


@dataclass(eq=False)
class Fitting:
    """A choice of sites to be fitted.

    ``units`` are the names of the sites of each unit that is fitted to data, in graph order; others have none.
    ``fit(number, data)`` makes a unit's chains by site name, from the weights alone where ``data`` is None, and
    ``build(made)`` a copy of the model with them.
    """

    data: SiteData
    held_out: HeldOut
    units: Sequence[frozenset[str]]
    fit: Callable[[int, SiteData | None], Mapping[str, Made]]
    build: Callable[[Mapping[str, Made]], Any]
    progress: Progress
    _direct: dict[int, Mapping[str, Made]] = field(init=False, default_factory=dict)

    def run(self, groups: Sequence[range]) -> Fitted:
        """Return the best of what was measured: grouped fits, direct fits, and fits without data."""
        grouped = self._in_groups(groups)
        direct = {name: made for at in range(len(self.units)) for name, made in self._of(at).items()}
        self._direct.clear()
        tries: list[Callable[[], Fitted]] = [self._plain] if any(self.units) else []
        if any(grouped[name] is not direct.get(name) for name in grouped):
            tries.append(partial(self._tried, direct, "direct"))
        tries.append(partial(self._tried, grouped, "grouped"))
        del grouped, direct
        self.progress("fit", len(self.units), len(self.units))
        if len(tries) == 1:
            return tries[0]()
        # One model after another is made and measured, from the last to the first; only the best so far is held.
        best, least = None, math.inf
        while tries:
            tried = tries.pop()()
            error = self.held_out.error(tried.model)[0]
            if best is None or error < least:
                best, least = tried, error if math.isfinite(error) else math.inf
            del tried
        assert best is not None
        return best

    def _plain(self) -> Fitted:
        """Return the chains that are fitted to no data."""
        made = {name: made for at in range(len(self.units)) for name, made in self.fit(at, None).items()}
        return Fitted(made, self.build(made), way="plain")

    def _tried(self, made: Mapping[str, Made], way: Way) -> Fitted:
        model = self.build(made)
        self.data.correct(model, self.progress)
        return Fitted(made, model, way=way)

    def _of(self, at: int) -> Mapping[str, Made]:
        """Return the chains of a unit, fitted to the original's inputs."""
        if at not in self._direct:
            self._direct[at] = self.fit(at, self.data)
        return self._direct[at]

    def _in_groups(self, groups: Sequence[range]) -> dict[str, Made]:
        """Return the chains after all groups, of which those between two checks stay that have lowered the error."""
        # Invariant: ``grouped`` and ``kept`` have the chains of the same sites, and are alike up to the last check.
        # Since then ``kept`` has direct fits, so that a check compares the two ways of fitting what came in between.
        grouped: dict[str, Made] = {}
        kept: dict[str, Made] = {}  # what the last check has kept, and direct chains since then
        # Example of 9 groups: after the groups 2, 4 and 6; the last is judged with all ways at the end.
        checks = {round((len(groups) - 1) * i / _PARTS) for i in range(1, _PARTS)} - {0, len(groups) - 1}
        for number, group in enumerate(groups):
            self.progress("fit", group.start, len(self.units))
            direct = {name: made for at in group for name, made in self._of(at).items()}
            names = frozenset().union(*(self.units[at] for at in group))
            if grouped and names:
                seen = self.data.after(self.build(grouped), names)
                grouped |= {name: made for at in group for name, made in self._after(at, seen).items()}
            else:
                grouped |= direct
            kept |= direct
            if number in checks and any(grouped[name] is not kept.get(name) for name in grouped):
                grouped = grouped if self._error(grouped) < self._error(kept) else kept
                kept = dict(grouped)
        return grouped

    def _after(self, at: int, seen: SiteData) -> Mapping[str, Made]:
        return self.fit(at, seen) if self.units[at] else self._of(at)

    def _error(self, made: Mapping[str, Made]) -> float:
        model = self.build(made)
        self.data.correct(model, self.progress)
        return self.held_out.error(model)[0]


_HELD = 2**25  # bytes of chains that are always kept; of larger models, as many as a quarter of the weights

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
    """Fits the chains of plans, and remembers the latest; ``refused`` has the sites without good factors, with reasons.

    The same plan gives the same chains each time.
    """

    def __init__(self, original: Original, evidence: Evidence | None, options: FitOptions, progress: Progress) -> None:
        self._original, self._evidence, self._options, self._progress = original, evidence, options, progress
        self._data = None if evidence is None else evidence.fit_to
        weights = sum(site.operator.weight.nbytes for site in original.sites.values())
        most = max(_HELD, weights // 4)
        self._units: Recent[tuple[_UnitKey, bool], dict[str, Made]] = Recent(most, _bytes_of)
        self._fitted: Recent[tuple[_UnitKey, ...], Fitted] = Recent(most, lambda fitted: _bytes_of(fitted.made))
        self._latest: tuple[tuple[_UnitKey, ...], Any] | None = None
        self.refused: dict[str, str] = {}

    def fit(self, plan: Plan) -> Fitted:
        """Return the chains of a plan, without a model."""
        units = self._units_of(plan)
        key = tuple(_key(unit, plan) for unit in units)
        return self._fitted.get(key, lambda: replace(self._run(plan, units), model=None))

    def build(self, plan: Plan) -> Any:
        """Return a copy of the model with the chains of a plan, batch norms re-estimated; the original for none.

        The last one is kept, and no other: models are large.
        """
        units = self._units_of(plan)
        key = tuple(_key(unit, plan) for unit in units)
        if not units:
            return self._original.model
        if self._latest is None or self._latest[0] != key:
            self._latest = model = None

            def run() -> Fitted:
                nonlocal model
                fitted = self._run(plan, units)
                model = fitted.model
                return replace(fitted, model=None)

            fitted = self._fitted.get(key, run)
            self._latest = key, self._finished(fitted) if model is None else model
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
        return self._units.get(key, lambda: self._factored(unit, plan, data))

    def _factored(self, unit: Site, plan: Plan, data: SiteData | None) -> dict[str, Made]:
        decision = plan[unit.name]
        give_back(unit.operator.weight.nbytes)  # what was used for other sites
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


def _bytes_of(made: Mapping[str, Made]) -> int:
    return sum(operator.weight.nbytes for one in made.values() for operator in one.chain.operators)
