"""``auto``: the plan of the fastest model on this machine that keeps a promise, checked end to end.

    moments -> options of each site (damage, cost) -> one choice for all within a budget -> data-aware factors
    -> measure the whole model -> scale the budget, until the measured value is as near to its limit as it gets

The finished model and the original are timed as files, each in new processes; if it is not faster with confidence, the
plan leaves all sites dense.

The judgement on a model that a search has found: the promise as measured, and the metric before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from surgery.cost.timing import MARGIN
from surgery.data.samples import samples_in
from surgery.passes.choices import ChoicePlans, Pricing, list_options
from surgery.passes.clock import Clock, Speeds
from surgery.passes.damages import Damages, OpenEffects, open_effects
from surgery.passes.evidence import PROMISED_SHARE, Evidence
from surgery.passes.fitting import Fitter
from surgery.passes.metrics import drop_of, scores_of
from surgery.passes.original import Original
from surgery.passes.results import Promise, Search
from surgery.passes.search import DRIFT, QualitySearch, SpeedSearch, Yardstick, is_dense
from surgery.plans.choose import Trial, frontier
from surgery.plans.goal import Goal
from surgery.plans.options import Option, Options
from surgery.plans.plan import Plan
from surgery.runtime.bench import Timing
from surgery.sites import Site
from surgery.system.progress import Progress, silent
from surgery.text import RUIN

__all__ = [
    "ByPromise",
    "Searched",
    "Judge",
    "Judged",
    "PromiseEvidence",
    "PromisedPlan",
    "held_out_share",
    "promise_of_original",
]


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search has found: the options with their damages, the trials, the choice, and its timing if it has one.

    ``reached`` has the speed-up and the output error of each whole model that was measured for a promised speed-up.
    """

    sites: Sequence[Options] = ()
    trials: tuple[Trial, ...] = ()
    chosen: tuple[Option, ...] = ()
    timing: Timing | None = None
    reached: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Judged:
    """The promise, the metric of the original and of the model if there is one, and the model's output error."""

    promise: Promise
    metrics: tuple[float, float] | None
    error: float

    @property
    def ruined(self) -> bool:
        """Whether a model is so fast only because its outputs have little left of the original's."""
        return self.promise.kind == "target_speedup" and self.error > RUIN

    @property
    def missed(self) -> str:
        """Why a target is not kept: it is out of reach, it would ruin the model, or the machine is too busy to tell."""
        promise = self.promise
        if self.ruined and promise.kept:
            what = f"{promise.measured:.3g} was measured, but at an output error of {self.error:.3g}, above {RUIN:g}"
            return f"the target is out of reach: {what}, which ruins a model (best effort takes it)"
        measured = f"{promise.measured:.3g} was measured, at an output error of {self.error:.3g}"
        if promise.measured < promise.limit:
            return f"the target is out of reach: {measured}"
        return f"no timing was sure of the target: {measured}, but {promise.note}; a quieter machine may tell"


