"""The command line: ``surgery VERB MODEL``. This file is how it starts and how it ends.

Before signals are caught and streams are in order nothing is imported that takes time.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from surgery.system.interrupts import stopping_signals
from surgery.system.memory import give_back_large
from surgery.text import first_line, shown

__all__ = ["cli", "main"]

_INTERRUPTED = 130
_REPORT = "this is a bug of surgery: please report it (see README.md) with the traceback that SURGERY_DEBUG=1 shows"


def main() -> None:
    """Run the command line and end the process; every failure is one line, and a status.

    0: done; 1: a failure of ours, or no output could be printed; 2: an argument, a file or a disk; 3: a promise was not
    kept; 130: Ctrl-C, SIGTERM or SIGHUP.
    """
    _open_streams()
    give_back_large()  # a network with its scratch memory may be most of what the machine has
    written: list[Path] = []
    came = _catch_signals()
    try:
        status = _run(written)
        _ignore_signals()
        if came:  # some library has swallowed what it raised
            raise KeyboardInterrupt
    except BaseException as error:
        _ignore_signals()
        status = _tell(error, written, interrupted=bool(came))
    _close_streams()
    sys.exit(status)


def __getattr__(name: str) -> Any:
    if name != "cli":
        raise AttributeError(f"module 'surgery.cli' has no attribute {name!r}")
    from surgery.cli.group import cli

    return cli


def _run(written: list[Path]) -> int:
    from surgery.cli.group import cli
    from surgery.system.writing import noting

    with noting(written):
        status = cli.main(standalone_mode=False) or 0
        sys.stdout.flush()
    return status


def _tell(error: BaseException, written: list[Path], *, interrupted: bool) -> int:
    """Say what has happened in one line, and return the status for it; with SURGERY_DEBUG a bug of ours is raised."""
    if interrupted or isinstance(error, KeyboardInterrupt):
        _say(f"surgery: interrupted; {_fate(written)}")
        return _INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    import click

    from surgery.errors import SurgeryError

    if isinstance(error, click.Abort) and error.__cause__ is not None:  # click hides EOFErrors of any kind in it
        return _tell(error.__cause__, written, interrupted=False)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        text = io.StringIO()
        error.show(text)
        _say("\n".join(map(shown, text.getvalue().rstrip().split("\n"))))
        return error.exit_code
    if isinstance(error, SurgeryError):
        _say(f"surgery: {error}")
        return error.exit_status
    if isinstance(sys.stdout, _Output) and error is sys.stdout.error:
        _say(f"surgery: standard output takes nothing: {error.strerror or error}; {_fate(written)}")
        return 1
    if isinstance(error, MemoryError):
        _say(f"surgery: there is not enough memory; {_fate(written)}")
        return 2
    if os.environ.get("SURGERY_DEBUG"):
        raise error
    _say(f"surgery: internal error: {type(error).__name__}: {shown(first_line(error))}; {_REPORT}")
    return 1


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody can be told
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _fate(written: list[Path]) -> str:
    left = [path for path in written if os.path.lexists(path)]  # temporary files are gone
    names = " and ".join(shown(str(path)) for path in left)
    return f"{names} {'were' if len(left) > 1 else 'was'} written" if names else "nothing was written"


def _catch_signals() -> list[int]:
    """Let all signals that ask a process to stop do what Ctrl-C does; return the list of those that have come."""
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    for number in stopping_signals():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # else the caller ignores them
            signal.signal(number, stop)
    sys.unraisablehook = _raise_again
    return came


def _raise_again(fault: Any) -> None:
    """Send Ctrl-C once more, where it came in a place that raises nothing, as when an object is deleted."""
    if not isinstance(fault.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(fault)
        return
    later = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
    later.daemon = True
    later.start()


def _ignore_signals() -> None:
    """Let nothing disturb the end, which is near."""
    for number in stopping_signals():
        signal.signal(number, signal.SIG_IGN)


class _Output:
    """Standard output, which keeps its own error, so that it is told from one of a file."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._keeping():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._keeping():
            self._stream.flush()

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            raise


def _open_streams() -> None:
    """Open streams that are closed on nothing, or the next file would take their numbers, and get what libraries print.

    What a stream cannot encode is escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = _Output(sys.stdout)


def _close_streams() -> None:
    """Throw away what could not be printed, or Python would try once more, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
