"""Run a command line as a user does, but in this process: importing torch anew takes seconds."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from surgery.cli import main
from surgery.system.interrupts import stopping_signals

__all__ = ["Done", "Terminal", "run"]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Done:
    """What a command printed, and the exit status."""

    stdout: str
    stderr: str
    status: int


def run(*words: object, columns: int | None = None) -> Done:
    """Run ``surgery`` with these words, on a terminal of so many columns or into a file."""
    out, err = (io.StringIO() if columns is None else Terminal()), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["surgery", *map(str, words)])
        patch.setenv("COLUMNS", str(columns or 40))
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _signals_kept(),
            pytest.raises(SystemExit) as stop,
        ):
            main()
    done = Done(out.getvalue(), err.getvalue(), int(stop.value.code or 0))
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Usage") or len(done.stderr.splitlines()) == (done.status == 2), done.stderr
    return done


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo what ``main`` does to a process that it is about to end."""
    handlers = {number: signal.getsignal(number) for number in stopping_signals()}
    hook = sys.unraisablehook
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
