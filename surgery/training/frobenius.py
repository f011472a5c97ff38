"""Frobenius decay: weight decay on the weight that the factors compose to, in place of decay on the factors.

    weight decay         wd/2 sum_k ||F_k||^2     gradient wd F_k
    Frobenius decay      wd/2 ||W(F)||^2          gradient wd J_k^T W     (Khodak et al. 2021)

The optimizer still decays each factor, so a hook before its step adds the difference C = J^T W - F. Where the decay is
part of the gradient (SGD, Adam), the hook adds ``wd C`` to the gradient. Where it is decoupled (AdamW, whose step
starts with ``F <- (1 - lr wd) F``), the hook subtracts ``lr wd / (1 - lr wd) C`` from F, which the step turns into
``F - lr wd J^T W``. The hook leaves a group with a weight decay of 0 alone.

W is not formed if the chain has no branches, all its operators have the same groups, and at most one kernel extends
along each spatial axis. Let G_k be the Gram matrix of the channels after factor k over all factors up to k, and H_k
the Gram matrix of the same channels over all factors after k (t: taps of a kernel):

    G_0 = 1,  G_k = sum_t K_k[t] G_{k-1} K_k[t]^T        H_N = 1,  H_{k-1} = sum_t K_k[t]^T H_k K_k[t]

Then the gradient by K_k is ``H_k K_k G_{k-1}``. For a layer of n channels, rank r and t taps this costs
O(n r^2 + t r^3) in place of O(t r n^2). Other chains are composed. C changes slowly, so it is computed every
``_EVERY`` steps and reused in between. Each epoch computes it anew, so that a run resumed there goes on identically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

from surgery.algebra import Chain, Operator
from surgery.errors import CheckError, InputError, Refusal
from surgery.training.hooks import after_gradients, is_fused

__all__ = ["FrobeniusDecay", "can_decay", "product_gradients"]

Fill = Callable[[Sequence[Tensor]], Chain]
Bound = tuple[list[nn.Parameter], Fill]
_KNOWN = (SGD, Adam, AdamW, NAdam, RAdam)  # others may decay in other ways without saying so
_EVERY = 8  # ours: steps


class FrobeniusDecay:
    """The hook on an optimizer; it acts on the factors given to ``watch``, and does nothing before that."""

    def __init__(self, optimizer: Optimizer) -> None:
        if is_fused(optimizer):
            raise InputError("Frobenius decay with a fused optimizer", next_step="make the optimizer with fused=False")
        if not can_decay(optimizer):
            known = ", ".join(kind.__name__ for kind in _KNOWN)
            raise InputError(f"Frobenius decay with {type(optimizer).__name__}", allowed=known)
        self._sites: tuple[Bound, ...] = ()
        self._steps = 0
        self._changes: list[tuple[nn.Parameter, Tensor]] = []
        self._handle = optimizer.register_step_pre_hook(self._correct)

    def watch(self, sites: Sequence[Bound]) -> None:
        """Watch these factors, each site with the function that fills its chain, in place of the earlier ones."""
        self._sites = tuple(sites)
        self.renew()

    def renew(self) -> None:
        """Compute the gradients anew at the next step."""
        self._steps, self._changes = 0, []

    def remove(self) -> None:
        """Remove the hook from the optimizer."""
        self._handle.remove()

    def _correct(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(lambda: self._decay(optimizer), args, kwargs)

    def _decay(self, optimizer: Optimizer) -> None:
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        if self._steps % _EVERY == 0:
            sites = [site for site in self._sites if groups.get(id(site[0][0]), {}).get("weight_decay")]
            rows = (zip(factors, product_gradients(factors, fill), strict=True) for factors, fill in sites)
            self._changes = [(factor, decay.sub_(factor.detach())) for row in rows for factor, decay in row]
        self._steps += 1
        for factor, change in self._changes:
            if factor.grad is not None:
                _apply(factor, change, groups[id(factor)])


def can_decay(optimizer: Optimizer) -> bool:
    """Return whether this module knows how an optimizer decays its parameters, and the optimizer is not fused."""
    return type(optimizer) in _KNOWN and not is_fused(optimizer)


def product_gradients(factors: Sequence[Tensor], fill: Fill) -> list[Tensor]:
    """Return the gradient of ``||W(F)||^2 / 2`` by each factor, ``J_k^T W``, of the factor's shape."""
    leaves = [factor.detach() for factor in factors]
    chain = fill(leaves)
    kernels = _plain_kernels(chain)
    if kernels is None:
        with torch.enable_grad():
            return list(torch.autograd.grad(_energy(fill([leaf.requires_grad_() for leaf in leaves])), leaves))
    gradients = [torch.empty_like(leaf) for leaf in leaves]
    places = [operator.kernel for operator in fill(gradients).operators]  # views of gradients, in the kernels' layout
    for place, kernel in zip(places, _kernel_gradients(kernels), strict=True):
        # (g, out, taps, in) -> (g, out, in, taps), the layout of a kernel
        place.copy_(kernel.transpose(2, 3).reshape(place.shape))
    return gradients


