"""What is found late: functions that a user names, and values that are computed when they are asked for."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

from surgery.errors import InputError

__all__ = ["Lazy", "import_function"]


def import_function(name: str, *, what: str, allowed: str) -> Callable[..., Any]:
    """Return the function, class or other callable of this name; modules in the current folder are found, too.

    ``what`` names the thing in errors, in front of its name, and ``allowed`` says what is expected.

    Raises:
        InputError: the name has another form, or names something that cannot be called.
        Exception: whatever importing the module raises, since that runs the user's own code.

    >>> import_function("math:gcd", what="the metric", allowed="module:function")(12, 18)
    6
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"{what} {name!r}", allowed=allowed)
    found: Any = _import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{what} {name!r} is a {type(found).__name__}", allowed=allowed)
    function: Callable[..., Any] = found
    return function


def _import_module(name: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


_K = TypeVar("_K")
_V = TypeVar("_V", covariant=True)


class Lazy(Mapping[_K, _V]):
    """A mapping over known keys; a function makes each value when it is first asked for.

    >>> squares = Lazy(range(10), lambda number: number**2)
    >>> squares[3], squares.get(10), len(squares)
    (9, None, 10)
    """

    def __init__(self, keys: Collection[_K], make: Callable[[_K], _V]) -> None:
        self._keys, self._make = keys, make
        self._made: dict[_K, _V] = {}

    def __getitem__(self, key: _K) -> _V:
        if key not in self._made:
            if key not in self._keys:
                raise KeyError(key)
            self._made[key] = self._make(key)
        return self._made[key]

    def __iter__(self) -> Iterator[_K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
