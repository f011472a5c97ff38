"""apply: the structure of a plan for a fresh model, so that the state of a factored one fits it."""

from __future__ import annotations

from torch import nn

from surgery.errors import InputError, only_own_errors
from surgery.files.pretrained import note_record
from surgery.files.structure import give_structure
from surgery.plans.joining import joint_groups
from surgery.plans.plan import Plan

__all__ = ["apply"]


@only_own_errors
def apply(plan: Plan, model: nn.Module) -> nn.Module:
    """Give a dense module the structure of a plan, in place, with factors of zeros, and return it.

    A state of the model that the plan was carried out on then fits, by any tool's ``load_state_dict``:

        result = surgery.decompose(net, inputs)
        fresh = surgery.apply(result.plan, Net())
        fresh.load_state_dict(result.model.state_dict())

    Nothing is captured or run. A model that is nothing but one layer with packed weights cannot be changed in place:
    take what is returned.

    Raises:
        InputError: the plan is something else; the model is a graph, has no such layer, or is factored already.
        RankError: a rank that a layer cannot take.
    """
    if not isinstance(plan, Plan):
        what = f"the plan is a {type(plan).__name__}"
        raise InputError(what, allowed="surgery.Plan", next_step="give the plan first, then the model")
    sites = {d.site: (d.factorization, d.rank) for d in plan if d.factorization is not None and d.rank is not None}
    made = give_structure(model, sites, joint_groups(plan))
    note_record(made)
    return made
