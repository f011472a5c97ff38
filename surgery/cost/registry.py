"""The backends by name. Each is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.cost.base import Backend
from surgery.errors import InputError

__all__ = ["BACKENDS", "make_backend"]


def _onnxruntime(**options: Any) -> Backend:
    from surgery.cost.onnxruntime.backend import OnnxRuntime

    return OnnxRuntime(**options)


BACKENDS: dict[str, Callable[..., Backend]] = {
    "onnxruntime": _onnxruntime,
}


def make_backend(name: str = "onnxruntime", **options: Any) -> Backend:
    """Return a new backend of this name; the options are those of its class.

    Raises:
        InputError: an unknown name.

    >>> make_backend("abacus")
    Traceback (most recent call last):
    surgery.errors.InputError: the backend 'abacus' is not known; allowed: onnxruntime
    """
    if name not in BACKENDS:
        raise InputError(f"the backend {name!r} is not known", allowed=", ".join(BACKENDS))
    return BACKENDS[name](**options)
