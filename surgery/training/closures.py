"""Change gradients between the backward pass and the step, in an optimizer's step pre-hook, with or without a closure.

A step may take a closure that computes the gradients; Lightning always passes one. The ``zero_grad`` in the closure
would undo what a pre-hook did to the gradients before it, so the hook must act after the closure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["after_gradients", "is_fused"]


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is fused: it may receive scaled gradients, and a pre-hook adds unscaled values."""
    return any(group.get("fused") for group in optimizer.param_groups)


def after_gradients(act: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``act`` now, or after the closure among the step's arguments; return what the pre-hook must return.

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
