"""Untrusted JSON, read value by value: each text is a string, each number finite, and every refusal says where."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from surgery.errors import InputError

__all__ = ["LARGEST", "Row", "parse_json"]

LARGEST = 1e30  # a larger number is not a measurement and could overflow sums; 1 / this could overflow quotients
_MOST = 2**63 - 1  # what a tensor may have of anything
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 1


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is none, nests too deep, says NaN or Infinity, or has an object with two values of one name.
    """
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nests too deep") from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"says {text}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"has {_SHORT.repr(name)} twice in one place")
        found[name] = value
    return found


@dataclass(frozen=True)
class Row:
    """One JSON object, where it stands in its document, and what to do if a value is wrong; for error messages."""

    values: Mapping[str, Any]
    where: str
    next_step: str

    @classmethod
    def of(cls, value: Any, where: str, next_step: str) -> Row:
        """Return a value as a row; raises InputError unless it is an object."""
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a JSON object", next_step)
        return cls(value, where, next_step)

    def text(self, key: str) -> str:
        """Return a text; an empty one where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "text")
        return value or ""

    def maybe(self, key: str) -> float | None:
        """Return a number, or None where there is none."""
        return None if self.values.get(key) is None else self.number(key)

    def number(self, key: str) -> float:
        """Return a finite number."""
        return self._number(self.values.get(key), f"{self.where}.{key}")

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers."""
        return tuple(self._number(item, f"{self.where}.{key}") for item in self.items(key))

    def count(self, key: str) -> int:
        """Return a whole number from 0 that fits in 64 bits."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
            self.refuse(key, f"a whole number from 0 to {_MOST}")
        return value

    def truth(self, key: str) -> bool:
        """Return true or false."""
        value = self.values.get(key)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def pair(self, key: str) -> tuple[float, float] | None:
        """Return two finite numbers, or None where there are none."""
        value = self.values.get(key)
        return None if value is None else self.pair_of(value, key)

    def pair_of(self, value: Any, key: str) -> tuple[float, float]:
        """Return a value of this row as two finite numbers."""
        where = f"{self.where}.{key}"
        if not isinstance(value, list) or len(value) != 2:
            self._refuse(where, value, "two numbers")
        return self._number(value[0], where), self._number(value[1], where)

    def items(self, key: str) -> list[Any]:
        """Return a list; an empty one where there is none."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            self.refuse(key, "a list")
        return list(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, none of them empty."""
        found = self.items(key)
        for item in found:
            if not isinstance(item, str) or not item:
                self._refuse(f"{self.where}.{key}", item, "texts that are not empty")
        return tuple(found)

    def row(self, key: str) -> Row:
        """Return an object; an empty one where there is none."""
        return Row.of(self.values.get(key, {}), f"{self.where}.{key}", self.next_step)

    def rows(self, key: str) -> list[Row]:
        """Return a list of objects."""
        return [Row.of(item, f"{self.where}.{key}[{i}]", self.next_step) for i, item in enumerate(self.items(key))]

    def said(self, key: str) -> str:
        """Return a text or a number, as a text."""
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value or ""
        return f"{self._number(value, f'{self.where}[{_SHORT.repr(key)}]'):g}"

    def only(self, *known: str) -> None:
        """Raise InputError where the object has other values than these."""
        for key in self.values:
            if key not in known:
                self._refuse(f"{self.where}[{_SHORT.repr(key)}]", self.values[key], ", ".join(known))

    def refuse(self, key: str, allowed: str) -> NoReturn:
        """Raise InputError for the value of a key."""
        self._refuse(f"{self.where}.{key}", self.values.get(key), allowed)

    def _number(self, value: Any, where: str) -> float:
        # ``not <=`` instead of ``>``, so that NaN is refused.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            self._refuse(where, value, f"a number of at most {LARGEST:g}")
        return float(value) if abs(value) * LARGEST > 1 else 0.0  # below 1 / LARGEST it counts as zero

    def _refuse(self, where: str, value: Any, allowed: str) -> NoReturn:
        raise _wrong(where, value, allowed, self.next_step)


def _wrong(where: str, value: Any, allowed: str, next_step: str) -> InputError:
    return InputError(f"{where} is {_SHORT.repr(value)}", allowed=allowed, next_step=next_step)
