"""Plans from files and hands: checked against the sites of a model, with what is missing predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from surgery.errors import InputError, Refusal
from surgery.plans.by_rule import decide, log_savings
from surgery.plans.candidates import Cost, candidates_of
from surgery.plans.joining import join, joint_groups
from surgery.plans.named import check_known, explicit
from surgery.plans.plan import Decision, Plan
from surgery.sites.site import Site, Totals

__all__ = ["complete_plan"]


def complete_plan(plan: Plan, sites: Sequence[Site], totals: Totals) -> Plan:
    """Return the plan checked against the sites of a model, one decision for each, with predictions filled in.

    Sites that the plan does not name stay dense. Latencies and errors in the plan are kept where its costs are still
    right.

    Raises:
        RankError: a rank that its site cannot take; the message names the site and the span.
        InputError: a site that the model does not have, or a factorization that does not fit its operator.
    """
    names = [site.name for site in sites]
    check_known((d.site for d in plan if d.site not in set(names)), names, "the plan names")
    rows = {decision.site: decision for decision in plan}
    units = join(sites, joint_groups(plan))
    made = {d.site: d for unit in units for d in _complete(unit, [rows.get(site.name) for site in unit.members])}
    completed = dataclasses.replace(plan, decisions=tuple(made[site.name] for site in sites))
    log_savings(completed, totals)
    return completed


def _complete(unit: Site, rows: Sequence[Decision | None]) -> list[Decision]:
    """Return the decisions of a plan's rows for the members of a site, with predictions."""
    row = rows[0]
    if row is None or row.factorization is None or row.rank is None:
        return [_left_dense(site, old) for site, old in zip(unit.members, rows, strict=True)]
    candidates = candidates_of(unit, row.factorization)
    if isinstance(candidates, Refusal):
        raise InputError(
            f"the plan wants {row.factorization} for {unit.name!r}, which does not fit: {candidates.reason}",
            next_step="choose another factorization for it, or keep it dense",
        )
    choice = explicit(candidates, row.rank)
    costs = choice.candidate.costs(choice.ranks)
    known = all(_still_right(old, cost) for old, cost in zip(rows, costs, strict=True))
    decisions = decide(unit, choice, error=row.error if known else None)
    return [_with_latencies(d, old) if known else d for d, old in zip(decisions, rows, strict=True)]


def _still_right(row: Decision | None, cost: Cost) -> bool:
    """Whether what a row predicts is of the chain that it would become now."""
    return row is not None and (row.parameters, row.macs) == (cost.parameters, cost.macs)


def _with_latencies(decision: Decision, row: Decision | None) -> Decision:
    if row is None:
        return decision
    return dataclasses.replace(decision, dense_latency=row.dense_latency, latency=row.latency)


def _left_dense(site: Site, row: Decision | None) -> Decision:
    """Return the decision of a row without a chain."""
    (decision,) = decide(site, Refusal("not in the plan" if row is None else row.reason or "dense in the plan"))
    right = row is not None and row.dense_macs == decision.dense_macs
    return dataclasses.replace(decision, dense_latency=row.dense_latency) if row is not None and right else decision
