"""Plans for a model: by a rule, or a given one, completed and narrowed; with latencies where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.algebra.stack import stack_key
from surgery.cost.base import Backend
from surgery.cost.registry import make_backend
from surgery.errors import CheckError, InputError
from surgery.factorizations import named
from surgery.passes.factoring import split_chain
from surgery.passes.job import Joint, Selection
from surgery.passes.original import Original
from surgery.plans.by_rule import ByRule, ModelFacts
from surgery.plans.candidates import standing
from surgery.plans.complete import complete_plan
from surgery.plans.joining import check_groups, join, joint_groups
from surgery.plans.plan import Decision, Plan
from surgery.plans.planner import Progress
from surgery.plans.rules import RankSpec
from surgery.sites.site import FactoredSite, Site, select

__all__ = ["plan_for"]


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
            plan = plan.replaced(replace(plan[site.name], dense_latency=dense, latency=after))
    return plan


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