@dataclass(eq=False)
class Judge:
    """Judges models by a goal, on the samples of the evidence."""

    goal: Goal
    original: Original
    evidence: Evidence

    @cached_property
    def scores(self) -> Tensor | None:
        """The metric of the original, measured once."""
        return None if self.goal.metric is None else scores_of(self.original.model, self.goal.metric)

    def judge(self, model: Any, timing: Timing | None) -> Judged:
        """Return the judgement on a model and its timing against the original."""
        error, upper = self.evidence.held_out.error(model)
        metrics, drop, most = None, 0.0, 0.0
        if self.goal.metric is not None and self.scores is not None:
            scores = scores_of(model, self.goal.metric)
            metrics = float(self.scores.mean()), float(scores.mean())
            drop, most = drop_of(self.scores, scores)
        if self.goal.kind == "target_speedup":
            assert timing is not None  # its search has timed it
            return Judged(self._speed(timing), metrics, error)
        if self.goal.kind == "max_drop":
            note = f"at most {most:.3g} with 95 %" if most > drop else ""
            return Judged(self._promise(drop, most <= self.goal.limit, note), metrics, error)
        worth = f"; seen on {self.evidence.made_up} alone: give calibration data for a promise on yours"
        note = f"at most {upper:.3g} with 95 %{worth * bool(self.evidence.made_up)}"
        return Judged(self._promise(error, upper <= self.goal.limit, note), metrics, error)

    def _speed(self, timing: Timing) -> Promise:
        found, limit = timing.comparisons[0], self.goal.limit
        short = f", short by {limit - found.speedup:.2f}" if found.speedup < limit else ""
        batch = samples_in(self.original.model, self.original.inputs)
        least = found.low / DRIFT
        note = f"at least {least:.3g} with 97.5 %{short}, in new processes, at a batch of {batch}; other batches differ"
        return self._promise(found.speedup, least >= limit, note)

    def _promise(self, measured: float, kept: bool, note: str) -> Promise:
        return Promise(self.goal.kind, self.goal.limit, measured, kept, note)


def promise_of_original(goal: Goal, reason: str) -> Promise:
    """Return the promise as the original keeps it: of quality always, of speed only where nothing is asked for."""
    fast = goal.kind == "target_speedup"
    return Promise(goal.kind, goal.limit, float(fast), not fast or goal.limit == 1, f"the original: {reason}")


@dataclass(frozen=True, eq=False)
class PromiseEvidence:
    """What a promise is searched with: the original, what its samples say, what fits, and what times whole models.

    ``reasons`` has the sites that stay dense in any case.
    """

    original: Original
    evidence: Evidence
    fitter: Fitter
    clock: Clock
    reasons: Mapping[str, str] = field(default_factory=dict)
    open_effects: OpenEffects = open_effects


@dataclass(frozen=True, eq=False)
class PromisedPlan:
    """A plan that keeps a promise, or leaves all sites dense; the promise as measured, and how it was searched for."""

    plan: Plan
    promise: Promise
    search: Search


def held_out_share(goal: Goal) -> float | None:
    """Return the share of the samples to judge by; None is the usual one."""
    return PROMISED_SHARE if goal.kind == "max_error" else None


