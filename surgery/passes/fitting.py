"""Fitting in groups, the one loop that does it: chains of the sites of a model, judged on samples that no fit has seen.

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
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from surgery.passes.factoring import Made
from surgery.passes.held_out import HeldOut
from surgery.passes.site_data import SiteData
from surgery.plans.planner import Progress

__all__ = ["Fitted", "Fitting", "Way"]

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
        tries = [self._tried(grouped, "grouped")]
        if any(grouped[name] is not direct.get(name) for name in grouped):
            tries.append(self._tried(direct, "direct"))
        if any(self.units):
            tries.append(self._plain())
        self.progress("fit", len(self.units), len(self.units))
        if len(tries) == 1:
            return tries[0]
        errors = [self.held_out.error(tried.model)[0] for tried in tries]
        return tries[min(range(len(tries)), key=lambda at: errors[at] if math.isfinite(errors[at]) else math.inf)]

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
        grouped: dict[str, Made] = {}
        kept: dict[str, Made] = {}  # what the last check has kept, and direct chains since then
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
