"""Ctrl-C and the other signals that ask a process to stop: which signals exist, and how to put them off."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["put_off", "stopping_signals"]


def stopping_signals() -> list[signal.Signals]:
    """Return the signals that ask a process to stop, of those that this system has."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def put_off() -> Iterator[list[int]]:
    """Put off what the stopping signals do until the block is through; yield the list of signals that have come.

    Signals without a handler in Python do what they always do: they end the process, or do nothing. In any thread but
    the main one, the block runs as it is, because handlers never run there.
    """
    came: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    try:
        for number in stopping_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                with contextlib.suppress(ValueError):  # raised in other threads
                    signal.signal(number, note)
        yield came
    finally:
        for caught, handler in handlers.items():
            with contextlib.suppress(ValueError):
                signal.signal(caught, handler)
        # Last, when all handlers are back: the handler of Ctrl-C raises, and nothing after it would run.
        if came:
            handlers[came[0]](came[0], None)
