"""Carry out a plan: fit its chains, splice them in, check that they run, and say what became of each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery.passes.factoring import Made
from surgery.passes.fitter import Fitter
from surgery.passes.original import Original, Spliced
from surgery.plans.plan import Plan

__all__ = ["CarriedOut", "as_it_went", "carry_out"]


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
    for name, one in made.items():
        plan = plan.replaced(one.carried(plan[name]))
    for name, reason in refused.items():
        if name not in made and not plan[name].dense:
            plan = plan.replaced(plan[name].left_dense(reason))
    return plan
