"""Command lines in processes of their own, with limits, and what is wrong with what came of them.

A server imports what the commands import, once, and forks for each command line, so that one takes a tenth of a second
and may crash. The tests' own processes have threads, and could not fork safely; the server has none of Python's.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

__all__ = ["CommandLines", "Done", "serving"]

ROOT = Path(__file__).parent.parent.parent
SECONDS = 30  # of work, many times what any of them takes
WALL = 600  # seconds in all: others may use the machine
ADDRESSES = 6 << 30  # bytes
MEBIBYTES = 3000
_LITTER = (".tmp", "surgery-")


@dataclass(frozen=True)
class Asked:
    """A command line: where it runs, with which variables set or (None) unset, as which user, and for how long."""

    words: list[str]
    folder: str
    variables: dict[str, str | None]
    user: int | None
    seconds: int


@dataclass(frozen=True)
class Done:
    """What came of a command line; the status is -N where signal N has ended it. ``made`` names new files."""

    words: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    mebibytes: int
    made: tuple[str, ...] = ()

    def faults(self, *, allowed: tuple[int, ...] = (0, 2, 3), notes: int = 0) -> list[str]:
        """What is wrong with it, in words; where it succeeds it may print so many notes on standard error."""
        if self.status < 0:
            return [f"ended by {signal.Signals(-self.status).name}"]
        found = [] if self.status in allowed else [f"status {self.status}"]
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        refused = self.status == 2
        if "Traceback" in self.stderr or "internal error" in self.stderr:
            found.append("a failure of ours")
        elif not self.stderr.startswith("Usage") and not refused <= len(lines) <= (1 if refused else notes):
            found.append(f"{len(lines)} lines on standard error")
        if not all(c.isprintable() or c in "\n\t" for c in self.stdout + self.stderr):
            found.append("control characters")
        if self.mebibytes > MEBIBYTES:
            found.append(f"{self.mebibytes} MiB of memory")
        if left := [name for name in self.made if refused or name.endswith(_LITTER[0]) or name.startswith(_LITTER[1])]:
            found.append(f"left {', '.join(left)}")
        return found


class CommandLines:
    """The server, from the side of the tests."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(
        self,
        folder: Path,
        *words: str,
        user: int | None = None,
        seconds: int = SECONDS,
        **variables: str | None,
    ) -> Done:
        """Run a command line in a folder, from which modules can be imported; temporary files come into its ``tmp``."""
        (folder / "tmp").mkdir(exist_ok=True)
        before = set(folder.rglob("*"))
        own: dict[str, str | None] = {"TMPDIR": str(folder / "tmp"), "SURGERY_CACHE": "off"}
        asked = Asked(list(words), str(folder), own | variables, user, seconds)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(asked)) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server of command lines has ended"
        made = sorted(path.name for path in set(folder.rglob("*")) - before)
        status, stdout, stderr, memory = json.loads(answer)
        return Done(words, status, stdout, stderr, memory, tuple(made))


@contextlib.contextmanager
def serving() -> Iterator[CommandLines]:
    """Start a server, and end it."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", "SURGERY_DEBUG": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.command_lines"],
        cwd=ROOT,
        env=os.environ | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield CommandLines(server)
        assert server.stdin is not None
        server.stdin.close()


# -- the server --------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer each line of standard input by one of standard output: the fields of ``Done`` that it sees."""
    _import_all()
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # a thread of onnxruntime, which only waits
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        json.dump(_watch(Asked(**json.loads(line))), answers)
        answers.write("\n")
        answers.flush()


def _import_all() -> None:
    import onnxscript  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch.export.pt2_archive  # noqa: F401

    import surgery.cli.show
    import surgery.data.samples
    import surgery.passes.decompose
    import surgery.passes.recompose
    import surgery.report
    import surgery.runtime.bench
    import surgery.runtime.export  # noqa: F401


def _watch(asked: Asked) -> tuple[int, str, str, int]:
    """Run a command line in a fork; return its status, what it printed, and the most memory that it held."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            _run(asked, stdout, stderr)
        _, status, usage = os.wait4(child, 0)
        with contextlib.suppress(ProcessLookupError):  # what it has started
            os.killpg(child, signal.SIGKILL)
        out, err = (_read(file) for file in (stdout, stderr))
    return os.waitstatus_to_exitcode(status), out, err, usage.ru_maxrss >> 10


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _run(asked: Asked, stdout: IO[bytes], stderr: IO[bytes]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        for number, file in ((1, stdout), (2, stderr)):
            os.dup2(file.fileno(), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _limit(asked)
        _settle(asked)
        status = _command(asked.words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _limit(asked: Asked) -> None:
    """Past its work a process is ended by SIGXCPU, past its time by SIGALRM; more memory it does not get."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (asked.seconds, asked.seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    signal.alarm(WALL)


def _settle(asked: Asked) -> None:
    os.chdir(asked.folder)
    sys.path.insert(0, asked.folder)
    tempfile.tempdir = None  # the server's own
    for name, value in asked.variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if asked.user is not None:
        os.setgroups([])
        os.setgid(asked.user)
        os.setuid(asked.user)


def _command(words: list[str]) -> int:
    from surgery.cli import main

    sys.argv = ["surgery", *words]
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


if __name__ == "__main__":
    serve()
