"""``auto`` with calibration data: the fastest model on this machine that keeps a promise, checked end to end.

    moments -> options of each site (damage, cost) -> one choice for all within a budget -> data-aware factors
    -> measure the whole model -> scale the budget, until the measured value is as near to its limit as it gets

The finished model is timed against the original, interleaved; if it is not faster with confidence, the answer is the
original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from surgery.allocation.budget import Trial, largest_budget
from surgery.allocation.choose import choose_damage, choose_least_cost, frontier
from surgery.allocation.options import Option, Options, options_of
from surgery.allocation.prices import Prices
from surgery.benchmark import Timing, bench
from surgery.calibration.batch_norm import batch_norm_moments, reestimate_batch_norm
from surgery.calibration.inputs import Calibration
from surgery.chain import Chain
from surgery.errors import CheckError, Refusal
from surgery.factorizations import Ranks
from surgery.graphs import Found, Model, open_graph
from surgery.inputs import Inputs
from surgery.passes.factoring import gather, weight_error
from surgery.passes.goals import Evaluate, Goal, HeldOut, Promise, metric_of
from surgery.passes.results import Search
from surgery.plans import Decision, Plan
from surgery.ranks.planning import Progress
from surgery.sites import select

__all__ = ["Negotiated", "Terms", "negotiate"]

_SPEED_TRIALS = 5
_SECONDS = 3.0


@dataclass(frozen=True)
class Terms:
    """What is asked for: the goal with its metric, and how options are made and priced."""

    goal: Goal
    prices: Prices
    evaluate: Evaluate | None = None
    factorization: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    solver: str = "auto"
    multiple: int | None = None
    threads: int | None = None
    seconds: float = _SECONDS


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
        InputError: calibration inputs or a metric that cannot be used, as ``collect`` and ``metric_of`` say.
    """
    work = _Workshop(model, inputs, samples, terms, progress)
    if not work.sites:
        return work.original("no site has a chain that costs less")
    kind = terms.goal.kind
    trials, chosen = work.for_speed() if kind == "target_speedup" else work.for_quality()
    if all(option.factorization is None for option in chosen):
        return work.original("no change keeps the promise", trials)
    return work.finish(chosen, trials)


