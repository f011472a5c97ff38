"""The constraints of ADMM: each is a weight that trains, with its projection onto the weights of a wanted rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.algebra.chain import relative_error
from surgery.algebra.operators import Layout, Operator
from surgery.errors import InputError, Refusal
from surgery.factorizations import Ranks, named
from surgery.kinds.layers.modules import stored_as
from surgery.plans.plan import Plan
from surgery.sites.site import Site
from surgery.training.trained import untrained

__all__ = ["PROJECTING", "Constraint", "constrain"]

PROJECTING = ("auto", "tt", "tr", "tucker", "svd", "spatial")


@dataclass(frozen=True, eq=False)
class Constraint:
    """One weight and the rank that it must reach; ``target`` is Z and ``dual`` is U, both changed in place."""

    name: str
    weight: nn.Parameter
    operator: Operator
    factorization: str
    rank: Ranks
    stored: Layout
    target: Tensor
    dual: Tensor

    @property
    def gap(self) -> Tensor:
        """``W - Z + U``, whose squared norm is the penalty."""
        return self.weight.detach() - self.target + self.dual

    @property
    def residual(self) -> float:
        """``||W - Z|| / ||W||``."""
        return relative_error(self.target, self.weight.detach())

    def project(self) -> Tensor:
        """Return ``W + U`` projected to the rank.

        Raises:
            InputError: there are no good factors at this rank, or the weight has values that are not finite.
        """
        # Operators hold weights as (out, in); a module that stores (in, out) is transposed on the way in and out.
        wanted = self.weight.detach() + self.dual
        turned = wanted.mT.contiguous() if self.stored == "in_out" else wanted
        chain = named(self.factorization).factor(replace(self.operator, weight=turned, bias=None), self.rank)
        composed = chain if isinstance(chain, Refusal) else chain.compose()
        if isinstance(composed, Refusal):
            raise InputError(f"{self.name} cannot be projected: {composed.reason}", next_step="try other ranks")
        return composed.weight.mT if self.stored == "in_out" else composed.weight

    def update(self, target: Tensor) -> None:
        """Store a new Z, and take the dual step ``U <- U + W - Z``."""
        self.target.copy_(target)
        self.dual.add_(self.weight.detach()).sub_(self.target)


def constrain(
    root: nn.Module, optimizer: Optimizer, sites: Sequence[Site], plan: Plan
) -> tuple[Plan, tuple[Constraint, ...]]:
    """Return the plan and its constraints; in the returned plan, sites whose weight does not train are dense.

    Raises:
        InputError: no site is left to constrain.
    """
    reasons = untrained(root, optimizer, sites)
    modules = dict(root.named_modules(remove_duplicate=False))
    found = []
    for site, decision in zip(sites, plan, strict=True):
        if decision.factorization is None or decision.rank is None:
            continue
        module = modules.get(site.name)
        weight = None if module is None else module._parameters.get("weight")
        if module is None or weight is None or site.name in reasons:
            reason = "the optimizer trains no parameter that is the weight of this site alone"
            why = f": {reasons[site.name]}" if site.name in reasons else ""
            plan = plan.edit(site.name, rank=None, reason=f"{reason}{why}")
            continue
        operator, start = site.operator.to(device="meta"), weight.detach()
        ranked = (decision.factorization, decision.rank, stored_as(type(module)))
        found.append(Constraint(site.name, weight, operator, *ranked, start.clone(), torch.zeros_like(start)))
    if not found:
        dense = dict.fromkeys(f"{decision.site}: {decision.reason}" for decision in plan)
        raise InputError(f"there is nothing to constrain: {'; '.join(dense)}", next_step="give other ranks")
    return plan, tuple(found)
