"""``auto``: the fastest model on this machine that keeps a promise, checked end to end, with data or made-up inputs.

    moments -> options of each site (damage, cost) -> one choice for all within a budget -> data-aware factors
    -> measure the whole model -> scale the budget, until the measured value is as near to its limit as it gets

The finished model and the original are timed as files, each in new processes; if it is not faster with confidence, the
answer is the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from surgery.cost.timing import MARGIN
from surgery.data.samples import Calibration, samples_in
from surgery.data.standin import StandIn, stand_in
from surgery.errors import InputError
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import Model
from surgery.passes.goals import TRIALS, Goal, Promise, Seen, drop_of, scores_of
from surgery.passes.results import Search
from surgery.passes.terms import Asked, Terms
from surgery.passes.workshop import Workshop
from surgery.plans.bisection import Trial, largest_budget
from surgery.plans.choose import choose_damage, choose_least_cost, frontier
from surgery.plans.options import Option
from surgery.plans.plan import Decision, Plan
from surgery.plans.planning import Progress
from surgery.runtime.bench import Timing
from surgery.sites.placement import Found

__all__ = ["Asked", "Negotiated", "Terms", "negotiate", "negotiate_blind"]

_STAGED = 2  # trials for a limit that are fitted in stages, of all
_SKETCHES, _BUILDS = 3, 3  # trials for a speed-up: timed with random factors, then fitted too
_FAR, _MOST = 1.15, 8  # a speed-up that is so many times its target, or none, has more trials to come nearer
_HOPELESS = 5  # trials that are not sure of the target, after which the fastest model is tried
_LEAST_STEP = 0.01  # of the whole latency, from one trial to the next
_AIM = 1.04  # times the target at most: what the first trials are to measure; each that is not sure of it adds as much
_DRIFT = 1.02  # times the target: what a model is seen to be faster at one time, it may not be at another
_NEAR = 1.02  # a speed-up that is above that by less leaves nothing to gain


@dataclass(frozen=True, eq=False)
class Negotiated:
    """The model, its plan, the weight error of each of its chains, the promise, how it was searched for, the error."""

    model: Any
    found: Found
    plan: Plan
    errors: dict[str, float]
    promise: Promise
    search: Search
    seen: Seen | None = None


def negotiate(
    model: Model, inputs: Inputs, samples: Calibration, terms: Terms, progress: Progress, *, made_up: str = ""
) -> Negotiated:
    """Return the fastest model that keeps the promise of the terms on held-out samples, or the original.

    ``inputs`` are those at whose shapes it is to be fast; none for a program that brings its own. ``made_up`` says what
    the samples are if they are no data of the user's.

    Raises:
        InputError: calibration inputs or a metric that cannot be used, as ``collect`` and ``scores_of`` say.
    """
    goal = terms.goal
    if goal.kind == "target_speedup" and not terms.prices.measured:
        raise InputError(f"target_speedup with cost={terms.asked.cost!r}", allowed="cost='latency'")
    work = Workshop(model, inputs, samples, terms, progress, made_up)
    if not work.sites:
        return _original(work, "no site has a chain that costs less")
    trials, chosen, timing = _for_speed(work) if goal.kind == "target_speedup" else _for_quality(work)
    if all(option.factorization is None for option in chosen):
        return _original(work, "no change keeps the promise", trials)
    done = _finish(work, chosen, trials, timing)
    if not done.promise.kept and not terms.asked.best_effort:
        return _original(work, _missed(done), trials)
    return replace(done, model=work.change(chosen)) if terms.asked.inplace and done.errors else done


def negotiate_blind(
    model: Model, inputs: Inputs, ruled: tuple[Found, Plan], terms: Terms, progress: Progress
) -> Negotiated:
    """Return what ``negotiate`` does, without data: for the sites of the plan of a rule, on made-up inputs.

    The original where the plan has no site, or nothing can be made up.
    """
    found, plan = ruled
    if all(decision.dense for decision in plan):
        reason = "no site has a chain that measured faster"
    else:
        made = stand_in(model, inputs, found, progress=progress)
        if isinstance(made, StandIn):
            terms = replace(terms, ruled=plan)
            return negotiate(model, inputs, made.samples, terms, progress, made_up=made.what)
        reason = f"nothing shows what its outputs would be, since {made.reason}; give calibration data"
    dense = [d if d.dense else _without(d, reason) for d in plan]
    promise = _promise_of_original(terms.goal, reason)
    return Negotiated(model, found, Plan(tuple(dense), ranks="auto"), {}, promise, Search(cost=terms.prices.what))


def _without(decision: Decision, reason: str) -> Decision:
    bare = replace(decision, factorization=None, rank=None, joint=None, error=None, reason=reason)
    return replace(bare, parameters=None, macs=None, latency=None)


def _for_quality(work: Workshop) -> tuple[list[Trial], list[Option], Timing | None]:
    """Return the trials, the choice of the largest budget of damage that keeps the limit, and its timing."""
    value, limit, power, start = _quality(work)
    work.settle(lambda: choose_least_cost(work.sites, start))
    most = sum(max(option.damage for option in site.options) for site in work.sites)

    def search(build: Callable[[Sequence[Option]], Any], start: float, trials: int) -> list[Trial]:
        def measure(budget: float) -> float:
            return value(build(choose_least_cost(work.sites, budget)))

        return largest_budget(measure, limit=limit, start=start, most=most, power=power, trials=trials)

    if not work.staged:
        done = search(work.build, start, TRIALS)
    else:  # fits in stages take long, and lower the value: they are tried from where other fits get
        rough = search(work.rough, start, TRIALS - _STAGED)
        near = max((trial.budget for trial in rough if trial.kept), default=min(trial.budget for trial in rough))
        done = search(work.build, near, _STAGED)
    kept = [trial.budget for trial in done if trial.kept]
    chosen = choose_least_cost(work.sites, max(kept, default=0.0))
    timed = work.terms.prices.measured and any(option.factorization is not None for option in chosen)
    return done, chosen, work.clock.time(work.build(chosen), final=not work.made_up) if timed else None


def _quality(work: Workshop) -> tuple[Callable[[Any], float], float, float, float]:
    """Return what to measure of a model, its limit, by which power of the budget it grows, and the first budget."""
    goal = work.terms.goal
    if goal.kind == "max_error":
        return (lambda model: work.held_out.error(model)[1]), goal.limit, 0.5, goal.limit**2
    evaluate, before = work.terms.asked.evaluate, work.scores
    assert evaluate is not None  # Goal.of has seen to it
    assert before is not None
    return (lambda model: drop_of(before, scores_of(model, evaluate))[1]), goal.limit, 1.0, 0.1**2


def _for_speed(work: Workshop) -> tuple[list[Trial], list[Option], Timing | None]:
    """Return the trials, the choice of least damage that is as fast as is asked for (or the fastest), and its timing.

    Choices are timed with factors of random values; what passes is fitted, and timed once more and for longer. Where
    that misses the target, more is saved.
    """
    goal, seconds = _DRIFT * work.terms.goal.limit, work.clock.seconds
    sketches = _sketched(work, goal)
    done = [trial for trial, _ in sketches]
    # no timing tells what is above this by less from the fastest
    least = (1 + MARGIN) * sum(option.cost for option in _fastest(work))
    limit = max((trial.budget for trial in done if trial.kept), default=least)
    best: tuple[Trial, list[Option], Timing] | None = None
    for _ in range(_BUILDS):
        chosen = _choose(work, limit)
        if best is not None and chosen == best[1]:
            break
        timing = work.clock.time(work.build(chosen), goal=goal, final=True)
        found = timing.comparisons[0]
        done.append(trial := Trial(limit, found.speedup, found.low >= goal))
        work.reach(chosen, found.speedup)
        if best is None or trial.kept or trial.value > best[0].value:
            best = trial, chosen, timing
        if trial.kept or limit <= least:
            break
        limit = max(least, limit + min(seconds / goal - seconds / found.low, -_LEAST_STEP * seconds))
    assert best is not None  # there is at least one trial
    if not best[0].kept:
        for trial, chosen in sketches:
            work.reach(chosen, trial.value)
    return done, best[1], best[2]


def _sketched(work: Workshop, goal: float) -> list[tuple[Trial, list[Option]]]:
    """Return trials of costs of all sites, with factors of random values, and what was chosen for each.

    They draw near to the largest cost at which the whole model is as fast as asked for. On a noisy machine timings are
    not sure of what is only just fast enough: the next trial is to be faster by a little more than the last was.
    """
    total = work.clock.seconds
    dense = sum(site.dense.cost for site in work.sites)
    limit = dense - (total - total / goal)
    low, high = sum(option.cost for option in _fastest(work)), dense
    done: list[tuple[Trial, list[Option]]] = []
    best, unsure = math.inf, 0  # the least speed-up that was fast enough, and how many trials were not
    while len(done) < (_SKETCHES if best <= _FAR * goal else _MOST):
        limit = low if best == math.inf and unsure == _HOPELESS else min(high, max(low, limit))
        work.settle(partial(_choose, work, limit))
        chosen = _choose(work, limit)
        found = work.compare(chosen, goal)
        done.append((trial := Trial(limit, found.speedup, found.low >= goal), chosen))
        low, high = (limit, high) if trial.kept else (low, limit)
        best, unsure = (min(best, found.speedup), unsure) if trial.kept else (best, unsure + 1)
        aim = goal * min(found.speedup / found.low, _AIM ** (1 + unsure))  # which a timing can tell from the goal
        if high - low < _LEAST_STEP * total or (trial.kept and found.speedup < _NEAR * aim):
            break
        saved = dense - sum(option.cost for option in chosen)
        again = dense - saved * (1 - 1 / aim) / max(1 - 1 / found.speedup, _LEAST_STEP)  # sites save together as here
        again = again if trial.kept else min(again, limit - _LEAST_STEP / 2 * total)
        limit = again if low < again < high else (low + high) / 2
    return done


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
    errors_of_outputs = work.held_out.error(model)
    promise, metrics = _judge(work, model, timing, errors_of_outputs)
    at = (sum(o.damage for o in chosen) ** 0.5, sum(o.cost for o in chosen))
    predicted = None if timing is None else work.expected(chosen, timing.models[0].median_s)
    search = replace(_search(work, trials), chosen=at, metrics=metrics, timing=timing, predicted=predicted)
    seen = Seen(errors_of_outputs[0], work.made_up or f"{work.held_out.count} calibration samples")
    return Negotiated(model, work.found, plan, errors, promise, search, seen)


def _missed(done: Negotiated) -> str:
    """Return why a target is not kept: it is out of reach, or the machine too busy to tell."""
    promise, error = done.promise, done.seen.error if done.seen else math.nan
    measured = f"{promise.measured:.3g} was measured, at an output error of {error:.3g}"
    if promise.measured < promise.limit:
        return f"the target is out of reach: {measured}"
    return f"no timing was sure of the target: {measured}, but {promise.note}; a quieter machine may tell"


def _judge(
    work: Workshop, model: Any, timing: Timing | None, seen: tuple[float, float]
) -> tuple[Promise, tuple[float, float] | None]:
    """Return the promise and the metric before and after; ``seen`` is the output error and its upper limit."""
    goal = work.terms.goal
    metrics, drop, most = None, 0.0, 0.0
    if work.terms.asked.evaluate is not None and work.scores is not None:
        scores = scores_of(model, work.terms.asked.evaluate)
        metrics = float(work.scores.mean()), float(scores.mean())
        drop, most = drop_of(work.scores, scores)
    if goal.kind == "target_speedup":
        assert timing is not None  # Goal.of has seen to it
        found = timing.comparisons[0]
        short = f", short by {goal.limit - found.speedup:.2f}" if found.speedup < goal.limit else ""
        where = f"in new processes, at a batch of {samples_in(work.model, work.inputs)}; others differ"
        least = found.low / _DRIFT
        note = f"at least {least:.3g} with 97.5 %{short}, {where}"
        return Promise(goal.kind, goal.limit, found.speedup, least >= goal.limit, note), metrics
    if goal.kind == "max_drop" and metrics is not None:
        note = f"at most {most:.3g} with 95 %" if most > drop else ""
        return Promise(goal.kind, goal.limit, drop, most <= goal.limit, note), metrics
    error, upper = seen
    worth = f"; seen on {work.made_up} alone: give calibration data for a promise on yours" * bool(work.made_up)
    return Promise(goal.kind, goal.limit, error, upper <= goal.limit, f"at most {upper:.3g} with 95 %{worth}"), metrics


def _original(work: Workshop, reason: str, trials: Sequence[Trial] = ()) -> Negotiated:
    """Return the model as it was, with the reason; a goal of quality is kept by it, one of speed is not."""
    work.reasons |= {site.site.name: reason for site in work.sites if site.site.name not in work.reasons}
    promise = _promise_of_original(work.terms.goal, reason)
    return Negotiated(work.model, work.found, work.plan(()), {}, promise, _search(work, trials))


def _promise_of_original(goal: Goal, reason: str) -> Promise:
    fast = goal.kind == "target_speedup"
    return Promise(goal.kind, goal.limit, float(fast), not fast or goal.limit == 1, f"the original: {reason}")


def _search(work: Workshop, trials: Sequence[Trial]) -> Search:
    points = tuple((damage**0.5, cost) for damage, cost in frontier(work.sites)) if work.sites else ()
    cost, reached = work.terms.prices.what, tuple(work.reached)
    return Search(points, trials=tuple(trials), cost=cost, reached=reached)
