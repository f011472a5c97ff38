"""Values that are remembered while they take no more than so many bytes together; the longest unused go first.

chains = Recent(100, len)
chains.get("a", lambda: bytes(60))     makes it
chains.get("b", lambda: bytes(60))     makes it; "a" has to go, since both take 120
chains.get("b", lambda: bytes(60))     the same object
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Recent"]

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class Recent(Generic[_Key, _Value]):
    """Remembers values by key; ``size`` says how many bytes one takes. The latest stays, whatever it takes."""

    def __init__(self, most: int, size: Callable[[_Value], int]) -> None:
        self._most, self._size = most, size
        self._held: dict[_Key, tuple[_Value, int]] = {}  # the longest unused first

    def get(self, key: _Key, make: Callable[[], _Value]) -> _Value:
        """Return the value of a key, made if it is not remembered."""
        found = self._held.pop(key, None)
        if found is None:
            value = make()
            found = value, self._size(value)
        self._held[key] = found
        total = sum(size for _, size in self._held.values())
        for old in list(self._held)[:-1]:
            if total <= self._most:
                break
            total -= self._held.pop(old)[1]
        return found[0]
