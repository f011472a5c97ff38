"""Propose a switch: a plan, the memory format for it, and the forecast of the time saved; the model is not changed.

Whether a switch pays: a pure function of step times, of the steps left and of the cost of the switch, in seconds.

saved = steps left x (dense step - factored step) - cost of the switch        epochs to break even = cost / gain
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from surgery.cost.base import make_backend
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.layers.unpacking import packed_parameter
from surgery.passes.decompose import decompose
from surgery.passes.preview import find_sites
from surgery.plans.by_rule import ByRule, ModelFacts
from surgery.plans.plan import Decision, Plan
from surgery.plans.quality import RankRule
from surgery.plans.rules import RankSpec
from surgery.sites import Site, Totals
from surgery.text import seconds
from surgery.training.measure import PassTimer, has_formats, time_models
from surgery.training.ranks import TrainingRanks, as_pattern, keep_dense
from surgery.training.schedule import SpectrumLog

__all__ = [
    "LEAST_GAIN",
    "ForTraining",
    "Forecast",
    "SwitchPlan",
    "Request",
    "TrainingEvidence",
    "make_forecast",
    "propose",
    "refused",
    "shrunk",
    "sites_of",
    "try_formats",
]

LEAST_GAIN = 0.03  # ours: share of the step; a smaller gain is lost in the noise of the measurement


@dataclass(frozen=True)
class Forecast:
    """Seconds of a dense and of a factored step, seconds that the switch costs, and what follows for the epochs left.

    ``break_even`` is in epochs, and infinite if a factored step is not shorter. It and ``saved`` assume that each epoch
    keeps its number of steps. ``saved`` is None if the number of epochs left is not known.
    """

    dense_step: float
    factored_step: float
    steps: int
    epochs_left: int | None
    cost: float

    @property
    def gain(self) -> float:
        """Seconds by which an epoch gets shorter."""
        return self.steps * (self.dense_step - self.factored_step)

    @property
    def break_even(self) -> float:
        """Epochs until the switch has earned what it costs."""
        return self.cost / self.gain if self.gain > 0 else math.inf

    @property
    def saved(self) -> float | None:
        """Seconds saved in all epochs left, less the cost of the switch."""
        return None if self.epochs_left is None else self.epochs_left * self.gain - self.cost

    @property
    def pays(self) -> bool:
        """Whether a step gets clearly shorter, and the epochs left save more than the switch costs."""
        shorter = self.factored_step < (1 - LEAST_GAIN) * self.dense_step
        return shorter and (self.saved is None or self.saved > 0)

    @property
    def reason(self) -> str:
        """The reason for or against the switch, in words."""
        steps = f"a step of {seconds(self.dense_step)} becomes {seconds(self.factored_step)}"
        if self.factored_step >= (1 - LEAST_GAIN) * self.dense_step:
            return f"it would not train faster: {steps}"
        ratio = f"{steps} ({self.dense_step / self.factored_step:.2f}x)"
        even = f"the switch costs {seconds(self.cost)} and breaks even after {self.break_even:.2g} epochs"
        if self.saved is None:
            return f"{ratio}; {even}"
        if self.saved <= 0:
            return f"it would not pay: {ratio}, but {even}, and {self.epochs_left} are left"
        return f"{ratio}; {even}; {seconds(self.saved)} saved over {self.epochs_left} epochs"


def make_forecast(
    *,
    dense_step: float,
    measured_dense: float,
    measured_factored: float,
    steps: int,
    epochs_left: int | None,
    cost: float,
) -> Forecast:
    """Return the forecast from the seconds of a training step and of measured passes of both models.

    Only the forward and backward passes are assumed to change; data loading, optimizer and evaluation take as long as
    before. So the step gets shorter by as many seconds as the passes do. It gets shorter at most by the same factor.

    >>> forecast = make_forecast(
    ...     dense_step=1.0, measured_dense=0.8, measured_factored=0.2, steps=10, epochs_left=5, cost=3.0
    ... )
    >>> round(forecast.factored_step, 6), round(forecast.break_even, 6), round(forecast.saved, 6)
    (0.4, 0.5, 27.0)
    """
    # Example: passes of 0.8 s become 0.2 s in a step of 1 s, so that it takes 0.4 s; it cannot take less than 0.25 s,
    # which matters where the passes were measured longer than the step itself.
    ratio = measured_factored / measured_dense
    factored = max(dense_step - (measured_dense - measured_factored), min(1.0, ratio) * dense_step)
    return Forecast(dense_step, factored, steps, epochs_left, cost)


_LEAST_SAVED = 0.01  # ours: share of the dense time of all sites that can be factored
_NONE: Mapping[str, str] = MappingProxyType({})
_FORMATS = {False: "contiguous", True: "channels_last"}


@dataclass(frozen=True)
class Request:
    """The user's request: ranks, factorization, and patterns of site names."""

    ranks: RankSpec | RankRule = "auto"
    factorization: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def without(self, names: Collection[str]) -> Request:
        """Return the request without ranks for these names."""
        if not isinstance(self.ranks, Mapping):
            return self
        return replace(self, ranks={name: rank for name, rank in self.ranks.items() if name not in names})

    @property
    def automatic(self) -> bool:
        """Whether to choose ranks by spectra and measured times."""
        return self.ranks == "auto"