def _plain_kernels(chain: Chain) -> list[Tensor] | None:
    """Return the kernels as (groups, out, taps, in), or None where W must be formed."""
    # ||W||^2 is a product of Gram matrices only if each tap of W is one product of taps. Two kernels of 3 taps along
    # one axis make 5 taps, of which the middle one is a sum of three products.
    kernels = [step.kernel for step in chain.steps if isinstance(step, Operator)]
    whole = len(kernels) == len(chain.steps) and len({len(kernel) for kernel in kernels}) == 1
    if not whole or any(sum(n > 1 for n in axis) > 1 for axis in zip(*(k.shape[3:] for k in kernels), strict=True)):
        return None
    return [kernel.reshape(*kernel.shape[:3], -1).transpose(2, 3) for kernel in kernels]


def _kernel_gradients(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Return ``H_k K_k G_{k-1}`` for each kernel (groups, out, taps, in)."""
    # before[k] is G_k for k = 0 .. N-1, with None for G_0 = 1. Then moved collects H_k K_k from the last kernel to the
    # first: H_N K_N = K_N, and H_k = sum_t K_{k+1}[t]^T (H_{k+1} K_{k+1})[t] from the entry before.
    # Example: for W = K_2 K_1 the gradients are K_2 (K_1 K_1^T) and (K_2^T K_2) K_1.
    before: list[Tensor | None] = [None]
    for kernel in kernels[:-1]:
        before.append(_times(kernel, before[-1]).flatten(2) @ kernel.flatten(2).mT)
    moved = [kernels[-1]]
    for k in range(len(kernels) - 2, -1, -1):
        after = moved[-1].flatten(1, 2).mT @ kernels[k + 1].flatten(1, 2)
        moved.append((after @ kernels[k].flatten(2)).view(kernels[k].shape))
    return [_times(kernel, gram) for kernel, gram in zip(reversed(moved), before, strict=True)]


def _times(kernel: Tensor, gram: Tensor | None) -> Tensor:
    return kernel if gram is None else (kernel.flatten(1, 2) @ gram).view(kernel.shape)


def _energy(chain: Chain) -> Tensor:
    operator = chain.compose()
    if isinstance(operator, Refusal):
        raise CheckError(f"the factors are not one operator: {operator.reason}")
    return operator.weight.square().sum() / 2


@torch.no_grad()
def _apply(factor: nn.Parameter, change: Tensor, group: dict[str, Any]) -> None:
    strength = float(group["weight_decay"])
    if group.get("decoupled_weight_decay"):
        # (1 - s) (F - s / (1 - s) C) = F - s F - s (J^T W - F) = F - s J^T W.
        share = float(group["lr"]) * strength  # the step multiplies F by 1 - share, so C is divided by it beforehand
        factor.sub_(change, alpha=share / (1 - share))
    elif factor.grad is not None:
        factor.grad.add_(change, alpha=-strength if group.get("maximize") else strength)
