"""Kill `surgery decompose` at random instants, and check that the old files or the new ones are there, each whole.

    python tools/kill_test.py --kills 200 --seed 0

Each run writes a model and a plan over old ones, in a fork that has imported everything already. Half of the runs are
killed at any instant, and half at an instant after the first draft has appeared. After SIGINT and SIGTERM a run must
print one true line, end with status 130 and leave no temporary file. After SIGKILL it may leave some, which the next
run removes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import torch
from torch import nn
from torch.export import ExportedProgram

import surgery.cli.group
import surgery.cli.show
import surgery.passes.decompose
import surgery.report  # noqa: F401  # imported here, like those above, so that no fork has to import it
from surgery.cli import main as surgery_main
from surgery.errors import SurgeryError
from surgery.files.load import load
from surgery.files.save import save
from surgery.plans.plan import Plan

__all__ = ["SIGNALS", "Strike", "strikes"]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
INTERRUPTED = "surgery: interrupted; "
TOO_EARLY = 99  # the status of a run that was killed before the command line began
PATIENCE = 600.0  # seconds that a run may take on a busy machine
OLD, NEW = "old", "new"


@dataclass(frozen=True)
class Strike:
    """A run and its outcome: the ``status`` of the process, negative for a signal, and the faults in words."""

    signal: signal.Signals
    status: int
    said: str
    model: str
    plan: str
    litter: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def outcome(self) -> str:
        """The outcome in a few words, for the summary."""
        if self.model != self.plan:
            return f"{self.model} model, {self.plan} plan"
        return f"{self.model} files, {'left drafts' if self.litter else 'no litter'}"


class _Place:
    """A folder with a model to decompose, and the two files that a run overwrites."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.source, self.model, self.plan = folder / "source.pt2", folder / "model.pt2", folder / "plan.json"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._log = folder / "log"
        save(_network(), self.source)
        self._known = {"source.pt2", "model.pt2", "plan.json", "tmp", "log"}
        status, said = self.run(4)
        if status:
            sys.exit(f"decompose itself fails: status {status}: {said}")
        self._old = {path: path.read_bytes() for path in (self.model, self.plan)}

    def restore(self) -> None:
        for path, raw in self._old.items():
            path.write_bytes(raw)

    def litter(self) -> tuple[str, ...]:
        """Return the files that no command was asked to write."""
        return tuple(sorted({*os.listdir(self._folder), *os.listdir(self.temporary)} - self._known))

    def state(self, path: Path, read: Callable[[Path], object]) -> str:
        if path.exists() and path.read_bytes() == self._old[path]:
            return OLD
        try:
            read(path)
        except SurgeryError as error:
            return f"broken ({error})"
        return NEW

    def run(self, rank: int, strike: Callable[[int], None] | None = None) -> tuple[int, str]:
        """Decompose in a fork; return the status and the text on standard error."""
        words = ["decompose", self.source, "-o", self.model, "--save-plan", self.plan, "--force"]
        words += ["--ranks", rank, "--no-timing"]
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            self._child([str(word) for word in words], writer)
        os.close(writer)
        os.read(reader, 1)  # it is about to begin
        os.close(reader)
        if strike is not None:
            strike(process)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return status, self._log.read_text(errors="replace")

    def _child(self, words: list[str], writer: int) -> None:
        """Run the command line and end the process, whatever happens."""
        status = TOO_EARLY
        with suppress(BaseException):
            tempfile.tempdir = str(self.temporary)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"), os.fdopen(2, "w")
            sys.argv = ["surgery", *words]
            os.write(writer, b"x")
            try:
                surgery_main()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
        os._exit(status)


def _network() -> ExportedProgram:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    return torch.export.export(net.eval(), (torch.randn(2, 256),))


def _open(path: Path) -> None:
    program = load(path)
    assert isinstance(program, ExportedProgram)
    program.module()(torch.randn(2, 256))


def _striker(place: _Place, number: signal.Signals, delay: float, *, drafts: bool) -> Callable[[int], None]:
    def strike(process: int) -> None:
        until = time.monotonic() + PATIENCE
        while drafts and not place.litter() and time.monotonic() < until:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(process, number)

    return strike


def strikes(folder: Path, kills: int, seed: int) -> Iterator[Strike]:
    """Yield the given number of runs in an empty folder, each killed by another signal at another instant."""
    generator = random.Random(seed)
    place = _Place(folder)
    begin = time.monotonic()
    place.run(2)
    whole = time.monotonic() - begin
    for index in range(kills):
        place.restore()
        number = SIGNALS[index % len(SIGNALS)]
        drafts = bool(index // len(SIGNALS) % 2)
        delay = generator.uniform(0, 0.1 * whole if drafts else 1.1 * whole)
        status, said = place.run(2, _striker(place, number, delay, drafts=drafts))
        model, plan = place.state(place.model, _open), place.state(place.plan, Plan.read)
        litter = place.litter()
        faults = list(_faults(place, number, status, said, (model, plan), litter))
        if litter and number == signal.SIGKILL:
            place.restore()
            status_after, said_after = place.run(2)
            if status_after or place.litter():
                faults.append(f"the next run: status {status_after}, left {place.litter()}, said {said_after!r}")
        yield Strike(number, status, said, model, plan, litter, tuple(faults))


def _faults(
    place: _Place, number: int, status: int, said: str, states: tuple[str, str], litter: tuple[str, ...]
) -> Iterator[str]:
    if not set(states) <= {OLD, NEW}:
        yield f"model {states[0]}, plan {states[1]}"
    if status == 0 and (states != (NEW, NEW) or said):
        yield "success without the new files, or with an error message"
    if number == signal.SIGKILL:
        if status not in (0, -signal.SIGKILL):
            yield f"status {status}"
        return
    if litter:
        yield f"left {litter}"
    if len(set(states)) > 1:
        yield "one file is new, the other is old"
    if status == 130:
        fate = "nothing was written" if states[0] == OLD else f"{place.model} and {place.plan} were written"
        if said.strip() != INTERRUPTED + fate:
            yield f"said {said.strip()!r}"
    elif status in (TOO_EARLY, -number):  # before the first line of the command line
        if said or OLD not in states:
            yield f"status {status}, said {said!r}"
    elif status:
        yield f"status {status}, said {said!r}"


def main() -> None:
    """Print each run that goes wrong, and the number of runs with each outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # a fork does not inherit other threads
    outcomes: Counter[tuple[str, str]] = Counter()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for strike in strikes(Path(folder), given.kills, given.seed):
            outcomes[strike.signal.name, f"status {strike.status}: {strike.outcome}"] += 1
            bad += bool(strike.faults)
            for fault in strike.faults:
                print(f"{strike.signal.name}: {fault}", flush=True)
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{count:4} {name:8} {outcome}")
    print(f"{given.kills} kills, {bad} handled badly")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
