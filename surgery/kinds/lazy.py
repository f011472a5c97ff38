"""A mapping that computes each value when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

__all__ = ["Lazy"]

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
