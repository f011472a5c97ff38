"""The exceptions that speak to a user, and the refusal, which is a value.

SurgeryError
├── InputError        an argument, option or file that cannot be used as it is (also a ValueError)
│   ├── FileError         a file that cannot be read as a model, or must not be overwritten
│   │   └── UnsafeFileError   a file that would run code if it were loaded
│   └── RankError         a rank, a rank rule or a budget that cannot be met
├── CaptureError      a model whose graph cannot be traced or exported
└── CheckError        a rewritten graph that failed its own check: a bug of ours
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from surgery.text import cut, first_line, shown

__all__ = [
    "CaptureError",
    "CheckError",
    "FileError",
    "InputError",
    "RankError",
    "Refusal",
    "SurgeryError",
    "UnsafeFileError",
    "only_own_errors",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LONGEST = 4000


class SurgeryError(Exception):
    """Base of all errors raised on purpose; its text is one line: what, what is allowed, the next step.

    What does not print is escaped, and a line of more than 4,000 characters is cut in the middle.
    """

    exit_status = 2

    def __init__(self, what: str, *, allowed: str | None = None, next_step: str | None = None) -> None:
        self.what, self.allowed, self.next_step = what, allowed, next_step
        parts = [what]
        if allowed:
            parts.append(f"allowed: {allowed}")
        if next_step:
            parts.append(next_step)
        super().__init__(cut(shown("; ".join(parts)), _LONGEST))


class InputError(SurgeryError, ValueError):
    """An argument, an option or a file that cannot be used as it is."""


class FileError(InputError):
    """A file that cannot be read as a model, or that must not be overwritten."""


class UnsafeFileError(FileError):
    """A file that could run code if it were loaded."""


class RankError(InputError):
    """A rank, a rank rule or a budget that cannot be met."""


class CaptureError(SurgeryError):
    """A model whose graph can be neither traced nor exported."""


class CheckError(SurgeryError):
    """A rewritten graph that failed its own check. This is a bug of ours: please report it."""

    exit_status = 1


@dataclass(frozen=True)
class Refusal:
    """Why something was left alone; a value that the report lists, never an exception."""

    reason: str


def only_own_errors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let only the errors above leave a public function; a call that does not fit its signature is a TypeError still.

    Models, hooks and torch itself may raise anything. Whatever is not foreseen is reported as a bug of ours, with its
    cause.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        signature.bind(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except SurgeryError:
            raise
        except Exception as error:
            what = f"{function.__name__} failed: {type(error).__name__}: {first_line(error)}"
            raise CheckError(what, next_step="please report it, with the cause that Python shows") from error

    return guarded