@dataclass(eq=False)
class _Workshop:
    """The model with all that is measured of it once, and the chains that were fitted so far."""

    model: Model
    inputs: Inputs
    samples: Calibration
    terms: Terms
    progress: Progress
    sites: list[Options] = field(init=False)
    reasons: dict[str, str] = field(init=False)
    _chains: dict[tuple[str, str, Ranks], Chain | None] = field(init=False, default_factory=dict)
    _built: dict[tuple[Option, ...], Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._fit, self._held = self.samples.split()
        self.found: Found = open_graph(self.model, *self.inputs, copies=False).find()
        self._spots = {spot.site.name: spot for spot in self.found.spots}
        left_out = select(list(self._spots), self.terms.include, self.terms.exclude)
        self.reasons = {name: reason for name, reason in left_out.items() if reason is not None}
        wanted = [name for name in self._spots if name not in self.reasons]
        self._data = gather(self.model, self.inputs, self._fit, wanted, self.progress)
        self._norms = batch_norm_moments(self.model, self._fit)
        self.sites = []
        for done, name in enumerate(wanted):
            self.progress("measure", done, len(wanted))
            options = self._options(name)
            if isinstance(options, Refusal):
                self.reasons[name] = options.reason
            else:
                self.sites.append(options)
        self.progress("measure", len(wanted), len(wanted))

    @cached_property
    def _held_out(self) -> HeldOut:
        return HeldOut(self.model, self._held)

    @cached_property
    def _metric(self) -> float | None:
        """The metric of the original."""
        return None if self.terms.evaluate is None else metric_of(self.model, self.terms.evaluate)

    def _options(self, name: str) -> Options | Refusal:
        if name not in self._data.moments:
            return Refusal("no calibration input reaches it")
        return options_of(
            self._spots[name].site,
            self._data.moments[name],
            self.terms.prices,
            factorization=self.terms.factorization,
            multiple=self.terms.multiple,
            centred=name in self._data.centred,
        )

    def for_quality(self) -> tuple[list[Trial], list[Option]]:
        """Return the trials, and the choice of the largest budget of damage that keeps the limit."""
        value, limit, power, start = self._quality()
        most = sum(max(option.damage for option in site.options) for site in self.sites)
        done = largest_budget(
            lambda budget: value(self.build(choose_least_cost(self.sites, budget))),
            limit=limit,
            start=start,
            most=most,
            power=power,
        )
        kept = [trial.budget for trial in done if trial.kept]
        return done, choose_least_cost(self.sites, max(kept, default=0.0))

    def _quality(self) -> tuple[Callable[[Any], float], float, float, float]:
        """Return what to measure of a model, its limit, by which power of the budget it grows, and the first budget."""
        goal = self.terms.goal
        if goal.kind == "max_error":
            return (lambda model: self._held_out.error(model)[1]), goal.limit, 0.5, goal.limit**2
        evaluate, before = self.terms.evaluate, self._metric
        assert evaluate is not None  # Goal.of has seen to it
        assert before is not None
        return (lambda model: before - metric_of(model, evaluate)), goal.limit, 1.0, 0.1**2

    def for_speed(self) -> tuple[list[Trial], list[Option]]:
        """Return the trials, and the choice of least damage that is as fast as is asked for, or the fastest."""
        fastest = [min(site.options, key=lambda option: option.cost) for site in self.sites]
        dense = sum(site.dense.cost for site in self.sites)
        total = self._time(self.model).models[0].median_s
        limit = dense - (total - total / self.terms.goal.limit)
        done: list[Trial] = []
        best = fastest
        for _ in range(_SPEED_TRIALS):
            chosen = choose_damage(self.sites, limit) or fastest
            timing = self._time(self.model, self.build(chosen))
            before, after = (model.median_s for model in timing.models)
            reached = timing.comparisons[0].speedup
            done.append(Trial(limit, reached, reached >= self.terms.goal.limit))
            best = chosen
            if done[-1].kept or chosen == fastest:
                break
            limit -= 1.2 * (after - before / self.terms.goal.limit)
        return done, best

    def build(self, chosen: Sequence[Option]) -> Any:
        """Return a copy of the model with these options, their factors fitted to the data, batch norms re-estimated."""
        work = tuple(option for option in chosen if option.factorization is not None)
        if not work:
            return self.model
        if work not in self._built:
            graph = open_graph(self.model, *self.inputs)
            spots = {spot.site.name: spot for spot in graph.find().spots}
            for done, option in enumerate(work):
                self.progress("fit", done, len(work))
                chain = self.chain(option)
                if chain is not None:
                    graph.splice(spots[option.site], chain)
            self.progress("fit", len(work), len(work))
            model = graph.finish()
            reestimate_batch_norm(model, self._fit, reference=self._norms)
            self._built = {work: model}  # the last one only: models are large
        return self._built[work]

    def chain(self, option: Option) -> Chain | None:
        """Return the fitted chain of an option; None where the method finds no good factors."""
        assert option.factorization is not None
        assert option.ranks is not None
        key = (option.site, option.factorization, option.ranks)
        if key not in self._chains:
            site = self._spots[option.site].site
            found = self._data.fit(site, option.factorization, option.ranks, self.terms.solver)
            if isinstance(found, Refusal):
                self.reasons[option.site] = found.reason
            self._chains[key] = None if isinstance(found, Refusal) else found
        return self._chains[key]

    def _time(self, *models: Any) -> Timing:
        given = self.inputs if any(self.inputs) else None
        return bench(
            models,
            given,
            threads=self.terms.threads,
            seconds=self.terms.seconds,
            progress=lambda share: self.progress("time", round(100 * share), 100),
        )

    def finish(self, chosen: Sequence[Option], trials: Sequence[Trial]) -> Negotiated:
        """Return the chosen model with all that is known of it; the original if it did not become faster."""
        model = self.build(chosen)
        timing = self._time(self.model, model) if self.terms.prices.measured else None
        if timing is not None and timing.comparisons[0].verdict != "faster":
            speedup = timing.comparisons[0]
            span = f"{speedup.speedup:.2f}x, 95 % interval {speedup.low:.2f} to {speedup.high:.2f}"
            return self.original(f"the whole model did not measure faster ({span})", trials)
        errors = {}
        for option in chosen:
            chain = None if option.factorization is None else self.chain(option)
            if chain is not None:
                errors[option.site] = weight_error(self._spots[option.site].site, chain)
        plan = self._plan({option.site: option for option in chosen if option.site in errors})
        promise, metrics = self._judge(model, timing)
        at = (sum(o.damage for o in chosen) ** 0.5, sum(o.cost for o in chosen))
        search = replace(self._search(trials), chosen=at, metrics=metrics, timing=timing)
        return Negotiated(model, self.found, plan, errors, promise, search)

    def _judge(self, model: Any, timing: Timing | None) -> tuple[Promise, tuple[float, float] | None]:
        goal = self.terms.goal
        metrics = None
        if self.terms.evaluate is not None and self._metric is not None:
            metrics = self._metric, metric_of(model, self.terms.evaluate)
        if goal.kind == "target_speedup":
            reached = 1.0 if timing is None else timing.comparisons[0].speedup
            note = "" if reached >= goal.limit else f"short by {goal.limit - reached:.2f}"
            return Promise(goal.kind, goal.limit, reached, reached >= goal.limit, note), metrics
        if goal.kind == "max_drop" and metrics is not None:
            drop = metrics[0] - metrics[1]
            return Promise(goal.kind, goal.limit, drop, drop <= goal.limit), metrics
        error, upper = self._held_out.error(model)
        return Promise(goal.kind, goal.limit, error, upper <= goal.limit, f"at most {upper:.3g} with 95 %"), metrics

    def original(self, reason: str, trials: Sequence[Trial] = ()) -> Negotiated:
        """Return the model as it was, with the reason; a goal of quality is kept by it, one of speed is not."""
        self.reasons |= {site.site.name: reason for site in self.sites if site.site.name not in self.reasons}
        goal = self.terms.goal
        fast = goal.kind == "target_speedup"
        promise = Promise(goal.kind, goal.limit, float(fast), not fast or goal.limit == 1, f"the original: {reason}")
        return Negotiated(self.model, self.found, self._plan({}), {}, promise, self._search(trials))

    def _search(self, trials: Sequence[Trial]) -> Search:
        points = tuple((damage**0.5, cost) for damage, cost in frontier(self.sites)) if self.sites else ()
        return Search(points, trials=tuple(trials), cost=self.terms.prices.what)

    def _plan(self, chosen: dict[str, Option]) -> Plan:
        by_name = {options.site.name: options for options in self.sites}
        decisions = []
        for name, spot in self._spots.items():
            site = spot.site
            measured = self.terms.prices.measured
            dense = by_name[name].dense.cost if measured and name in by_name else None
            decision = Decision(name, dense_parameters=site.parameters, dense_macs=site.macs, dense_latency=dense)
            option = chosen.get(name)
            if option is None or option.factorization is None or option.ranks is None:
                reason = self.reasons.get(name, "every chain would cost more of the promise than it gains")
                decisions.append(replace(decision, reason=reason))
                continue
            chain = self.chain(option)
            if chain is None:
                raise CheckError(f"{name} has no chain")
            decisions.append(
                replace(
                    decision,
                    factorization=option.factorization,
                    rank=option.ranks,
                    error=option.damage**0.5,
                    parameters=chain.parameters,
                    macs=sum(chain.macs(shape) for shape in site.input_shapes),
                    latency=option.cost if measured else None,
                )
            )
        return Plan(tuple(decisions), ranks="auto")
