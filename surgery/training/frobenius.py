"""Frobenius decay: weight decay of what the factors compose to, in the place of that of the factors themselves.

    weight decay         wd/2 sum_k ||F_k||^2     gradient wd F_k
    Frobenius decay      wd/2 ||W(F)||^2          gradient wd J_k^T W     (Khodak et al. 2021)

The optimizer goes on to decay each factor, so a hook before its step makes up for it. Where the decay is part of the
gradient (SGD, Adam) it adds ``wd (J^T W - F)`` to the gradient. Where it is decoupled (AdamW, whose step starts with
``F <- (1 - lr wd) F``) it replaces F by ``(F - lr wd J^T W) / (1 - lr wd)``, which the step turns into
``F - lr wd J^T W``. A group with a weight decay of 0 is left alone.

``||W||^2`` takes no W where the chain has neither branches nor groups of its own, and kernels that share no axis. With
G the Gram matrix of the channels between two factors, over all that is before,

    G_0 = 1,    G_k = sum_t K_k[t] G_{k-1} K_k[t]^T,    ||W||^2 = tr G_N          (t: the taps of the kernel)

which for channels of a layer n, ranks r and t taps in the widest factor costs O(n r^2 + t r^3), and not the O(t r n^2)
of W. Other chains are composed.

Gradients must be those of the loss when the hook sees them; a fused optimizer that takes scaled ones is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.chain import Chain
from surgery.errors import CheckError, InputError, Refusal
from surgery.operators import Operator
from surgery.training.closures import after_gradients

__all__ = ["FrobeniusDecay", "product_gradients", "squared_norm"]

Fill = Callable[[Sequence[Tensor]], Chain]
Bound = tuple[list[nn.Parameter], Fill]


class FrobeniusDecay:
    """The hook on an optimizer, for the factors that it is given; none until then."""

    def __init__(self, optimizer: Optimizer) -> None:
        if any(group.get("fused") for group in optimizer.param_groups):
            raise InputError("Frobenius decay with a fused optimizer", next_step="make the optimizer with fused=False")
        self._sites: tuple[Bound, ...] = ()
        self._handle = optimizer.register_step_pre_hook(self._correct)

    def watch(self, sites: Sequence[Bound]) -> None:
        """Take these factors, each row with what makes its chain, instead of those so far."""
        self._sites = tuple(sites)

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()

    def _correct(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(lambda: self._decay(optimizer), args, kwargs)

    def _decay(self, optimizer: Optimizer) -> None:
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for factors, fill in self._sites:
            group = groups.get(id(factors[0]))
            if group is None or not group.get("weight_decay"):
                continue
            decays = product_gradients(factors, fill)
            for factor, decay in zip(factors, decays, strict=True):
                if factor.grad is not None:
                    _apply(factor, decay, group)


def product_gradients(factors: Sequence[Tensor], fill: Fill) -> list[Tensor]:
    """Return the gradients of ``||W(F)||^2 / 2`` by the factors, ``J_k^T W``."""
    with torch.enable_grad():
        leaves = [factor.detach().requires_grad_() for factor in factors]
        return list(torch.autograd.grad(squared_norm(fill(leaves)) / 2, leaves))


def squared_norm(chain: Chain) -> Tensor:
    """Return ``||W||^2`` of the weight that a chain composes to, differentiable."""
    operators = [step for step in chain.steps if isinstance(step, Operator)]
    kernels = [operator.kernel for operator in operators]
    plain = len(operators) == len(chain.steps) and len({kernel.shape[0] for kernel in kernels}) == 1
    if not plain or any(sum(n > 1 for n in axis) > 1 for axis in zip(*(k.shape[3:] for k in kernels), strict=True)):
        operator = chain.compose()
        if isinstance(operator, Refusal):
            raise CheckError(f"the factors are not one operator: {operator.reason}")
        return operator.weight.square().sum()
    rows = [kernel.reshape(*kernel.shape[:3], -1).transpose(2, 3) for kernel in kernels]  # (groups, out, taps, in)
    *before, last = rows
    gram: Tensor | None = None
    for row in before:
        moved = _times(row, gram)
        gram = moved.flatten(2) @ row.flatten(2).mT
    return (_times(last, gram) * last).sum()


def _times(row: Tensor, gram: Tensor | None) -> Tensor:
    return row if gram is None else (row.flatten(1, 2) @ gram).view(row.shape)


@torch.no_grad()
def _apply(factor: nn.Parameter, decay: Tensor, group: dict[str, Any]) -> None:
    strength = float(group["weight_decay"])
    if group.get("decoupled_weight_decay"):
        share = float(group["lr"]) * strength
        factor.sub_(decay, alpha=share).div_(1 - share)
    elif factor.grad is not None:
        sign = -1 if group.get("maximize") else 1
        factor.grad.add_(decay - factor, alpha=sign * strength)
