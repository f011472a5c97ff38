"""``auto`` with calibration data: the fastest model on this machine that keeps a promise, checked end to end.

    moments -> options of each site (damage, cost) -> one choice for all within a budget -> data-aware factors
    -> measure the whole model -> scale the budget, until the measured value is as near to its limit as it gets

The finished model is timed against the original, interleaved; if it is not faster with confidence, the answer is the
original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from surgery.allocation.budget import Trial, largest_budget
from surgery.allocation.choose import choose_damage, choose_least_cost, frontier
from surgery.allocation.options import Option
from surgery.benchmark import Timing
from surgery.calibration.inputs import Calibration
from surgery.cost.timing import MARGIN
from surgery.graphs import Found, Model
from surgery.inputs import Inputs
from surgery.passes.goals import TRIALS, Promise, drop_of, scores_of
from surgery.passes.results import Search
from surgery.passes.workshop import Terms, Workshop
from surgery.plans import Plan
from surgery.ranks.planning import Progress

__all__ = ["Negotiated", "Terms", "negotiate"]

_SKETCHES, _BUILDS = 8, 4  # trials for a speed-up: timed alone, then fitted too
_LEAST_STEP = 0.01  # of the whole latency, from one trial to the next
_AGREE = 0.9  # of the expected speed-up
_NEAR = 1.01  # a speed-up that is above its target by less leaves nothing to gain


@dataclass(frozen=True, eq=False)
class Negotiated:
    """The model, its plan, the weight error of each of its chains, the promise, and how it was searched for."""

    model: Any
    found: Found
    plan: Plan
    errors: dict[str, float]
    promise: Promise
    search: Search


def negotiate(model: Model, inputs: Inputs, samples: Calibration, terms: Terms, progress: Progress) -> Negotiated:
    """Return the fastest model that keeps the promise of the terms on held-out samples, or the original.

    ``inputs`` are those at whose shapes it is to be fast; none for a program that brings its own.

    Raises:
        InputError: calibration inputs or a metric that cannot be used, as ``collect`` and ``scores_of`` say.
    """
    work = Workshop(model, inputs, samples, terms, progress)
    if not work.sites:
        return _original(work, "no site has a chain that costs less")
    trials, chosen, timing = _for_speed(work) if terms.goal.kind == "target_speedup" else _for_quality(work)
    if all(option.factorization is None for option in chosen):
        return _original(work, "no change keeps the promise", trials)
    done = _finish(work, chosen, trials, timing)
    return replace(done, model=work.change(chosen)) if terms.inplace and done.errors else done


def _for_quality(work: Workshop) -> tuple[list[Trial], list[Option], Timing | None]:
    """Return the trials, the choice of the largest budget of damage that keeps the limit, and its timing."""
    value, limit, power, start = _quality(work)
    work.settle(lambda: choose_least_cost(work.sites, start))
    most = sum(max(option.damage for option in site.options) for site in work.sites)
    done = largest_budget(
        lambda budget: value(work.build(choose_least_cost(work.sites, budget))),
        limit=limit,
        start=start,
        most=most,
        power=power,
        trials=TRIALS,
    )
    kept = [trial.budget for trial in done if trial.kept]
    chosen = choose_least_cost(work.sites, max(kept, default=0.0))
    timed = work.terms.prices.measured and any(option.factorization is not None for option in chosen)
    return done, chosen, work.time(work.build(chosen)) if timed else None


def _quality(work: Workshop) -> tuple[Callable[[Any], float], float, float, float]:
    """Return what to measure of a model, its limit, by which power of the budget it grows, and the first budget."""
    goal = work.terms.goal
    if goal.kind == "max_error":
        return (lambda model: work.held_out.error(model)[1]), goal.limit, 0.5, goal.limit**2
    evaluate, before = work.terms.evaluate, work.scores
    assert evaluate is not None  # Goal.of has seen to it
    assert before is not None
    return (lambda model: drop_of(before, scores_of(model, evaluate))[1]), goal.limit, 1.0, 0.1**2


def _for_speed(work: Workshop) -> tuple[list[Trial], list[Option], Timing | None]:
    """Return the trials, the choice of least damage that is as fast as is asked for (or the fastest), and its timing.

    Of models that no timing tells apart that of less damage stays, unless the other is fast enough. Only what passes
    without values is fitted, and timed as it is. It passes by a margin, since timings of another hour differ.
    """
    goal = work.terms.goal.limit
    done, limit, chosen = _sketched(work, goal * (1 + MARGIN))
    least = sum(option.cost for option in _fastest(work))
    best: tuple[float, list[Option], Timing] | None = None
    for _ in range(_BUILDS):
        model = work.build(chosen)
        timing = work.time(model)
        if timing.comparisons[0].speedup < _AGREE * work.expected(chosen, timing.models[0].median_s):
            timing = work.time(model)  # as fast as the model without values, unless it was disturbed
        found = timing.comparisons[0]
        done.append(Trial(limit, found.speedup, found.low >= goal))
        if best is None or done[-1].kept or found.speedup > (1 + MARGIN) * best[0]:
            best = found.speedup, chosen, timing
        if done[-1].kept or limit <= least:
            break
        missing = work.seconds / found.low - work.seconds / goal
        limit -= max(missing, _LEAST_STEP * work.seconds)
        chosen = _choose(work, limit)
    assert best is not None  # there is at least one trial
    return done, best[1], best[2]


def _sketched(work: Workshop, goal: float) -> tuple[list[Trial], float, list[Option]]:
    """Return trials of costs, the largest cost of all sites at which the whole model was as fast as asked for, and how.

    Where it never was, that of least damage of those that no timing tells from the fastest.
    """
    total = work.seconds
    dense = sum(site.dense.cost for site in work.sites)
    limit = dense - (total - total / goal)
    low, high = sum(option.cost for option in _fastest(work)), dense
    done: list[Trial] = []
    passed: tuple[float, list[Option]] | None = None
    for _ in range(_SKETCHES):
        limit = min(high, max(low, limit))
        work.settle(partial(_choose, work, limit))
        chosen = _choose(work, limit)
        found = work.compare(chosen, goal)
        done.append(Trial(limit, found.speedup, found.low >= goal))
        low, high = (limit, high) if done[-1].kept else (low, limit)
        passed = (limit, chosen) if done[-1].kept else passed  # at a larger cost than the last that did
        if high - low < _LEAST_STEP * total or goal <= found.low < _NEAR * goal:
            break
        spare = total / goal - total / found.low
        spare = spare if done[-1].kept else min(spare, -_LEAST_STEP / 2 * total)
        limit += spare if low < limit + spare < high else (low + high) / 2 - limit
    limit = (1 + MARGIN) * low
    return done, *(passed or (limit, _choose(work, limit)))


def _choose(work: Workshop, cost: float) -> list[Option]:
    return choose_damage(work.sites, cost) or _fastest(work)


def _fastest(work: Workshop) -> list[Option]:
    return [min(site.options, key=lambda option: option.cost) for site in work.sites]


def _finish(work: Workshop, chosen: Sequence[Option], trials: Sequence[Trial], timing: Timing | None) -> Negotiated:
    """Return the chosen model with all that is known of it; the original if it did not become faster."""
    model = work.build(chosen)
    if timing is not None and timing.comparisons[0].verdict != "faster":
        speedup = timing.comparisons[0]
        span = f"{speedup.speedup:.2f}x, 95 % interval {speedup.low:.2f} to {speedup.high:.2f}"
        return _original(work, f"the whole model did not measure faster ({span})", trials)
    errors = work.weight_errors(chosen)
    plan = work.plan(chosen)
    promise, metrics = _judge(work, model, timing)
    at = (sum(o.damage for o in chosen) ** 0.5, sum(o.cost for o in chosen))
    predicted = None if timing is None else work.expected(chosen, timing.models[0].median_s)
    search = replace(_search(work, trials), chosen=at, metrics=metrics, timing=timing, predicted=predicted)
    return Negotiated(model, work.found, plan, errors, promise, search)


def _judge(work: Workshop, model: Any, timing: Timing | None) -> tuple[Promise, tuple[float, float] | None]:
    goal = work.terms.goal
    metrics, drop, most = None, 0.0, 0.0
    if work.terms.evaluate is not None and work.scores is not None:
        scores = scores_of(model, work.terms.evaluate)
        metrics = float(work.scores.mean()), float(scores.mean())
        drop, most = drop_of(work.scores, scores)
    if goal.kind == "target_speedup":
        assert timing is not None  # Goal.of has seen to it
        found = timing.comparisons[0]
        short = f", short by {goal.limit - found.speedup:.2f}" if found.speedup < goal.limit else ""
        note = f"at least {found.low:.3g} with 97.5 %{short}"
        return Promise(goal.kind, goal.limit, found.speedup, found.low >= goal.limit, note), metrics
    if goal.kind == "max_drop" and metrics is not None:
        note = f"at most {most:.3g} with 95 %" if most > drop else ""
        return Promise(goal.kind, goal.limit, drop, most <= goal.limit, note), metrics
    error, upper = work.held_out.error(model)
    return Promise(goal.kind, goal.limit, error, upper <= goal.limit, f"at most {upper:.3g} with 95 %"), metrics


def _original(work: Workshop, reason: str, trials: Sequence[Trial] = ()) -> Negotiated:
    """Return the model as it was, with the reason; a goal of quality is kept by it, one of speed is not."""
    work.reasons |= {site.site.name: reason for site in work.sites if site.site.name not in work.reasons}
    goal = work.terms.goal
    fast = goal.kind == "target_speedup"
    promise = Promise(goal.kind, goal.limit, float(fast), not fast or goal.limit == 1, f"the original: {reason}")
    return Negotiated(work.model, work.found, work.plan(()), {}, promise, _search(work, trials))


def _search(work: Workshop, trials: Sequence[Trial]) -> Search:
    points = tuple((damage**0.5, cost) for damage, cost in frontier(work.sites)) if work.sites else ()
    return Search(points, trials=tuple(trials), cost=work.terms.prices.what)
