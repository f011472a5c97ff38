"""Fitting in stages, the one loop that does it: chains of the sites of a model, judged on samples that no fit has seen.

    for each stage of sites, in graph order
        fit its chains to the original's inputs                                     (clean)
        fit them again to what the model gives them behind the stages before it     (staged)
        at each check: keep the staged ones if the model's output is nearer to the original's with them
    answer: staged, clean or, at the same ranks without any data, plain, whichever has the least output error

So data never make a model worse on held-out samples than none, nor stages than fits to the original's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from surgery.algebra.chain import Chain
from surgery.data.collect import Progress
from surgery.data.samples import Calibration
from surgery.errors import InputError
from surgery.passes.factoring import SiteData
from surgery.passes.goals import HeldOut

__all__ = ["Fitted", "Fitting", "judged"]

_PROMISED, _JUDGED, _ENOUGH = 0.25, 0.125, 16  # shares of the samples; samples
_PARTS = 4  # of the stages, with a check against the clean fits between each two; it builds two models


def judged(samples: Calibration, *, promised: bool = False) -> tuple[Calibration, Calibration]:
    """Return samples to fit to, and others to judge by; both are all of them where they are too few for two parts.

    The more there are to fit to, the better is the fit. A quarter is to judge by where an error is ``promised``, since
    its confidence limit needs them; else an eighth, or as many more as make sixteen.
    """
    few = min(_PROMISED, max(_JUDGED, _ENOUGH / samples.count))
    try:
        return samples.split(_PROMISED if promised else few)
    except InputError:
        return samples, samples


class _HasChain(Protocol):
    @property
    def chain(self) -> Chain:
        """The chain of a site."""


_Made = TypeVar("_Made", bound=_HasChain)


@dataclass(frozen=True, eq=False)
class Fitted(Generic[_Made]):
    """What was made for each site, the model with it, and the way: "staged", "clean" or "plain"."""

    made: Mapping[str, _Made]
    model: Any
    way: str


@dataclass(eq=False)
class Fitting(Generic[_Made]):
    """A choice of sites to be fitted.

    ``units`` are the names of the sites of each unit that is fitted to data, in graph order; others have none.
    ``fit(number, data)`` makes a unit's chains by site name, from the weights alone where ``data`` is None, and
    ``build(made)`` a copy of the model with them.
    """

    data: SiteData
    held_out: HeldOut
    units: Sequence[frozenset[str]]
    fit: Callable[[int, SiteData | None], Mapping[str, _Made]]
    build: Callable[[Mapping[str, _Made]], Any]
    progress: Progress
    _clean: dict[int, Mapping[str, _Made]] = field(init=False, default_factory=dict)

    def run(self, stages: Sequence[range], *, plain: bool) -> Fitted[_Made]:
        """Return the best of what was measured; ``plain`` has fits without data at the same ranks compared, too."""
        staged = self._in_stages(stages)
        clean = {name: made for at in range(len(self.units)) for name, made in self._of(at).items()}
        tries = [self._tried(staged, "staged")]
        if any(staged[name] is not clean[name] for name in staged):
            tries.append(self._tried(clean, "clean"))
        if plain and any(self.units):
            tries.append(self.plain())
        self.progress("fit", len(self.units), len(self.units))
        if len(tries) == 1:
            return tries[0]
        errors = [self.held_out.error(tried.model)[0] for tried in tries]
        return tries[min(range(len(tries)), key=lambda at: errors[at] if math.isfinite(errors[at]) else math.inf)]

    def plain(self) -> Fitted[_Made]:
        """Return the chains that are fitted to no data."""
        made = {name: made for at in range(len(self.units)) for name, made in self.fit(at, None).items()}
        return Fitted(made, self.build(made), way="plain")

    def _tried(self, made: Mapping[str, _Made], way: str) -> Fitted[_Made]:
        model = self.build(made)
        self.data.correct(model, self.progress)
        return Fitted(made, model, way=way)

    def _of(self, at: int) -> Mapping[str, _Made]:
        """Return the chains of a unit, fitted to the original's inputs."""
        if at not in self._clean:
            self._clean[at] = self.fit(at, self.data)
        return self._clean[at]

    def _in_stages(self, stages: Sequence[range]) -> dict[str, _Made]:
        """Return the chains after all stages, of which those between two checks stay that have lowered the error."""
        staged: dict[str, _Made] = {}
        fresh: dict[str, _Made] = {}  # what the last check has kept, and clean chains since then
        checks = {round((len(stages) - 1) * i / _PARTS) for i in range(1, _PARTS)} - {0, len(stages) - 1}
        for number, stage in enumerate(stages):
            self.progress("fit", stage.start, len(self.units))
            clean = {name: made for at in stage for name, made in self._of(at).items()}
            names = frozenset().union(*(self.units[at] for at in stage))
            if staged and names:
                seen = self.data.behind(self.build(staged), names)
                staged |= {name: made for at in stage for name, made in self._behind(at, seen).items()}
            else:
                staged |= clean
            fresh |= clean
            if number in checks and any(staged[name] is not fresh[name] for name in staged):
                staged = staged if self._error(staged) < self._error(fresh) else fresh
                fresh = dict(staged)
        return staged

    def _behind(self, at: int, seen: SiteData) -> Mapping[str, _Made]:
        return self.fit(at, seen) if self.units[at] else self._of(at)

    def _error(self, made: Mapping[str, _Made]) -> float:
        model = self.build(made)
        self.data.correct(model, self.progress)
        return self.held_out.error(model)[0]
