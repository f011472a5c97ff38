"""From a job to its result: make the plan, by a rule or for a goal, then carry it out.

The result of a decomposition as a value, from the plan as it went and the measured errors.

Carry out a plan: fit its chains, splice them in, check that they run, and say what became of each site.

Plans for a model: by a rule, or a given one, completed and narrowed; with latencies where they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.algebra import Chain, Operator, stack_key
from surgery.cost.base import Backend, make_backend
from surgery.data.samples import Calibration
from surgery.data.standin import StandIn, stand_in
from surgery.errors import CheckError, InputError
from surgery.factorizations import named
from surgery.files.pretrained import note_record
from surgery.passes.by_promise import ByPromise, PromisedPlan, PromiseEvidence, held_out_share, promise_of_original
from surgery.passes.choices import Pricing
from surgery.passes.clock import Clock, Instruments
from surgery.passes.evidence import Evidence, glance, read_evidence
from surgery.passes.factoring import Made, split_chain
from surgery.passes.fitting import Fitter
from surgery.passes.job import Job, Joint, Selection
from surgery.passes.original import Original, Spliced, unreached
from surgery.passes.results import Change, DecomposeResult, Search
from surgery.plans.by_rule import ByRule, ModelFacts, complete_plan
from surgery.plans.candidates import standing
from surgery.plans.faster import FACTORED_ALREADY
from surgery.plans.goal import Goal
from surgery.plans.options import Counted, Measured, Prices, Ruled
from surgery.plans.plan import Decision, Plan
from surgery.plans.rules import RankSpec, check_groups, join, joint_groups
from surgery.sites import FactoredSite, Site, Skip, Totals, select
from surgery.system.memory import give_back
from surgery.system.progress import Progress

__all__ = ["CarriedOut", "as_it_went", "by_goal", "by_plan", "carry_out", "plan_for", "propose", "result_of"]

_NONE_FASTER = "at the ranks that the weights suggest, no chain measured faster; calibration data let others be tried"


def result_of(model: Any, plan: Plan, errors: Mapping[str, float], original: Original) -> DecomposeResult[Any]:
    """Return the result; ``errors`` are those of the weights of the sites that were factored, in graph order."""
    sites = original.sites
    changes = tuple(_change(sites[name], plan[name], error) for name, error in errors.items())
    dense = [
        Skip(d.site, sites[d.site].description, d.reason or "", sites[d.site].parameters, sites[d.site].macs)
        for d in plan
        if d.dense
    ]
    after = Totals(
        original.totals.parameters + sum(c.parameters - c.dense_parameters for c in changes),
        original.totals.macs + sum(c.macs - c.dense_macs for c in changes),
    )
    return DecomposeResult(model, plan, changes, (*dense, *original.skips), original.totals, after)


def _change(site: Site, decision: Decision, error: float) -> Change:
    if decision.factorization is None or decision.rank is None or decision.parameters is None or decision.macs is None:
        raise CheckError(f"the plan has no factorization for {site.name}")
    return Change(
        site=site.name,
        operator=site.description,
        factorization=decision.factorization,
        rank=decision.rank,
        error=error,
        dense_parameters=site.parameters,
        parameters=decision.parameters,
        dense_macs=site.macs,
        macs=decision.macs,
        dense_latency=decision.dense_latency,
        latency=decision.latency,
        joint=decision.joint,
        note=decision.reason or "",
    )


@dataclass(frozen=True, eq=False)
class CarriedOut:
    """The changed model, the plan as it went, and the measured weight error of each chain, in graph order."""

    model: Any
    plan: Plan
    errors: Mapping[str, float]


def carry_out(plan: Plan, original: Original, fitter: Fitter, *, inplace: bool = False) -> CarriedOut:
    """Return the model with the chains of a plan, as a copy or ``inplace``.

    The plan has one decision for each site of the original. What the fitter has built of it before is the result.
    """
    fitted = fitter.fit(plan)
    give_back()  # the scratch memory of solvers: errors are measured on weights once more
    errors = {name: one.error for name, one in fitted.made.items()}  # while the original is as it was
    built = None if inplace else fitter.latest(plan)
    if built is None:
        spliced = original.spliced({name: one.chain for name, one in fitted.made.items()}, inplace=inplace)
        made = {name: one for name, one in fitted.made.items() if name not in spliced.refused}
        fitter.correct(spliced.model, replace(fitted, made=made))
    else:
        spliced, made = Spliced(built, {}), dict(fitted.made)
    done = as_it_went(plan, made, fitter.refused | dict(spliced.refused))
    return CarriedOut(spliced.model, done, {name: errors[name] for name in original.sites if name in made})


def as_it_went(plan: Plan, made: Mapping[str, Made], refused: Mapping[str, str]) -> Plan:
    """Return the plan with what took the place of its chains: other methods, or the operator as it was."""
    carried = [one.carried(plan[name]) for name, one in made.items()]
    left = [plan[name].left_dense(why) for name, why in refused.items() if name not in made and not plan[name].dense]
    return plan.replaced(*carried, *left)


def plan_for(
    original: Original,
    ranks: RankSpec | Plan,
    selection: Selection,
    *,
    backend: Backend | None = None,
    progress: Progress,
) -> Plan:
    """Return the plan for a model, one decision for each site; a backend measures its latencies.

    The rule "measured" measures in any case.
    """
    sites = list(original.sites.values())
    if isinstance(ranks, Plan):
        left_out = select(list(original.sites), selection.include, selection.exclude)
        plan = complete_plan(_without_skips(_narrow(ranks, left_out), original), sites, original.totals)
    else:
        if backend is None and ranks == "measured":
            backend = make_backend()
        joint = _groups(original, selection.joint)
        rule = ByRule(ranks, selection.factorization, selection.include, selection.exclude, joint)
        skipped = [skip.name for skip in original.skips]
        multiple = None if backend is None else backend.channel_multiple
        plan = rule.plan(sites, ModelFacts(original.totals, skipped, backend, multiple, progress))
    return plan if backend is None else _measure(plan, sites, backend, progress)


def _groups(original: Original, joint: Joint) -> Sequence[Sequence[str]]:
    """Return the groups of site names that ``joint`` means."""
    if not isinstance(joint, str):
        check_groups(joint, list(original.sites))
        return joint
    if joint != "inputs":
        raise InputError(f"joint={joint!r}", allowed='"inputs", or groups of site names')
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, site in original.sites.items():
        if not isinstance(site, FactoredSite):
            groups.setdefault((original.sources(name), stack_key(site.operator)), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _measure(plan: Plan, sites: Sequence[Site], backend: Backend, progress: Progress) -> Plan:
    """Fill in the latencies of the factored sites that have none yet.

    What joint sites share runs once: its time is that of the first of them.
    """
    todo = {d.site for d in plan if not d.dense and d.latency is None}
    measured: list[Decision] = []
    units = [unit for unit in join(sites, joint_groups(plan)) if unit.name in todo]
    for done, unit in enumerate(units):
        progress("measure", done, len(units))
        for number, (site, chain) in enumerate(zip(unit.members, _skeletons(unit, plan[unit.name]), strict=True)):
            dense_step, chain_step = standing(site), site.placed(chain)
            times = [backend.compare(dense_step, chain_step, shape) for shape in site.input_shapes]
            dense, after = sum(t.dense_s for t in times), sum(t.chain_s for t in times)
            if number:
                last = max(i for i, step in enumerate(chain.steps) if isinstance(step, Operator))
                shared, own = (replace(chain, steps=part) for part in (chain.steps[:last], chain.steps[last:]))
                after = sum(backend.measure(site.placed(own), shared.out_shape(shape)) for shape in site.input_shapes)
            measured.append(replace(plan[site.name], dense_latency=dense, latency=after))
    return plan.replaced(*measured)


def _skeletons(unit: Site, decision: Decision) -> tuple[Chain, ...]:
    """Return the chain of each member of a site, without numbers."""
    if decision.factorization is None or decision.rank is None:
        raise CheckError(f"the plan has no factorization for {unit.name}")
    return split_chain(named(decision.factorization).skeleton(unit.operator, decision.rank), unit)


def _without_skips(plan: Plan, original: Original) -> Plan:
    """Return the plan without the places that were left alone, which the result lists with their reasons."""
    left = {skip.name for skip in original.skips}
    return replace(plan, decisions=tuple(d for d in plan if d.site in original.sites or d.site not in left))


def _narrow(plan: Plan, left_out: Mapping[str, str | None]) -> Plan:
    for site in [d.site for d in plan]:
        if (reason := left_out.get(site)) is not None:
            plan = plan.edit(site, rank=None, reason=reason)
    return plan


def by_plan(job: Job, original: Original, plan: Plan, *, inplace: bool = False) -> DecomposeResult[Any]:
    """Return the result of carrying out a plan, fitted to the samples of the job if there are any.

    Most of the samples are fitted to, and the others decide what of the fit stays.
    """
    work = [d.site for d in plan if not d.dense]
    evidence = _evidence_for(job, original, plan, work) if work else None
    done = carry_out(plan, original, Fitter(original, evidence, job.fits, job.progress), inplace=inplace)
    give_back()  # the chains, which the model has in layouts of its own
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
) -> tuple[PromisedPlan, PromiseEvidence | None]:
    """Return the plan that keeps a goal, and what it was found with; None where nothing can be shown of the model.

    Without samples it is found on made-up inputs; where latency is to be low, for the sites of the plan of a rule.
    """
    if job.samples is not None:
        return _searched(job, goal, instruments, original, _Shown(job.samples, _left_out(job, original)))
    ruled = None
    if goal.cost == "latency":  # other costs are counted as options are made, for all sites
        ruled = plan_for(original, "measured", job.selection, backend=instruments.backend, progress=job.progress)
        if all(decision.dense for decision in ruled):
            return _nothing_shown(ruled, goal, _NONE_FASTER), None
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
) -> tuple[PromisedPlan, PromiseEvidence]:
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


def _nothing_shown(ruled: Plan, goal: Goal, reason: str) -> PromisedPlan:
    """Return a plan with all sites dense, for a reason where they have none of their own."""
    rows = tuple(d if d.dense and d.reason else d.left_dense(reason) for d in ruled)
    promise = promise_of_original(goal, reason)
    return PromisedPlan(Plan(rows, ranks=str(goal)), promise, Search(cost=goal.cost))
