"""Models timed each in its own processes: models that share a process pay for each other's memory, caches and threads.

A *generation* is one process for each model. The processes of a generation live at the same time and take turns in
short blocks. A drift of the machine therefore disturbs all alike, and no model finds its memory or threads in use by
another. A process sleeps until its turn. When its threads wake up, some share a core until the system spreads them: in
turns of 0.06 s, two runs in three waited like this (two threads, two cores, runs of 13 ms); in turns of 0.25 s, whose
first 0.05 s do not count, one in six. Every few seconds a new generation takes over. The memory that a process happens
to get changes a latency by some per cent, and only other processes show by how much.

On a busy machine a thread that has used up its slice waits for a core, for milliseconds, whatever it works on: a run of
3.8 ms took 8.0, and one of 2.6 took 6.6 (load 8 on two cores), which is 1.21 instead of 1.46 times as long. If the
system counts such waits, they do not count here. With one thread they are subtracted. With more threads, some wait at
barriers for others that wait for a core; then only runs without waits count, if each model of a generation has some.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from scipy.special import stdtrit

from surgery.cost.timing import Speedup
from surgery.errors import InputError

__all__ = ["Blocks", "TimingJob", "compare_generations", "time_generations", "without_waits"]

_CHILD = Path(__file__).with_name("child.py")
_LEAST, _MOST = 4, 8  # generations: fewer say nothing of the spread between processes, more cost their starts
_STARTING = 2 / 3  # of the time for starts at most: more processes narrow an interval faster than more runs
_BLOCK = 0.25  # seconds of one turn, at most
_ROUNDS = 2  # turns of a process, at least
_PATIENCE = 5.0  # seconds that a process may take to end

_QUIET = 0.01  # of a run, waited for a core at most
_FEW = 5  # runs without waits that speak for a process

Blocks = tuple[tuple[float, ...], ...]  # seconds of each run, in the turns of one process
_Turns = list[list[tuple[float, float]]]  # likewise, each with the seconds waited


@dataclass(frozen=True)
class TimingJob:
    """What a process times: an .onnx file, its inputs in order as an .npz file, and its threads (None: the default).

    ``name`` stands for the model in errors. ``child`` is the program that does the timing.
    """

    name: str
    model: Path
    inputs: Path
    threads: int | None = None
    child: Path = _CHILD

    @property
    def one_thread(self) -> bool:
        """Whether it surely runs in one thread; by default, onnxruntime starts one for each core, usable or not."""
        return (self.threads or os.cpu_count()) == 1


def time_generations(
    jobs: Sequence[TimingJob],
    *,
    seconds: float,
    seed: int = 0,
    settled: Callable[[list[list[Blocks]]], bool] | None = None,
    patience: int = 1,
    progress: Callable[[float], None] | None = None,
) -> list[list[Blocks]]:
    """Return the blocks of each job in each generation, for about ``seconds`` in all with the starts of processes.

    There are 4 to 8 generations. Four are timed however long they take, so that models that are slow to load exceed the
    seconds. If ``settled`` says that they leave open what was asked, the same number follows, until there are
    ``patience`` times as many.

    Raises:
        InputError: a process failed; the message is the last thing that it said.
    """
    if not seconds >= 0:
        raise InputError(f"seconds={seconds}", allowed="0 or more")
    generator = np.random.default_rng(seed)
    begin = time.perf_counter()
    found: list[list[Blocks]] = []
    # Each model gets two turns in each of four generations. Example of two models in 2 s: 2 /
    # (2 * 2 * 4) = 0.125 s a turn.
    planned, opening = _MOST, 0.0
    block = min(_BLOCK, seconds / (len(jobs) * _ROUNDS * _LEAST))
    while len(found) < planned:
        left = max(0.0, seconds - (time.perf_counter() - begin))
        if len(found) == 1:  # the first has shown what a start takes
            # Two thirds of the time may go to starts. Example of 5 s and starts of 0.5 s:
            # int(5 * 2 / 3 / 0.5) = 6 generations.
            planned = min(_MOST, max(_LEAST, int(seconds * _STARTING / opening)))
            most = planned * patience
        with _started(jobs) as (children, opening):
            until = time.perf_counter() + left / (planned - len(found)) - opening
            turns = _take_turns(children, block, until, generator)
        found.append(without_waits(turns, single=all(job.one_thread for job in jobs)))
        if len(found) == planned < most and settled is not None and not settled(found):
            planned += most // patience
            begin = time.perf_counter()
        if progress is not None:
            progress(len(found) / planned)
    return found


def _take_turns(children: Sequence[_Child], block: float, until: float, generator: np.random.Generator) -> list[_Turns]:
    turns: list[_Turns] = [[] for _ in children]
    while len(turns[0]) < _ROUNDS or time.perf_counter() < until:
        for index in generator.permutation(len(children)):
            turns[index].append(children[index].time_block(block))
    return turns


def without_waits(generation: Sequence[_Turns], *, single: bool) -> list[Blocks]:
    """Return the seconds of runs without the waits for a core; ``single`` says that each process has one thread.

    With more threads, runs with waits are left out. If that leaves any process less than five runs, none is left out:
    all models are treated alike, because long runs are disturbed more often than short ones. A turn may become empty.

    >>> without_waits([[[(3.0, 1.0)]]], single=True)
    [((2.0,),)]
    """
    if single:
        return [tuple(tuple(s - waited for s, waited in turn) for turn in turns) for turns in generation]
    # By the share of a run, since a long run meets more waits than a short one.
    quiet = [[[s for s, waited in turn if waited <= _QUIET * s] for turn in turns] for turns in generation]
    enough = all(sum(map(len, turns)) >= _FEW for turns in quiet)
    kept = quiet if enough else [[[s for s, _ in turn] for turn in turns] for turns in generation]
    return [tuple(tuple(turn) for turn in turns) for turns in kept]


def compare_generations(first: Sequence[Blocks], second: Sequence[Blocks], *, confidence: float = 0.95) -> Speedup:
    """Return how much faster the second ran than the first, from the blocks of each in each generation.

    The speed-up of a round compares the medians of its two turns, which are so close in time that whatever slows the
    machine for seconds slows both. The speed-up of a generation is the median of its rounds. The result is the
    geometric mean over the generations, with Student's interval, which reflects how far processes differ, and that only
    a few were seen.

    Raises:
        InputError: there are fewer than two generations, or not the same number of both.

    >>> compare_generations([((2.0,),), ((2.1,),)], [((1.0,),), ((1.0,),)]).verdict
    'faster'
    """
    count = len(first)
    if count != len(second) or count < 2:
        raise InputError(f"{count} and {len(second)} generations cannot be compared", allowed="equal numbers above 1")
    # Ratios are averaged as logarithms, so that A over B is the inverse of B over A. Example of two generations, 2.0
    # and 2.1: 2.05, with Student's 12.7 for one degree of freedom 1.50 to 2.79. Of four generations it is 3.2.
    logs = np.array([_log_speedup(*blocks) for blocks in zip(first, second, strict=True)])
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * float(logs.std(ddof=1)) / math.sqrt(count)
    middle = float(logs.mean())
    return Speedup(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def _log_speedup(first: Blocks, second: Blocks) -> float:
    rounds = [(x, y) for x, y in zip(first, second, strict=False) if x and y]
    rounds = rounds or [(sum(first, ()), sum(second, ()))]  # runs without waits in other rounds
    return float(np.median([np.log(np.median(x) / np.median(y)) for x, y in rounds]))


@contextmanager
def _started(jobs: Sequence[TimingJob]) -> Iterator[tuple[list[_Child], float]]:
    """Start one process for each job; yield them with the seconds that it took, and end them whatever happens."""
    start = time.perf_counter()
    with ExitStack() as stack:
        children = [stack.enter_context(_running(job)) for job in jobs]
        for child in children:
            child.listen()  # all load at the same time
        yield children, time.perf_counter() - start


@contextmanager
def _running(job: TimingJob) -> Iterator[_Child]:
    what = {"model": str(job.model), "inputs": str(job.inputs), "threads": job.threads}
    with tempfile.TemporaryFile() as errors:  # not a pipe, which fills up while nobody reads it
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                str(job.child),
                json.dumps(what),
            ],  # -P: the child's folder has files of common names
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            yield _Child(job.name, process, errors)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was not read any more
                    pipe.close()  # type: ignore[union-attr]  # both are pipes


class _Child:
    """A process that times one model."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._name, self._process, self._errors = name, process, errors

    def time_block(self, seconds: float) -> list[tuple[float, float]]:
        """Return the seconds of each run of a block, and the seconds waited; raises as ``listen`` does."""
        assert self._process.stdin is not None  # it is a pipe
        with suppress(OSError):  # it has ended; what it said comes next
            self._process.stdin.write(f"{seconds}\n".encode())
            self._process.stdin.flush()
        return [(spent, waited) for spent, waited in self.listen()]

    def listen(self) -> Any:
        """Return the next thing that the process says.

        Raises:
            InputError: the process has failed.
        """
        assert self._process.stdout is not None  # likewise
        line = self._process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            said = f"it said {line.strip().decode(errors='replace')!r}" if line else self._last_words()
            what = f"{self._name} cannot be timed in a process of its own: {said}"
            raise InputError(what, next_step="time it in this process, with bench") from None

    def _last_words(self) -> str:
        """Return the last line that the process wrote as an error; its status if it wrote none."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)  # its output has ended, so it is about to
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return said[-1] if said else f"it ended with status {self._process.returncode}"
