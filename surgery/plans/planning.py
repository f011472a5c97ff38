"""Plans: one decision for each site, by a rank rule or completed from a file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from surgery.errors import InputError, Refusal
from surgery.factorizations import SOLVERS, named
from surgery.plans.automatic import Auto, Latencies
from surgery.plans.candidates import Candidate, Choice, candidates_of
from surgery.plans.joining import join, joint_groups
from surgery.plans.named import PerSite, check_known, explicit
from surgery.plans.plan import Decision, Plan
from surgery.plans.quality import RankRule, SiteRule
from surgery.plans.rules import RankSpec, parse_ranks
from surgery.sites.site import Site, Totals, select

__all__ = ["Progress", "complete_plan", "make_plan"]

Progress = Callable[[str, int, int], None]
Outcome = Choice | Refusal

_log = logging.getLogger(__name__)


def make_plan(
    sites: Sequence[Site],
    *,
    ranks: RankSpec | RankRule = "auto",
    factorization: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    totals: Totals,
    latencies: Latencies | None = None,
    multiple: int | None = None,
    solver: str = "auto",
    progress: Progress | None = None,
    joint: Sequence[Sequence[str]] = (),
    skipped: Sequence[str] = (),
) -> Plan:
    """Return a plan with one decision for each site, in order; ranks may name places that were ``skipped``, too.

    ``joint`` has groups of names of sites that are to share factors; those left out leave their group. ``include`` and
    ``exclude`` are glob patterns of site names. ``totals`` are the costs of the whole model, for budgets. ``latencies``
    and ``multiple`` (of channels) serve ``ranks="auto"`` only. ``solver`` is only checked here: predictions are the
    same for both. ``progress`` gets ("plan", sites done, sites to do), before each and at the end.

    A site's spectra are computed at most once for each factorization, and not at all for sites that are left out.

    Raises:
        RankError: a rank spec that cannot be read, a rank that its site cannot take, a budget out of reach.
        InputError: an unknown factorization, solver or site name, a pattern that matches nothing, a weight that is not
            finite.
    """
    rule = _configure(parse_ranks(ranks), latencies, multiple)
    if factorization != "auto":
        named(factorization)
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}", allowed=", ".join(SOLVERS), next_step="say one of these")
    left_out = select([site.name for site in sites], include, exclude)
    if isinstance(rule, PerSite):
        rule.check([*left_out, *skipped])
    units = join([site for site in sites if left_out[site.name] is None], joint)
    outcomes = _choose(units, rule, factorization, totals, progress or _silent)
    made = {decision.site: decision for unit in units for decision in _decide(unit, outcomes[unit.name])}
    made |= {site.name: _dense(site, why) for site in sites if (why := left_out[site.name]) is not None}
    plan = Plan(tuple(made[site.name] for site in sites), ranks=str(rule))
    _log_savings(plan, totals)
    return plan


def complete_plan(plan: Plan, sites: Sequence[Site], totals: Totals) -> Plan:
    """Return the plan checked against the sites of a model, one decision for each, with predictions filled in.

    Sites that the plan does not name stay dense. Latencies in the plan are kept where its costs are still right.

    Raises:
        RankError: a rank that its site cannot take; the message names the site and the span.
        InputError: a site that the model does not have, or a factorization that does not fit its operator.
    """
    names = [site.name for site in sites]
    check_known((d.site for d in plan if d.site not in set(names)), names, "the plan names")
    rows = {decision.site: decision for decision in plan}
    units = join(sites, joint_groups(plan))
    made = {d.site: d for unit in units for d in _complete(unit, [rows.get(site.name) for site in unit.members])}
    completed = Plan(tuple(made[site.name] for site in sites), ranks=plan.ranks)
    _log_savings(completed, totals)
    return completed


def _configure(rule: RankRule, latencies: Latencies | None, multiple: int | None) -> RankRule:
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise InputError(f"multiple={multiple!r}", allowed="whole numbers from 1, or None", next_step="say 8 or 16")
    return dataclasses.replace(rule, multiple=multiple, latencies=latencies) if isinstance(rule, Auto) else rule


def _choose(
    sites: Sequence[Site], rule: RankRule, factorization: str, totals: Totals, progress: Progress
) -> dict[str, Outcome]:
    """Return the outcome for each site; a budget is settled once all spectra are known."""
    outcomes: dict[str, Outcome] = {}
    waiting: list[list[Candidate]] = []
    for done, site in enumerate(sites):
        progress("plan", done, len(sites))
        candidates = candidates_of(site, factorization)
        if isinstance(candidates, Refusal):
            outcomes[site.name] = candidates
        elif isinstance(rule, SiteRule):
            outcomes[site.name] = rule.choose(candidates)
        else:
            waiting.append([candidate for candidate in candidates if candidate.spectra])
    settled = rule.settle(waiting, totals)
    progress("plan", len(sites), len(sites))
    return outcomes | {candidates[0].site.name: settled.choose(candidates) for candidates in waiting}


def _dense(site: Site, reason: str) -> Decision:
    return Decision(site.name, dense_parameters=site.parameters, dense_macs=site.macs, reason=reason)


def _decide(unit: Site, outcome: Outcome) -> list[Decision]:
    """Return the decision for each member of a site; those of a joint one name the group."""
    if isinstance(outcome, Refusal):
        return [_dense(site, outcome.reason) for site in unit.members]
    together = len(unit.members) > 1
    shares = [1.0] if not together else [site.macs / (unit.macs or 1) for site in unit.members]
    return [
        dataclasses.replace(
            _dense(site, ""),
            reason=None,
            factorization=outcome.candidate.factorization.name,
            rank=outcome.ranks,
            joint=unit.name if together else None,
            error=outcome.candidate.error(outcome.ranks),
            parameters=cost.parameters,
            macs=cost.macs,
            dense_latency=None if outcome.dense_latency is None else share * outcome.dense_latency,
            latency=None if outcome.latency is None else share * outcome.latency,
        )
        for site, cost, share in zip(unit.members, outcome.candidate.costs(outcome.ranks), shares, strict=True)
    ]


def _complete(unit: Site, rows: Sequence[Decision | None]) -> list[Decision]:
    """Return the decisions of a plan's rows for the members of a site, with predictions."""
    row = rows[0]
    if row is None:
        return _decide(unit, Refusal("not in the plan"))
    if row.factorization is None or row.rank is None:
        return _decide(unit, Refusal(row.reason or "dense in the plan"))
    candidates = candidates_of(unit, row.factorization)
    if isinstance(candidates, Refusal):
        raise InputError(
            f"the plan wants {row.factorization} for {unit.name!r}, which does not fit: {candidates.reason}",
            next_step="choose another factorization for it, or keep it dense",
        )
    decisions = _decide(unit, explicit(candidates, row.rank))
    return [_with_latencies(d, old) for d, old in zip(decisions, rows, strict=True)]


def _with_latencies(decision: Decision, row: Decision | None) -> Decision:
    """Return a decision with the latencies of a plan's row, if the costs of the row are still right."""
    if row is None or (row.parameters, row.macs) != (decision.parameters, decision.macs):
        return decision
    return dataclasses.replace(decision, dense_latency=row.dense_latency, latency=row.latency)


def _log_savings(plan: Plan, totals: Totals) -> None:
    changed = [d for d in plan if not d.dense]
    parameters = totals.parameters - sum((d.dense_parameters or 0) - (d.parameters or 0) for d in changed)
    macs = totals.macs - sum((d.dense_macs or 0) - (d.macs or 0) for d in changed)
    _log.info(
        "%d of %d sites change: %d of %d parameters, %d of %d MACs stay",
        *(len(changed), len(plan), parameters, totals.parameters, macs, totals.macs),
    )


def _silent(step: str, done: int, total: int) -> None:
    """Report nothing."""
