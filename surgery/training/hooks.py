"""Hooks that hold their owner weakly, and do nothing in copies and pickles of the module that they are on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["WeakHook"]


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