@dataclass(frozen=True)
class ByPromise:
    """The planner that keeps a goal."""

    goal: Goal
    pricing: Pricing
    margin: float = MARGIN
    progress: Progress = silent

    def propose(self, sites: Sequence[Site], evidence: PromiseEvidence) -> PromisedPlan:
        """Return the plan of the fastest model that keeps the promise on held-out samples, or all sites dense.

        With it come the promise as measured, and how it was searched for.

        Raises:
            InputError: calibration inputs or a metric that cannot be used, as ``collect`` and ``scores_of`` say.
        """
        data, known = evidence.evidence.data, evidence.reasons
        assert data is not None  # there is no promise without moments
        listed = list_options((s for s in sites if s.name not in known), data, self.pricing, self.progress)
        plans = ChoicePlans(
            {site.name: site for site in sites},
            listed.sites,
            dict(known) | listed.reasons,
            self.goal,
            held_out=held_out_share(self.goal),
        )
        if not listed.sites:
            return self._original(plans, "no site has a chain that costs less", Searched())
        damages = Damages(
            listed.sites,
            evidence.evidence,
            evidence.fitter,
            open_effects=evidence.open_effects,
            progress=self.progress,
        )
        judge = Judge(self.goal, evidence.original, evidence.evidence)
        speeds = Speeds(evidence.original, damages, evidence.clock)
        search = self._for_speed if self.goal.kind == "target_speedup" else self._for_quality
        found = search(evidence, plans, damages, speeds, judge)
        return self._decided(evidence, plans, found, speeds, judge)

    def _for_quality(
        self, evidence: PromiseEvidence, plans: ChoicePlans, damages: Damages, speeds: Speeds, judge: Judge
    ) -> Searched:
        """Return the choice of the largest budget of damage that keeps the limit, and its timing."""
        trials, chosen = QualitySearch(damages, plans, evidence.fitter, self._yardstick(evidence, judge)).run()
        found = Searched(damages.sites, tuple(trials), tuple(chosen))
        if not self.pricing.prices.measured or is_dense(chosen):
            return found
        model = evidence.fitter.build(plans.plan(chosen))
        timing = evidence.clock.time(model, final=not evidence.evidence.made_up)
        return Searched(found.sites, found.trials, found.chosen, timing)

    def _yardstick(self, evidence: PromiseEvidence, judge: Judge) -> Yardstick:
        """Return what to measure of a model, its limit, by which power of the budget it grows, and the first budget."""
        # The error is the root of the damage: it grows with the power 1/2 of the budget, and the budget of an error of
        # 0.05 is 0.0025. A drop is taken to grow with the budget itself, from that of an error of 0.1 on.
        limit, metric, before = self.goal.limit, self.goal.metric, judge.scores
        if self.goal.kind == "max_error" or metric is None or before is None:
            held_out = evidence.evidence.held_out
            return Yardstick(lambda model: held_out.error(model)[1], limit, 0.5, limit**2)
        return Yardstick(lambda model: drop_of(before, scores_of(model, metric))[1], limit, 1.0, 0.1**2)

    def _for_speed(
        self, evidence: PromiseEvidence, plans: ChoicePlans, damages: Damages, speeds: Speeds, judge: Judge
    ) -> Searched:
        """Return the choice of least damage that is as fast as is asked for, or the fastest, and its timing."""
        search = SpeedSearch(
            damages,
            plans,
            evidence.fitter,
            speeds,
            evidence.clock,
            held_out=evidence.evidence.held_out,
            margin=self.margin,
        )
        trials, chosen, timing = search.run(self.goal.limit)
        return Searched(damages.sites, tuple(trials), tuple(chosen), timing, search.reached)

    def _decided(
        self, evidence: PromiseEvidence, plans: ChoicePlans, found: Searched, speeds: Speeds, judge: Judge
    ) -> PromisedPlan:
        """Return the chosen plan with all that is known of its model; all dense if it did not become faster."""
        if is_dense(found.chosen):
            return self._original(plans, "no change keeps the promise", found)
        if found.timing is not None and found.timing.comparisons[0].verdict != "faster":
            speedup = found.timing.comparisons[0]
            span = f"{speedup.speedup:.2f}x, 95 % interval {speedup.low:.2f} to {speedup.high:.2f}"
            return self._original(plans, f"the whole model did not measure faster ({span})", found)
        plan = plans.plan(found.chosen)
        judged = judge.judge(evidence.fitter.build(plan), found.timing)
        if (judged.ruined or not judged.promise.kept) and not self.goal.best_effort:
            return self._original(plans, judged.missed, found)
        predicted = None
        if found.timing is not None:
            predicted = speeds.expected(found.chosen, found.timing.models[0].median_s)
        at = (sum(o.damage for o in found.chosen) ** 0.5, sum(o.cost for o in found.chosen))
        search = replace(
            self._search(found), chosen=at, metrics=judged.metrics, timing=found.timing, predicted=predicted
        )
        return PromisedPlan(plan, judged.promise, search)

    def _original(self, plans: ChoicePlans, reason: str, found: Searched) -> PromisedPlan:
        """Return the plan that changes nothing; a goal of quality is kept by it, one of speed is not."""
        return PromisedPlan(plans.dense(reason), promise_of_original(self.goal, reason), self._search(found))

    def _search(self, found: Searched) -> Search:
        return Search(_points(found.sites), trials=found.trials, cost=self.pricing.prices.what, reached=found.reached)


def _points(sites: Sequence[Options]) -> tuple[tuple[float, float], ...]:
    return tuple((damage**0.5, cost) for damage, cost in frontier(sites)) if sites else ()
