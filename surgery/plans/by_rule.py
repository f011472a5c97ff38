"""Plans by a rank rule: each site, or each group of joint sites, is decided by its weight and its own latencies.

Plans from files and hands: checked against the sites of a model, with what is missing predicted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.errors import InputError, Refusal
from surgery.factorizations import named
from surgery.plans.candidates import Candidate, Choice, Cost, candidates_of
from surgery.plans.faster import KeepFaster, Latencies
from surgery.plans.plan import Decision, Plan
from surgery.plans.quality import RankRule, SiteRule
from surgery.plans.rules import PerSite, RankSpec, check_known, explicit, join, joint_groups, parse_ranks
from surgery.sites import Site, Totals, select
from surgery.system.progress import Progress, silent

__all__ = ["ByRule", "ModelFacts", "Outcome", "complete_plan", "decide", "log_savings"]

Outcome = Choice | Refusal

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFacts:
    """What a rule may know of a model besides its sites.

    ``totals`` are the costs of the whole model, for budgets. ``skipped`` are names that ranks may say though they are
    not sites. ``latencies`` and ``multiple`` (of channels) serve the rule "measured" alone. ``progress`` gets
    ("plan", sites done, all sites), before each and at the end.
    """

    totals: Totals
    skipped: Sequence[str] = ()
    latencies: Latencies | None = None
    multiple: int | None = None
    progress: Progress = silent


@dataclass(frozen=True)
class ByRule:
    """The planner that follows one rule for ranks.

    ``joint`` has groups of names of sites that are to share factors; those left out leave their group. ``include`` and
    ``exclude`` are glob patterns of site names.
    """

    ranks: RankSpec | RankRule = "measured"
    factorization: str = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    joint: Sequence[Sequence[str]] = ()

    def plan(self, sites: Sequence[Site], evidence: ModelFacts, /) -> Plan:
        """Return a plan with one decision for each site, in order.

        A site's spectra are computed at most once for each factorization, and not at all for sites that are left out.

        Raises:
            RankError: a rank spec that cannot be read, a rank that its site cannot take, a budget out of reach.
            InputError: an unknown factorization or site name, a pattern that matches nothing, a weight that is not
                finite.
        """
        rule = _configure(parse_ranks(self.ranks), evidence)
        if self.factorization != "auto":
            named(self.factorization)
        left_out = select([site.name for site in sites], self.include, self.exclude)
        if isinstance(rule, PerSite):
            rule.check([*left_out, *evidence.skipped])
        units = join([site for site in sites if left_out[site.name] is None], self.joint)
        outcomes = _choose(units, rule, self.factorization, evidence)
        made = {decision.site: decision for unit in units for decision in decide(unit, outcomes[unit.name])}
        made |= {site.name: _dense(site, why) for site in sites if (why := left_out[site.name]) is not None}
        plan = Plan(tuple(made[site.name] for site in sites), ranks=str(rule))
        log_savings(plan, evidence.totals)
        return plan


def _configure(rule: RankRule, evidence: ModelFacts) -> RankRule:
    multiple = evidence.multiple
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise InputError(f"multiple={multiple!r}", allowed="whole numbers from 1, or None", next_step="say 8 or 16")
    if not isinstance(rule, KeepFaster):
        return rule
    return dataclasses.replace(rule, multiple=multiple, latencies=evidence.latencies)


def _choose(sites: Sequence[Site], rule: RankRule, factorization: str, evidence: ModelFacts) -> dict[str, Outcome]:
    """Return the outcome for each site; a budget is settled once all spectra are known."""
    outcomes: dict[str, Outcome] = {}
    waiting: list[list[Candidate]] = []
    for done, site in enumerate(sites):
        evidence.progress("plan", done, len(sites))
        candidates = candidates_of(site, factorization)
        if isinstance(candidates, Refusal):
            outcomes[site.name] = candidates
        elif isinstance(rule, SiteRule):
            outcomes[site.name] = rule.choose(candidates)
        else:
            waiting.append([candidate for candidate in candidates if candidate.spectra])
    settled = rule.settle(waiting, evidence.totals)
    evidence.progress("plan", len(sites), len(sites))
    return outcomes | {candidates[0].site.name: settled.choose(candidates) for candidates in waiting}


def _dense(site: Site, reason: str) -> Decision:
    return Decision(site.name, dense_parameters=site.parameters, dense_macs=site.macs, reason=reason)


def decide(unit: Site, outcome: Outcome, *, error: float | None = None) -> list[Decision]:
    """Return the decision for each member of a site; those of a joint one name the group.

    ``error`` is the predicted error where it is known, so that no spectrum is needed.
    """
    if isinstance(outcome, Refusal):
        return [_dense(site, outcome.reason) for site in unit.members]
    together = len(unit.members) > 1
    # A group is timed as a whole; each member gets the part of the seconds that it has of the MACs.
    shares = [1.0] if not together else [site.macs / (unit.macs or 1) for site in unit.members]
    return [
        dataclasses.replace(
            _dense(site, ""),
            reason=None,
            factorization=outcome.candidate.factorization.name,
            rank=outcome.ranks,
            joint=unit.name if together else None,
            error=outcome.candidate.error(outcome.ranks) if error is None else error,
            parameters=cost.parameters,
            macs=cost.macs,
            dense_latency=None if outcome.dense_latency is None else share * outcome.dense_latency,
            latency=None if outcome.latency is None else share * outcome.latency,
        )
        for site, cost, share in zip(unit.members, outcome.candidate.costs(outcome.ranks), shares, strict=True)
    ]


def log_savings(plan: Plan, totals: Totals) -> None:
    """Log what a plan saves of the costs of a model."""
    changed = [d for d in plan if not d.dense]
    parameters = totals.parameters - sum((d.dense_parameters or 0) - (d.parameters or 0) for d in changed)
    macs = totals.macs - sum((d.dense_macs or 0) - (d.macs or 0) for d in changed)
    _log.info(
        "%d of %d sites change: %d of %d parameters, %d of %d MACs stay",
        *(len(changed), len(plan), parameters, totals.parameters, macs, totals.macs),
    )


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