@dataclass(frozen=True)
class SwitchPlan:
    """A plan, the memory format for it, and its forecast if it was measured."""

    plan: Plan
    channels_last: bool
    forecast: Forecast | None = None


def sites_of(root: nn.Module, example_inputs: Any) -> tuple[Site, ...]:
    """Return the sites of a module."""
    return find_sites(root, example_inputs)[0]


@dataclass(frozen=True)
class TrainingEvidence:
    """The evidence for a training plan: the sites that must stay dense, with reasons, and a measured rank rule.

    Without a ``rule`` the plan has the ranks that the user asked for.
    """

    untrained: Mapping[str, str] = field(default_factory=dict)
    rule: RankRule | None = None


@dataclass(frozen=True)
class ForTraining:
    """Plans what the user asked for, but leaves the sites that do not train dense, each with its reason."""

    request: Request

    def plan(self, sites: Sequence[Site], evidence: TrainingEvidence, /) -> Plan:
        """Return the plan.

        Budgets count only the sites that train. Modules with packed weights stay dense, because several sites share
        one parameter and its optimizer state.
        """
        request, untrained = self.request, evidence.untrained
        modules = {site.name.rpartition(".")[0] for site in sites if packed_parameter(site.name) is not None}
        packed = [site.name for site in sites if site.name.rpartition(".")[0] in modules]
        trained = [site for site in sites if site.name not in untrained]
        ranks = request.ranks if evidence.rule is None else evidence.rule
        rule = ByRule(
            ranks if trained else {},
            request.factorization,
            request.include,
            (*request.exclude, *map(as_pattern, untrained)),
        )
        totals = Totals(sum(site.parameters for site in trained), sum(site.macs for site in trained))
        why = "modules with packed weights are not factored in training yet"
        return keep_dense(rule.plan(sites, ModelFacts(totals)), dict.fromkeys(packed, why) | dict(untrained))


