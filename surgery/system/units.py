"""Sizes and rates as users write them: 2GB, 500M, 1GB/s, 10Gbit/s. One kB is 1000 bytes, as links and disks count."""

from __future__ import annotations

import re

from surgery.errors import InputError
from surgery.text import cut

__all__ = ["read_bytes", "read_rate"]

_LONGEST = 100  # letters of a text that are shown
_MOST = 1e18  # bytes, or bytes a second
_NUMBER = r"(\d{1,9}(?:\.\d{1,3})?) ?([KMGT]?)"


def read_bytes(value: str | float, name: str) -> int:
    """Return a number of bytes from a text such as 12G, 500M or 1.5GB, or from a number.

    Raises:
        InputError: any other text or number; ``name`` is what the message calls it.

    >>> read_bytes("1.5GB", "memory")
    1500000000
    """
    allowed = "a number of bytes, as 12G or 500M"
    if isinstance(value, str):
        found = re.fullmatch(rf"{_NUMBER}B?", value, re.ASCII | re.IGNORECASE)
        if found is None:
            raise InputError(f"{name} {cut(value, _LONGEST)!r}", allowed=allowed)
        return int(_scaled(found))
    return int(_checked(value, name, allowed))


def read_rate(value: str | float, name: str) -> float:
    """Return bytes a second from a text such as 1GB/s or 10Gbit/s (B is a byte, bit a bit), or from a number.

    Raises:
        InputError: any other text, or a rate that is not above 0; ``name`` is what the message calls it.

    >>> read_rate("1Gbit/s", "link")
    125000000.0
    """
    allowed = "bytes or bits a second above 0, as 1GB/s, 125MB/s or 10Gbit/s"
    rate: float
    if isinstance(value, str):
        found = re.fullmatch(rf"{_NUMBER}(B|bit)/s", value, re.ASCII | re.IGNORECASE)
        if found is None:
            raise InputError(f"{name} {cut(value, _LONGEST)!r}", allowed=allowed)
        rate = _scaled(found) / (8 if found[3].lower() == "bit" else 1)
    else:
        rate = float(_checked(value, name, allowed))
    if not rate > 0:
        raise InputError(f"{name} {value!r}", allowed=allowed)
    return rate


def _scaled(found: re.Match[str]) -> float:
    return float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")


def _checked(value: object, name: str, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise InputError(f"{name} {cut(repr(value), _LONGEST)}", allowed=allowed)
    return value
