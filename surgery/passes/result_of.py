"""The result of a decomposition as a value, from the plan as it went and the measured errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import CheckError
from surgery.passes.original import Original
from surgery.passes.results import Change, DecomposeResult
from surgery.plans.plan import Decision, Plan
from surgery.sites.site import Site, Skip, Totals

__all__ = ["result_of"]


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