def propose(
    root: nn.Module,
    example_inputs: Any,
    request: Request,
    *,
    log: SpectrumLog,
    formats: Sequence[bool],
    epoch: tuple[float, int],
    epochs_left: int | None,
    untrained: Mapping[str, str] = _NONE,
) -> SwitchPlan:
    """Return the best plan over the memory formats, with its forecast.

    ``formats`` lists the formats to try (True is channels_last), the present one first. ``epoch`` is the seconds of the
    last epoch and its number of steps. ``untrained`` maps the sites that must stay dense to the reasons. Copies are
    measured, so neither the model nor the random state changes.
    """
    # One model for each format is built, and all are timed in one interleaved run. The cost in the forecast is the time
    # of this function, plus that of the last build (``spent``), since the switch builds the chosen plan again.
    start = time.perf_counter()
    sites = sites_of(root, example_inputs)
    plans: dict[bool, Plan] = {}
    multiple = make_backend().channel_multiple
    for channels_last in formats:
        rule = TrainingRanks(log, PassTimer(channels_last), multiple) if request.automatic else None
        plan = ForTraining(request).plan(sites, TrainingEvidence(untrained, rule))
        plans[channels_last] = _worthwhile(plan) if request.automatic else plan
    factored = {form: plan for form, plan in plans.items() if not all(decision.dense for decision in plan)}
    if not factored:
        return SwitchPlan(plans[formats[0]], formats[0])
    models, spent = [], 0.0
    for form, plan in factored.items():
        before = time.perf_counter()
        models.append(_formatted(decompose(root, example_inputs, ranks=plan).model, form))
        spent = time.perf_counter() - before
    inputs = normalise_inputs(example_inputs)
    dense, *samples = time_models([_formatted(copy.deepcopy(root), formats[0]), *models], inputs)
    best, form = min((s.median, form) for s, form in zip(samples, factored, strict=True))
    in_epoch, steps = epoch
    forecast = make_forecast(
        dense_step=in_epoch / steps if steps else dense.median,
        measured_dense=dense.median,
        measured_factored=best,
        steps=max(1, steps),
        epochs_left=epochs_left,
        cost=time.perf_counter() - start + spent,
    )
    return SwitchPlan(plans[form], form, forecast)


def _worthwhile(plan: Plan) -> Plan:
    """Return the plan without factors that save under ``_LEAST_SAVED`` of all sites' time, as they cost accuracy."""
    least = _LEAST_SAVED * sum(decision.dense_latency or 0.0 for decision in plan)
    for decision in plan:
        if not decision.dense and decision.dense_latency is not None and decision.latency is not None:
            saved = decision.dense_latency - decision.latency
            if saved < least:
                reason = f"it would save {seconds(saved)}, less than {100 * _LEAST_SAVED:g} % of what all sites take"
                plan = plan.replaced(decision.left_dense(reason))
    return plan


def try_formats(root: nn.Module, example_inputs: Any) -> list[bool]:
    """Return the memory formats worth trying for a dense model, the faster first; True is channels_last.

    There is one if channels_last is faster already, or if no site has two spatial dimensions.
    """
    if not has_formats([site.operator for site in sites_of(root, example_inputs)]):
        return [False]
    models = [_formatted(copy.deepcopy(root), form) for form in _FORMATS]
    contiguous, channels_last = time_models(models, normalise_inputs(example_inputs))
    if channels_last.median < contiguous.median:
        return [True]
    return [False, True]


def _formatted(model: nn.Module, channels_last: bool) -> nn.Module:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=form)  # type: ignore[call-overload]


def shrunk(before: Plan, proposed: Plan) -> Plan:
    """Return the plan with each proposed decision that costs fewer MACs than before, and the old decision elsewhere."""
    old = {decision.site: decision for decision in before}
    rows = [d if _macs(d) < _macs(old[d.site]) else old[d.site] for d in proposed]
    return Plan(tuple(rows), before.ranks)


def _macs(decision: Decision) -> int:
    macs = decision.dense_macs if decision.dense else decision.macs
    return macs or 0


def refused(plan: Plan, untrained: Mapping[str, str]) -> str:
    """Return in words why a plan factors no site; ``untrained`` maps the sites that cannot be factored to reasons."""
    reasons = {decision.site: decision.reason for decision in plan} | dict(untrained)
    head = "no site would train faster" if reasons.keys() - untrained.keys() else "nothing can be trained in factors"
    return "; ".join([head, *(f"{name}: {reason}" for name, reason in reasons.items())])
