"""ADMM: training of a dense network under a rank constraint, so that it loses little when it is decomposed at the end.

For each constrained weight W, with Z of the wanted rank and the scaled dual U (Yin et al. 2021, CVPR):

    start    Z = W, U = 0
    step     the gradient of  rho/2 ||W - Z + U||^2,  which is  rho (W - Z + U),  comes on top of that of the loss
    update   Z <- project(W + U),  U <- U + W - Z;     rho is five times as large after 85 % of the epochs

``project`` is the factorization's own: factor at the ranks of the plan, and compose. Where rho grows, U shrinks by as
much: it is the multiplier over rho (Boyd et al. 2011, section 3.4.1). A step costs O(|W|), an update one decomposition
of the model; memory is that of Z and U. The architecture, the loss and the optimizer's decay stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from surgery.errors import InputError
from surgery.passes.decompose import decompose
from surgery.passes.preview import plan as make_plan
from surgery.passes.results import DecomposeResult
from surgery.plans.plan import Plan
from surgery.plans.rules import RankSpec
from surgery.training.closures import after_gradients, is_fused
from surgery.training.constraints import PROJECTING, constrain
from surgery.training.propose import sites_of
from surgery.training.wrappers import agree, group_of, unwrap

__all__ = ["ADMM"]

_VERSION = 1
_LATE, _GROWTH = 0.85, 5.0  # Yin et al. 2021


class ADMM:
    """Rank-constrained training of a dense model, and the decomposition that it leads to.

        run = ADMM(model, optimizer, "keep_params=0.5", example_inputs=x, factorization="tt", epochs=20)
        for epoch in range(20):
            train_one_epoch(run.model, run.optimizer)
            run.end_epoch(epoch)
        small = run.finish().model          # fine-tune it, with an optimizer of its own

    The penalty's gradient is added when the optimizer steps: after clipping and unscaling, with no change to the loss.
    ``plan`` has the ranks; ``residuals`` has ``||W - Z|| / ||W||`` of each site at each update, which falls as the
    weights come near their rank.

    Args:
        model: an nn.Module; may be compiled, or distributed (then all processes make the same calls).
        optimizer: any whose step follows gradients, as SGD, Adam, AdamW; not fused.
        ranks: any rule of ``surgery.plan``'s.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        factorization: "auto", "tt", "tr", "tucker", "svd" or "spatial": those that project.
        rho: weight of the penalty, above 0. Between two updates SGD takes a weight about ``rho`` x learning rate
            x steps of its way to Z: where that is far below 1, as with 1e-3 over few epochs, little happens.
        epochs: how many there will be: rho grows when 85 % of them are done, and never if they are not known.
        every: steps between two updates; None is one at each ``end_epoch``, as is usual.
        include, exclude: glob patterns of site names.

    Raises:
        InputError: arguments that cannot be used; a plan without a weight that this optimizer trains; a sharded model.
        RankError: ranks out of bounds, or a budget that cannot be met.
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
        sought: dict[str, Any] = {
            "ranks": ranks,
            "factorization": factorization,
            "include": include,
            "exclude": exclude,
        }
        plan = agree(make_plan(self._root, example_inputs, **sought) if self._leads else None, self._group)
        self.plan, self.constraints = constrain(self._root, optimizer, sites_of(self._root, example_inputs), plan)
        self.residuals: tuple[dict[str, float], ...] = ()
        self._handles = (
            optimizer.register_step_pre_hook(self._add_penalty),
            optimizer.register_step_post_hook(self._count),
        )

    def penalty(self) -> float:
        """Return ``rho/2 sum ||W - Z + U||^2`` as it is now, for a report: do not add it to the loss."""
        gaps = [torch.linalg.vector_norm(constraint.gap.double()).square() for constraint in self.constraints]
        return self.rho / 2 * float(torch.stack(gaps).sum())

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Note an epoch that is done (the first is 0): update Z and U, unless steps decide, and let rho grow in time.

        Returns the latest residual of each site.
        """
        if self._every is None:
            self._update()
        if self._epochs is not None and not self._late and epoch + 1 >= _LATE * self._epochs:
            self._late = True
            self.rho *= _GROWTH
            for constraint in self.constraints:
                constraint.dual.div_(_GROWTH)
        return self.residuals[-1] if self.residuals else {}

    def finish(self) -> DecomposeResult[nn.Module]:
        """End the run: take the hooks off the optimizer, and return what ``surgery.decompose`` makes by the plan.

        The model itself stays dense; the result has the factored one, a copy.
        """
        for handle in self._handles:
            handle.remove()
        return decompose(self._root, self._inputs, ranks=self.plan)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, the state of model and optimizer included; tensors and plain values."""
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
        """Make this run the one that the state was taken from: the plan is the state's.

        Schedulers, scalers and random states are the user's to load.

        Raises:
            InputError: the state is of another model or version.
        """
        if state.get("version") != _VERSION or "duals" not in state:
            raise InputError("this is no state of ADMM", next_step="give what state_dict() returned")
        plan, sites = Plan.from_json(state["plan"]), sites_of(self._root, self._inputs)
        names = [site.name for site in sites]
        if names != [decision.site for decision in plan]:
            raise InputError("the state is of a model with other sites", allowed=", ".join(names))
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
        """Whether this process decides: it is alone, or rank 0 of its group."""
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
        raise InputError(f"factorization={factorization!r} is no projection", allowed=", ".join(PROJECTING))
    if not 0 < rho < float("inf"):
        raise InputError(f"rho={rho}", allowed="numbers above 0, as 1e-3")
    for name, value in (("epochs", epochs), ("every", every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r}", allowed="whole numbers from 1, or None")
