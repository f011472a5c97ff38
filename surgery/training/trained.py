"""Which sites train: those whose weight gets gradients and is in a group of the optimizer.

The others stay dense in a run, because factors only approximate a weight, and no training would make up for the error.
Sites with a hook on the weight itself stay dense too, as with an optimizer that steps in the backward pass: the factors
are other parameters, which the hook would not see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.kinds.layers.within import Within, within_of
from surgery.plans.plan import Plan
from surgery.sites.site import Site

__all__ = ["Survey", "as_pattern", "hooked", "keep_dense", "untrained"]


@dataclass(frozen=True)
class Survey:
    """The sites of a model that trains.

    ``untrained`` maps the sites that cannot be trained in factors to the reasons. ``hooked`` does so for the modules
    that are not sites because their weight has a hook on its gradient.
    """

    sites: tuple[Site, ...]
    untrained: Mapping[str, str]
    hooked: Mapping[str, str]

    @property
    def left(self) -> dict[str, str]:
        """All names that must stay dense, with the reasons."""
        return dict(self.untrained) | dict(self.hooked)


_HOOKED = "its weight has a hook on its gradient, which factors do not have"


def hooked(root: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map the modules whose weight has a hook on its gradient to the reason to leave them alone."""
    modules = dict(root.named_modules(remove_duplicate=False))
    weights = {name: modules[name]._parameters.get("weight") for name in names if name in modules}
    return {name: _HOOKED for name, weight in weights.items() if weight is not None and _has_hooks(weight)}


def untrained(root: nn.Module, optimizer: Optimizer, sites: Sequence[Site]) -> dict[str, str]:
    """Map each site that cannot be trained in factors to the reason; sites without a module are not judged here."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    modules = dict(root.named_modules(remove_duplicate=False))
    reasons = {}
    for site in sites:
        module = modules.get(site.name)
        weight = None if module is None else module._parameters.get("weight")
        reason = None if weight is None else _refuse(weight, held)
        within = None if module is None else within_of(module)
        if isinstance(within, Within) and within.weight not in within.exact:
            reason = "its weight is computed from other parameters, which train"
        if reason is not None:
            reasons[site.name] = reason
    return reasons


def _refuse(weight: nn.Parameter, held: set[int]) -> str | None:
    if not weight.requires_grad:
        return "its weight does not train"
    if id(weight) not in held:
        return "its weight does not train: it is not in any param group of the optimizer"
    if _has_hooks(weight):
        return _HOOKED
    return None


def _has_hooks(weight: Tensor) -> bool:
    """Whether the weight has a hook on its gradient."""
    # The last name is that of torch's own optimizer-in-backward.
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks", "_in_backward_optimizers")
    return any(getattr(weight, kind, None) for kind in kinds)


def keep_dense(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """Return the plan with these sites dense, each with its reason."""
    for name, reason in reasons.items():
        plan = plan.edit(name, rank=None, reason=reason)
    return plan


def as_pattern(name: str) -> str:
    """Return the glob pattern that matches this name only.

    >>> from fnmatch import fnmatchcase
    >>> fnmatchcase("a[0].b", as_pattern("a[0].b")), fnmatchcase("a0.b", as_pattern("a[0].b"))
    (True, False)
    """
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
