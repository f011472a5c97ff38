"""Functions that a user names as ``module:function``."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from surgery.errors import InputError

__all__ = ["import_function"]


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
