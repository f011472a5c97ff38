"""What to switch to: a plan, the memory format for it, and the forecast of what it saves; nothing is changed here."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from surgery.cost.registry import make_backend
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.layers.unpacking import packed_parameter
from surgery.passes.decompose import decompose
from surgery.passes.preview import find_sites
from surgery.plans.by_rule import ByRule, ModelFacts
from surgery.plans.plan import Decision, Plan
from surgery.plans.quality import RankRule
from surgery.plans.rules import RankSpec
from surgery.sites.site import Site, Totals
from surgery.text import seconds
from surgery.training.forecast import Forecast, make_forecast
from surgery.training.measure import PassTimer, has_formats, time_models
from surgery.training.ranks import TrainingRanks
from surgery.training.spectra import SpectrumLog
from surgery.training.trained import as_pattern, keep_dense

__all__ = [
    "ForTraining",
    "Proposal",
    "Sought",
    "TrainingEvidence",
    "propose",
    "refused",
    "shrunk",
    "sites_of",
    "try_formats",
]

_LEAST_SAVED = 0.01  # ours: of the dense time of all sites that can be factored
_NONE: Mapping[str, str] = MappingProxyType({})
_FORMATS = {False: "contiguous", True: "channels_last"}


@dataclass(frozen=True)
class Sought:
    """What the user asked for: ranks, factorization, which sites."""

    ranks: RankSpec | RankRule = "auto"
    factorization: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def without(self, names: Collection[str]) -> Sought:
        """Return the same without ranks for these names."""
        if not isinstance(self.ranks, Mapping):
            return self
        return replace(self, ranks={name: rank for name, rank in self.ranks.items() if name not in names})

    @property
    def automatic(self) -> bool:
        """Whether ranks are to be found by spectra and measured times."""
        return self.ranks == "auto"


@dataclass(frozen=True)
class Proposal:
    """A plan in a memory format, and the forecast of it, where it was measured."""

    plan: Plan
    channels_last: bool
    forecast: Forecast | None = None


def sites_of(root: nn.Module, example_inputs: Any) -> tuple[Site, ...]:
    """Return the sites of a module."""
    return find_sites(root, example_inputs)[0]


@dataclass(frozen=True)
class TrainingEvidence:
    """What a plan for training goes by: the sites that stay dense in any case, with reasons, and a measured rule.

    Without a ``rule`` the ranks are those that were asked for.
    """

    untrained: Mapping[str, str] = field(default_factory=dict)
    rule: RankRule | None = None


@dataclass(frozen=True)
class ForTraining:
    """The planner of what was asked for, in which the sites that do not train are dense, each with its reason."""

    sought: Sought

    def plan(self, sites: Sequence[Site], evidence: TrainingEvidence, /) -> Plan:
        """Return the plan.

        Budgets are of what trains. Modules with packed weights stay dense: their state is one.
        """
        sought, untrained = self.sought, evidence.untrained
        modules = {site.name.rpartition(".")[0] for site in sites if packed_parameter(site.name) is not None}
        packed = [site.name for site in sites if site.name.rpartition(".")[0] in modules]
        trained = [site for site in sites if site.name not in untrained]
        ranks = sought.ranks if evidence.rule is None else evidence.rule
        rule = ByRule(
            ranks if trained else {},
            sought.factorization,
            sought.include,
            (*sought.exclude, *map(as_pattern, untrained)),
        )
        totals = Totals(sum(site.parameters for site in trained), sum(site.macs for site in trained))
        why = "modules with packed weights are not factored in training yet"
        return keep_dense(rule.plan(sites, ModelFacts(totals)), dict.fromkeys(packed, why) | dict(untrained))


def propose(
    root: nn.Module,
    example_inputs: Any,
    sought: Sought,
    *,
    log: SpectrumLog,
    formats: Sequence[bool],
    epoch: tuple[float, int],
    epochs_left: int | None,
    untrained: Mapping[str, str] = _NONE,
) -> Proposal:
    """Return the best plan over the memory formats, with its forecast.

    ``formats`` says which to try (True is channels_last), the present one first; ``epoch`` is the seconds of the last
    epoch and its steps. ``untrained`` has the sites that stay dense in any case, each with the reason. The model is
    copied, and neither it nor the random state changes.
    """
    start = time.perf_counter()
    sites = sites_of(root, example_inputs)
    plans: dict[bool, Plan] = {}
    multiple = make_backend().channel_multiple
    for channels_last in formats:
        rule = TrainingRanks(log, PassTimer(channels_last), multiple) if sought.automatic else None
        plan = ForTraining(sought).plan(sites, TrainingEvidence(untrained, rule))
        plans[channels_last] = _worthwhile(plan) if sought.automatic else plan
    factored = {form: plan for form, plan in plans.items() if not all(decision.dense for decision in plan)}
    if not factored:
        return Proposal(plans[formats[0]], formats[0])
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
    return Proposal(plans[form], form, forecast)


def _worthwhile(plan: Plan) -> Plan:
    """Return the plan with those sites dense that save next to nothing of the time of all: accuracy is not free."""
    least = _LEAST_SAVED * sum(decision.dense_latency or 0.0 for decision in plan)
    for decision in plan:
        if not decision.dense and decision.dense_latency is not None and decision.latency is not None:
            saved = decision.dense_latency - decision.latency
            if saved < least:
                reason = f"it would save {seconds(saved)}, less than {100 * _LEAST_SAVED:g} % of what all sites take"
                plan = plan.replaced(decision.left_dense(reason))
    return plan


def try_formats(root: nn.Module, example_inputs: Any) -> list[bool]:
    """Return the memory formats worth trying for a dense model, the fastest first: one where it is ahead by far.

    Only convolutions over two dimensions know more than one.
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
    """Return the plan with the proposed decisions where they cost fewer MACs, and those before elsewhere."""
    old = {decision.site: decision for decision in before}
    rows = [d if _macs(d) < _macs(old[d.site]) else old[d.site] for d in proposed]
    return Plan(tuple(rows), before.ranks)


def _macs(decision: Decision) -> int:
    macs = decision.dense_macs if decision.dense else decision.macs
    return macs or 0


def refused(plan: Plan, untrained: Mapping[str, str]) -> str:
    """Return why no site of a plan is factored, in words; ``untrained`` has what cannot be, each with the reason."""
    reasons = {decision.site: decision.reason for decision in plan} | dict(untrained)
    head = "no site would train faster" if reasons.keys() - untrained.keys() else "nothing can be trained in factors"
    return "; ".join([head, *(f"{name}: {reason}" for name, reason in reasons.items())])
