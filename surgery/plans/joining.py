"""Which sites are decided on together: groups by name, or the sites that read the same values."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.errors import InputError, Refusal
from surgery.plans.named import check_known
from surgery.plans.plan import Plan
from surgery.sites.joint import joined
from surgery.sites.site import Site

__all__ = ["check_groups", "join", "joint_groups"]


def join(sites: Sequence[Site], groups: Sequence[Sequence[str]]) -> list[Site]:
    """Return the sites in order, with each group as one joint site in the place of its first member.

    Names that are not among the sites are passed over; of a group of which one is left it is a site by itself.

    Raises:
        InputError: members that cannot be stacked.
    """
    by_name = {site.name: site for site in sites}
    present = [[by_name[name] for name in group if name in by_name] for group in groups]
    leads: dict[str, Site] = {}
    absorbed: set[str] = set()
    for members in present:
        if len(members) < 2:
            continue
        members.sort(key=list(by_name.values()).index)
        joint = joined(members)
        if isinstance(joint, Refusal):
            raise InputError(f"joint sites: {joint.reason}", next_step="group only sites that are alike")
        leads[joint.name] = joint
        absorbed |= {site.name for site in members[1:]}
    return [leads.get(site.name, site) for site in sites if site.name not in absorbed]


def check_groups(groups: Sequence[Sequence[str]], sites: Sequence[str]) -> None:
    """Raise InputError for a name that is no site, or that stands in two groups."""
    names = [name for group in groups for name in group]
    check_known((name for name in names if name not in set(sites)), sites, "joint= names")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"joint= names the site {twice[0]!r} twice", next_step="name each site in one group")


def joint_groups(plan: Plan) -> list[list[str]]:
    """Return the groups of sites that share factors in a plan.

    Raises:
        InputError: members with different factorizations or ranks.
    """
    groups: dict[str, list[str]] = {}
    forms: dict[str, set[object]] = {}
    for decision in plan:
        if decision.joint is not None and not decision.dense:
            groups.setdefault(decision.joint, []).append(decision.site)
            forms.setdefault(decision.joint, set()).add((decision.factorization, decision.rank))
    for name, found in forms.items():
        if len(found) > 1:
            raise InputError(
                f"the plan gives the joint group {name!r} ({', '.join(groups[name])}) different ranks or methods",
                allowed="one factorization and rank for all sites of a group",
            )
    return list(groups.values())
