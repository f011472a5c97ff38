"""Frobenius decay: weight decay of what the factors compose to, in the place of that of the factors themselves.

    weight decay         wd/2 sum_k ||F_k||^2     gradient wd F_k
    Frobenius decay      wd/2 ||W(F)||^2          gradient wd J_k^T W     (Khodak et al. 2021)

The optimizer goes on to decay each factor, so a hook before its step makes up for it. Where the decay is part of the
gradient (SGD, Adam) it adds ``wd (J^T W - F)`` to the gradient. Where it is decoupled (AdamW, whose step starts with
``F <- (1 - lr wd) F``) it replaces F by ``(F - lr wd J^T W) / (1 - lr wd)``, which the step turns into
``F - lr wd J^T W``. A group with a weight decay of 0 is left alone. One composition and one backward pass of it a step.

Gradients must be those of the loss when the hook sees them; a fused optimizer that takes scaled ones is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.errors import InputError
from surgery.training.closures import after_gradients
from surgery.training.transport import Compose

__all__ = ["FrobeniusDecay", "product_gradients"]

Bound = tuple[list[nn.Parameter], Compose]


class FrobeniusDecay:
    """The hook on an optimizer, for the factors that it is given; none until then."""

    def __init__(self, optimizer: Optimizer) -> None:
        if any(group.get("fused") for group in optimizer.param_groups):
            raise InputError("Frobenius decay with a fused optimizer", next_step="make the optimizer with fused=False")
        self._sites: tuple[Bound, ...] = ()
        self._handle = optimizer.register_step_pre_hook(self._correct)

    def watch(self, sites: Sequence[Bound]) -> None:
        """Take these factors, each row with what composes it, instead of those so far."""
        self._sites = tuple(sites)

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()

    def _correct(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(lambda: self._decay(optimizer), args, kwargs)

    def _decay(self, optimizer: Optimizer) -> None:
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for factors, compose in self._sites:
            group = groups.get(id(factors[0]))
            if group is None or not group.get("weight_decay"):
                continue
            decays = product_gradients(factors, compose)
            for factor, decay in zip(factors, decays, strict=True):
                if factor.grad is not None:
                    _apply(factor, decay, group)


def product_gradients(factors: Sequence[Tensor], compose: Compose) -> list[Tensor]:
    """Return the gradients of ``||W(F)||^2 / 2`` by the factors, ``J_k^T W``."""
    with torch.enable_grad():
        leaves = [factor.detach().requires_grad_() for factor in factors]
        return list(torch.autograd.grad(compose(leaves).square().sum() / 2, leaves))


@torch.no_grad()
def _apply(factor: nn.Parameter, decay: Tensor, group: dict[str, Any]) -> None:
    strength = float(group["weight_decay"])
    if group.get("decoupled_weight_decay"):
        share = float(group["lr"]) * strength
        factor.sub_(decay, alpha=share).div_(1 - share)
    elif factor.grad is not None:
        sign = -1 if group.get("maximize") else 1
        factor.grad.add_(decay - factor, alpha=sign * strength)
