"""ADMM: train a dense network under a rank constraint, so that it loses little when it is decomposed at the end.

Each constrained weight W has a target Z of the wanted rank and a scaled dual U (Yin et al. 2021, CVPR):

    start    Z = W, U = 0
    step     add  rho (W - Z + U),  the gradient of the penalty  rho/2 ||W - Z + U||^2,  to the gradient of the loss
    update   Z <- project(W + U),  U <- U + W - Z;     rho is five times as large after 85 % of the epochs

``project`` factors a weight at the ranks of the plan and composes the factors again. When rho grows, U shrinks by the
same factor, because U is the multiplier divided by rho (Boyd et al. 2011, section 3.4.1). A step costs O(|W|), and an
update costs one decomposition of the model. Z and U each take as much memory as the constrained weights. The
architecture, the loss and the optimizer's weight decay do not change.

The constraints of ADMM: each is a weight that trains, with its projection onto the weights of a wanted rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.algebra import Layout, Operator, relative_error
from surgery.errors import InputError, Refusal
from surgery.factorizations import Ranks, named
from surgery.kinds.layers.modules import stored_as
from surgery.passes.decompose import decompose
from surgery.passes.preview import plan as make_plan
from surgery.passes.results import DecomposeResult
from surgery.plans.plan import Plan
from surgery.plans.rules import RankSpec
from surgery.sites import Site
from surgery.training.hooks import after_gradients, is_fused
from surgery.training.propose import sites_of
from surgery.training.ranks import untrained
from surgery.training.wrappers import agree, group_of, unwrap

__all__ = ["ADMM", "PROJECTING", "Constraint", "constrain"]

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


_VERSION = 1
_LATE, _GROWTH = 0.85, 5.0  # Yin et al. 2021


class ADMM:
    """Train a dense model under a rank constraint, then decompose it.

        run = ADMM(model, optimizer, "keep_params=0.5", example_inputs=x, factorization="tt", epochs=20)
        for epoch in range(20):
            train_one_epoch(run.model, run.optimizer)
            run.end_epoch(epoch)
        small = run.finish().model          # fine-tune it, with a new optimizer

    The gradient of the penalty is added when the optimizer steps, after clipping and unscaling; the loss itself does
    not change. ``plan`` holds the ranks. ``residuals`` holds ``||W - Z|| / ||W||`` of each site at each update; it
    falls as the weights approach their rank.

    Args:
        model: an nn.Module; it may be compiled, or distributed (then all processes make the same calls).
        optimizer: any optimizer that follows gradients, such as SGD, Adam or AdamW, and is not fused.
        ranks: any rule that ``surgery.plan`` takes.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        factorization: "auto", "tt", "tr", "tucker", "svd" or "spatial", the factorizations that project.
        rho: weight of the penalty, above 0. Between two updates SGD moves a weight about ``rho`` x learning rate
            x steps of its way to Z. If that product is far below 1, as with 1e-3 over few epochs, little happens.
        epochs: total number of epochs. Rho grows when 85 % of them are done, and never if the total is not given.
        every: steps between two updates; None updates at each ``end_epoch``, as is usual.
        include, exclude: glob patterns of site names.

    Raises:
        InputError: an argument is not allowed; the optimizer trains no weight of the plan; the model is sharded.
        RankError: ranks are out of bounds, or a budget cannot be met.
        CaptureError: the graph of the model can be neither traced nor exported.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        ranks: RankSpec,
        *,
        example_inputs: Any,
        factorization: str = "auto",
        rho: float = 1e-3,
        epochs: int | None = None,
        every: int | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        _check(optimizer, factorization, rho, epochs, every)
        self.model, self.optimizer, self._inputs = model, optimizer, example_inputs
        self._root, self._epochs, self._every = unwrap(model), epochs, every
        self.rho, self._late, self._steps = float(rho), False, 0
        self._group = group_of(model)
        options: dict[str, Any] = {
            "ranks": ranks,
            "factorization": factorization,
            "include": include,
            "exclude": exclude,
        }
        plan = agree(make_plan(self._root, example_inputs, **options) if self._leads else None, self._group)
        self.plan, self.constraints = constrain(self._root, optimizer, sites_of(self._root, example_inputs), plan)
        self.residuals: tuple[dict[str, float], ...] = ()
        self._handles = (
            optimizer.register_step_pre_hook(self._add_penalty),
            optimizer.register_step_post_hook(self._count),
        )

    def penalty(self) -> float:
        """Return the present value of ``rho/2 sum ||W - Z + U||^2``, to report it; do not add it to the loss."""
        gaps = [torch.linalg.vector_norm(constraint.gap.double()).square() for constraint in self.constraints]
        return self.rho / 2 * float(torch.stack(gaps).sum())

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Record the end of an epoch (the first is 0): update Z and U unless ``every`` is given, and raise rho if due.

        Returns the latest residual of each site by name.
        """
        if self._every is None:
            self._update()
        if self._epochs is not None and not self._late and epoch + 1 >= _LATE * self._epochs:
            # Example of 20 epochs: rho grows at the end of the 17th. U is the multiplier over rho,
            # and the multiplier stays.
            self._late = True
            self.rho *= _GROWTH
            for constraint in self.constraints:
                constraint.dual.div_(_GROWTH)
        return self.residuals[-1] if self.residuals else {}

    def finish(self) -> DecomposeResult[nn.Module]:
        """End the run: remove the hooks from the optimizer, decompose the model by the plan and return the result.

        The model itself stays dense; the result holds a factored copy.
        """
        for handle in self._handles:
            handle.remove()
        return decompose(self._root, self._inputs, ranks=self.plan)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, with the states of model and optimizer, as tensors and plain values."""
        return {
            "version": _VERSION,
            "plan": self.plan.to_json(),
            "rho": self.rho,
            "late": self._late,
            "steps": self._steps,
            "targets": {constraint.name: constraint.target.clone() for constraint in self.constraints},
            "duals": {constraint.name: constraint.dual.clone() for constraint in self.constraints},
            "residuals": [dict(row) for row in self.residuals],
            "model": self._root.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run that the state was taken from, with the plan in that state.

        The caller loads schedulers, scalers and random states.

        Raises:
            InputError: the state belongs to another model or version.
        """
        if state.get("version") != _VERSION or "duals" not in state:
            raise InputError("this is not a state of ADMM", next_step="give what state_dict() returned")
        plan, sites = Plan.from_json(state["plan"]), sites_of(self._root, self._inputs)
        names = [site.name for site in sites]
        if names != [decision.site for decision in plan]:
            raise InputError("the state belongs to a model with other sites", allowed=", ".join(names))
        self._root.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plan, self.constraints = constrain(self._root, self.optimizer, sites, plan)
        for constraint in self.constraints:
            constraint.target.copy_(state["targets"][constraint.name])
            constraint.dual.copy_(state["duals"][constraint.name])
        self.rho, self._late, self._steps = state["rho"], state["late"], state["steps"]
        self.residuals = tuple(dict(row) for row in state["residuals"])

    @property
    def _leads(self) -> bool:
        """Whether this process decides for its group: it runs alone, or is rank 0."""
        return self._group is None or self._group.rank() == 0

    @torch.no_grad()
    def _update(self) -> None:
        found = [constraint.project() for constraint in self.constraints] if self._leads else None
        targets = agree(found, self._group)
        for constraint, target in zip(self.constraints, targets, strict=True):
            constraint.update(target)
        self.residuals = (*self.residuals, {constraint.name: constraint.residual for constraint in self.constraints})

    def _count(self, *_: Any) -> None:
        self._steps += 1
        if self._every is not None and self._steps % self._every == 0:
            self._update()

    def _add_penalty(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(self._add_gradients, args, kwargs)

    @torch.no_grad()
    def _add_gradients(self) -> None:
        # A hook before the step sees gradients that are unscaled and clipped, so rho means the same in mixed precision.
        groups = {id(weight): group for group in self.optimizer.param_groups for weight in group["params"]}
        for constraint in self.constraints:
            weight = constraint.weight
            slope = -self.rho if groups[id(weight)].get("maximize") else self.rho
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.add_(constraint.gap, alpha=slope)


def _check(optimizer: Optimizer, factorization: str, rho: float, epochs: int | None, every: int | None) -> None:
    if is_fused(optimizer):
        raise InputError("ADMM with a fused optimizer", next_step="make the optimizer with fused=False")
    if factorization not in PROJECTING:
        raise InputError(f"factorization={factorization!r} is not a projection", allowed=", ".join(PROJECTING))
    if not 0 < rho < float("inf"):
        raise InputError(f"rho={rho}", allowed="numbers above 0, such as 1e-3")
    for name, value in (("epochs", epochs), ("every", every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r}", allowed="whole numbers from 1, or None")
