"""What is to be done between the gradients and the step, in an optimizer's step pre-hook, with a closure or without.

A step may be given a closure that computes the gradients inside of it, as Lightning's always is: what a pre-hook did to
the gradients before, the closure's ``zero_grad`` undoes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["after_gradients", "is_fused"]


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether an optimizer may be given scaled gradients: a pre-hook would add to them what is not scaled."""
    return any(group.get("fused") for group in optimizer.param_groups)


def after_gradients(act: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Act now, or after the closure among a step's arguments; return what the pre-hook is to return.

    >>> said = []
    >>> after_gradients(lambda: said.append("now"), ("optimizer",), {})
    >>> args, kwargs = after_gradients(lambda: said.append("after"), ("optimizer", lambda: said.append("closure")), {})
    >>> args[1]()
    >>> said
    ['now', 'closure', 'after']
    """
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    if closure is None:
        return act()

    def closure_and_act() -> Any:
        loss = closure()
        act()
        return loss

    others = {key: value for key, value in kwargs.items() if key != "closure"}
    return (args[0], closure_and_act, *args[2:]), others
