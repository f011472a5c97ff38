"""Decompose a whole model with data-aware factors, at once or in sequence.

At once, every site is fitted on the inputs that the original network gives it. In sequence, the sites of the plan are
taken in graph order in several stages, and each stage is fitted on the inputs that the network gives with all stages
before it decomposed already, so that a site is fitted to what it will see. Each stage costs one more run over the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from surgery.calibration.batch_norm import feeds_batch_norm, reestimate_batch_norm
from surgery.calibration.collect import Progress, collect
from surgery.calibration.factor import fit, output_error
from surgery.calibration.inputs import Calibration
from surgery.calibration.moments import Moments
from surgery.calibration.sensitivity import with_sensitivity
from surgery.chain import Chain
from surgery.errors import InputError, Refusal
from surgery.factorizations import named
from surgery.graphs import Model, Spot, open_graph
from surgery.plans import Decision, Plan

__all__ = ["Fitted", "fit_in_sequence"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """The new model, the relative output error of each site on its own inputs, and why sites stayed dense after all."""

    model: Any
    errors: Mapping[str, float]
    refusals: Mapping[str, str]


def fit_in_sequence(
    model: Model,
    plan: Plan,
    batches: Calibration,
    *,
    stages: int = 1,
    sensitivity: bool = True,
    batch_norm: bool = True,
    solver: str = "auto",
    progress: Progress | None = None,
) -> Fitted:
    """Return a copy of the model with the sites of a plan factored for the data, in so many stages (1: at once).

    With ``sensitivity`` errors are weighed by what the model's output minds; with ``batch_norm`` the running statistics
    of batch norms are re-estimated after each stage, and sites that feed one leave their mean to it.

    Raises:
        InputError: the plan names a site that the model does not have, or as ``collect``.
        RankError, CaptureError: as ``decompose``.
    """
    todo = [decision for decision in plan if not decision.dense]
    errors: dict[str, float] = {}
    refusals: dict[str, str] = {}
    example = next(iter(batches))
    for number, stage in enumerate(_stages(todo, stages)):
        moments = collect(model, batches, sites={decision.site for decision in stage}, progress=progress)
        moments = with_sensitivity(model, batches, moments) if sensitivity else moments
        graph = open_graph(model, *example, copies=number == 0, inplace=number > 0)
        spots = {spot.site.name: spot for spot in graph.find().spots}
        for decision in stage:
            spot = _spot(spots, decision)
            centred = True if batch_norm and feeds_batch_norm(graph, spot) else None
            chain = _fit(spot, decision, moments[decision.site], solver=solver, centred=centred)
            if isinstance(chain, Refusal):
                refusals[decision.site] = chain.reason
            else:
                errors[decision.site] = output_error(chain, spot.site.operator, moments[decision.site])
                graph.splice(spot, chain)
        model = graph.finish()
        if batch_norm:
            reestimate_batch_norm(model, batches)
    return Fitted(model, errors, refusals)


def _stages(todo: Sequence[Decision], stages: int) -> list[Sequence[Decision]]:
    """Cut the decisions into so many runs of about equal length."""
    cuts = [len(todo) * i // stages for i in range(stages + 1)]
    return [todo[start:stop] for start, stop in pairwise(cuts) if stop > start]


def _spot(spots: Mapping[str, Spot], decision: Decision) -> Spot:
    if decision.site not in spots:
        raise InputError(f"the model has no site {decision.site!r}", allowed=", ".join(spots))
    return spots[decision.site]


def _fit(spot: Spot, decision: Decision, moments: Moments, *, solver: str, centred: bool | None) -> Chain | Refusal:
    if decision.factorization is None or decision.rank is None:
        raise InputError(f"the plan has no factorization for {decision.site}")
    method, operator = named(decision.factorization), spot.site.operator
    return fit(method, operator, decision.rank, moments, solver=solver, centred=centred)
