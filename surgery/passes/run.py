"""From a job to its result: make the plan, by a rule or for a goal, then carry it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery.data.samples import Calibration
from surgery.data.standin import StandIn, stand_in
from surgery.files.pretrained import note_record
from surgery.passes.by_promise import ByPromise, PromiseEvidence, Proposal, held_out_share
from surgery.passes.carry_out import carry_out
from surgery.passes.clock import Clock
from surgery.passes.evidence import Evidence, glance, read_evidence
from surgery.passes.fitter import Fitter
from surgery.passes.instruments import Instruments
from surgery.passes.job import Job
from surgery.passes.original import Original
from surgery.passes.reach import unreached
from surgery.passes.result_of import result_of
from surgery.passes.results import DecomposeResult, Search
from surgery.passes.rule_plans import plan_for
from surgery.passes.site_options import Pricing
from surgery.passes.verdict import promise_of_original
from surgery.plans.faster import FACTORED_ALREADY
from surgery.plans.goal import Goal
from surgery.plans.plan import Decision, Plan
from surgery.plans.prices import Counted, Measured, Prices, Ruled
from surgery.sites.site import FactoredSite, select

__all__ = ["by_goal", "by_plan", "propose"]


def by_plan(job: Job, original: Original, plan: Plan, *, inplace: bool = False) -> DecomposeResult[Any]:
    """Return the result of carrying out a plan, fitted to the samples of the job if there are any.

    Most of the samples are fitted to, and the others decide what of the fit stays.
    """
    work = [d.site for d in plan if not d.dense]
    evidence = _evidence_for(job, original, plan, work) if work else None
    fitter = Fitter(original, evidence, job.fits, job.progress)
    done = carry_out(plan, original, fitter, inplace=inplace)
    job.progress("factor", len(work), len(work))
    note_record(done.model)
    seen = None if evidence is None or not done.errors else evidence.see(done.model)
    return replace(result_of(done.model, done.plan, done.errors, original), seen=seen)


def _evidence_for(job: Job, original: Original, plan: Plan, sites: list[str]) -> Evidence | None:
    if job.samples is None:
        evidence = glance(original, job.progress)
    else:
        evidence = read_evidence(original, job.samples, sites, job.progress, share=plan.held_out)
    if evidence is not None:
        _ = evidence.held_out  # while the original is as it was
    return evidence


def by_goal(job: Job, goal: Goal, instruments: Instruments, *, inplace: bool = False) -> DecomposeResult[Any]:
    """Return the result for a goal: the plan that keeps it, carried out; the model itself if nothing changes."""
    original = Original(job.model, job.inputs)
    proposal, evidence = propose(job, goal, instruments, original)
    if evidence is None or all(decision.dense for decision in proposal.plan):
        note_record(job.model)
        result = result_of(job.model, proposal.plan, {}, original)
        return replace(result, promise=proposal.promise, search=proposal.search)
    done = carry_out(proposal.plan, original, evidence.fitter, inplace=inplace)
    note_record(done.model)
    result = result_of(done.model, done.plan, done.errors, original)
    seen = evidence.evidence.see(done.model)
    return replace(result, promise=proposal.promise, search=proposal.search, seen=seen)


def propose(
    job: Job, goal: Goal, instruments: Instruments, original: Original
) -> tuple[Proposal, PromiseEvidence | None]:
    """Return the plan that keeps a goal, and what it was found with; None where nothing can be shown of the model.

    Without samples it is found on made-up inputs; where latency is to be low, for the sites of the plan of a rule.
    """
    if job.samples is not None:
        return _searched(job, goal, instruments, original, _Shown(job.samples, _left_out(job, original)))
    ruled = None
    if goal.cost == "latency":  # other costs are counted as options are made, for all sites
        ruled = plan_for(original, "measured", job.selection, backend=instruments.backend, progress=job.progress)
        if all(decision.dense for decision in ruled):
            return _nothing_shown(ruled, goal, "no site has a chain that measured faster"), None
    reasons = _left_out(job, original) if ruled is None else {d.site: d.reason or "" for d in ruled if d.dense}
    made = stand_in(original.model, original.inputs, original.found, progress=job.progress)
    if not isinstance(made, StandIn):
        reason = f"nothing shows what its outputs would be, since {made.reason}; give calibration data"
        return _nothing_shown(_as_they_are(original, reasons) if ruled is None else ruled, goal, reason), None
    return _searched(job, goal, instruments, original, _Shown(made.samples, reasons, made.what, ruled))


def _left_out(job: Job, original: Original) -> dict[str, str]:
    """Return why the patterns of the job leave sites out."""
    found = select(list(original.sites), job.selection.include, job.selection.exclude)
    return {name: reason for name, reason in found.items() if reason is not None}


def _as_they_are(original: Original, reasons: Mapping[str, str]) -> Plan:
    """Return the plan in which all sites stay dense, for these reasons."""
    rows = (
        Decision(name, dense_parameters=site.parameters, dense_macs=site.macs, reason=reasons.get(name))
        for name, site in original.sites.items()
    )
    return Plan(tuple(rows))


@dataclass(frozen=True, eq=False)
class _Shown:
    """Samples, the sites that stay dense in any case, and of made-up samples what they are, and the plan of a rule."""

    samples: Calibration
    reasons: Mapping[str, str]
    made_up: str = ""
    ruled: Plan | None = None


def _searched(
    job: Job, goal: Goal, instruments: Instruments, original: Original, shown: _Shown
) -> tuple[Proposal, PromiseEvidence]:
    reasons = _factored_already(original) | dict(shown.reasons)
    reasons |= unreached(original, [name for name in original.sites if name not in reasons])
    evidence = read_evidence(
        original,
        shown.samples,
        [name for name in original.sites if name not in reasons],
        job.progress,
        share=held_out_share(goal),
        made_up=shown.made_up,
    )
    fitter = Fitter(original, evidence, replace(job.fits, substitutes=False), job.progress)
    clock = Clock(
        job.model,
        job.inputs,
        instruments.backend,
        instruments.open_timer,
        run_s=instruments.seconds,
        progress=job.progress,
    )
    prices, multiple = _prices(goal, instruments, shown.ruled), instruments.backend.channel_multiple
    pricing = Pricing(prices, job.selection.factorization, multiple, shown.ruled)
    planner = ByPromise(goal, pricing, instruments.margin, job.progress)
    known = PromiseEvidence(original, evidence, fitter, clock, reasons)
    return planner.propose(list(original.sites.values()), known), known


def _factored_already(original: Original) -> dict[str, str]:
    """Return why a goal leaves the chains alone that stand in the model already."""
    return {name: FACTORED_ALREADY for name, site in original.sites.items() if isinstance(site, FactoredSite)}


def _prices(goal: Goal, instruments: Instruments, ruled: Plan | None) -> Prices:
    if goal.cost != "latency":
        return Counted(goal.cost)
    return Measured(instruments.backend) if ruled is None else Ruled(ruled)


def _nothing_shown(ruled: Plan, goal: Goal, reason: str) -> Proposal:
    """Return a plan with all sites dense, for a reason where they have none of their own."""
    rows = tuple(d if d.dense and d.reason else d.left_dense(reason) for d in ruled)
    promise = promise_of_original(goal, reason)
    return Proposal(Plan(rows, ranks=str(goal)), promise, Search(cost=goal.cost))
