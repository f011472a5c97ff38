"""The judgement on a model that a search has found: the promise as measured, and the metric before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from surgery.data.samples import samples_in
from surgery.passes.evidence import Evidence
from surgery.passes.metrics import drop_of, scores_of
from surgery.passes.original import Original
from surgery.passes.promised import Promise
from surgery.passes.speed_search import DRIFT
from surgery.plans.bisection import Trial
from surgery.plans.goal import Goal
from surgery.plans.options import Option, Options
from surgery.runtime.bench import Timing

__all__ = ["Found", "Judge", "Judged", "promise_of_original"]


@dataclass(frozen=True, eq=False)
class Found:
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
    def missed(self) -> str:
        """Why a target is not kept: it is out of reach, or the machine too busy to tell."""
        promise = self.promise
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
