"""Hooks of models and optimizers that train: they hold their owner weakly, and change gradients before a step.

A step may take a closure that computes the gradients; Lightning always passes one. The ``zero_grad`` in the closure
would undo what a pre-hook did to the gradients before it, so the hook must act after the closure.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["WeakHook", "after_gradients", "is_fused"]


class WeakHook:
    """Calls a method of an object for as long as the object lives.

    A copy of a module copies its hooks. If they were bound methods, the copy would contain their owner as well: a run
    with its optimizer. A copy of this hook calls nothing.

    >>> class Owner:
    ...     def greet(self, name: str) -> str:
    ...         return f"hello {name}"
    >>> owner = Owner()
    >>> hook = WeakHook(owner.greet)
    >>> hook("you")
    'hello you'
    >>> import copy
    >>> copy.deepcopy(hook)("you")
    """

    def __init__(self, act: Callable[..., Any] | None = None) -> None:
        self._act = None if act is None else weakref.WeakMethod(act)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns, or None if the object is gone."""
        act = None if self._act is None else self._act()
        return None if act is None else act(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakHook:
        return WeakHook()

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()


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
