"""The one timing core: onnxruntime sessions run interleaved, in random order, and compared with an interval.

Interleaved, because a machine drifts (clock, heat, neighbours): what runs in the same round is disturbed alike. In
random order, because what runs after a large model finds its own weights evicted from the caches.

Threads: the count is always set, so that it can be stated, and it is the number of physical cores by default, as
onnxruntime itself chooses. After a run, onnxruntime's workers spin for milliseconds, waiting for the next; so those of
the session that has just run would occupy the cores of the one that is being timed. Two answers:

- whole models are sessions of their own, whose workers spin within a run, as in production, but stop at its end
  (``session.force_spinning_stop``). The first nodes of a run then wait some tens of microseconds for their workers;
- single operators are too short for that. A pair is the two branches of one model in one session
  (``onnx_model.build_choice``), so that both use the same workers, which spin between runs (``spin=True``) and are
  awake when an operator starts, as they are inside a network.

Measured on two idle cores with two threads (a 3x3 convolution of 128 channels at 28x28; a linear layer of 512 at 16
rows), in microseconds: each alone 1040 and 44; as a branch 1020 and 42; in a session beside another one whose workers
spin up to 2010 and 41; stopped after each run 1050 and 56; never spinning 1050 and 64, and short chains twice as slow.

Busy machines: a thread that has used up its slice waits for a core, for milliseconds, whatever it works at, so that the
median of short runs tells of the others' slices: two models, 3.8 and 2.6 ms alone, took 8.0 and 6.6 (load 8 on two
cores; 1.21x instead of 1.46x). What runs on the calling thread alone can be timed without those waits (``waited``).

Intervals: round by round, samples of two sessions are a pair, so rounds are resampled, not samples, and in blocks of
neighbouring rounds, since disturbances last longer than a round (moving-block bootstrap, Kunsch 1989).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from surgery.errors import InputError

__all__ = [
    "MARGIN",
    "VERDICTS",
    "Budget",
    "Samples",
    "Speedup",
    "bind",
    "check_threads",
    "compare_samples",
    "interleave",
    "open_session",
    "physical_cores",
    "waited",
]

MARGIN = 0.02  # 96 pairs of equal operators: 89 within this, the worst 4 % apart; the interval misses such chance
VERDICTS = ("faster", "slower", "no difference")
_RESAMPLES = 1000
_MAX_RESAMPLED = 2_000_000  # random indices in one bootstrap: bounds its memory
_MOST_THREADS = 256  # or as many as there are cores
_WAITS = "/proc/thread-self/schedstat"  # nanoseconds on a core, and ready without one
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds until ``seconds`` are over, but at least ``min_rounds`` and at most ``max_rounds``.

    Before that come ``warmup_rounds``, which are not counted; in each round every session runs once.
    """

    seconds: float = 1.0
    min_rounds: int = 11
    max_rounds: int = 2000
    warmup_rounds: int = 3

    def __post_init__(self) -> None:
        if not (self.seconds >= 0 and 1 <= self.min_rounds <= self.max_rounds and self.warmup_rounds >= 0):
            allowed = "seconds >= 0, 1 <= min_rounds <= max_rounds, warmup_rounds >= 0"
            raise InputError(f"the measuring budget is {self}", allowed=allowed)


@dataclass(frozen=True)
class Samples:
    """Seconds of each run of one session, in the order of the rounds."""

    seconds: tuple[float, ...] = field(repr=False)

    @property
    def runs(self) -> int:
        """Number of timed runs."""
        return len(self.seconds)

    @cached_property
    def median(self) -> float:
        """Median seconds of one run."""
        return float(np.median(self.seconds))

    @cached_property
    def p90(self) -> float:
        """Seconds that nine runs in ten stay below."""
        return float(np.quantile(self.seconds, 0.9))

    @cached_property
    def spread(self) -> float:
        """Interquartile range over the median: how noisy the machine was."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float((high - low) / self.median) if self.median > 0 else 0.0


@dataclass(frozen=True)
class Speedup:
    """Median seconds of the first over those of the second, with its 95 % interval: above 1, the second is faster."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the second is: "faster" or "slower" if the interval excludes 1 and the margin is passed."""
        if self.low > 1 and self.value > 1 + MARGIN:
            return "faster"
        if self.high < 1 and self.value < 1 / (1 + MARGIN):
            return "slower"
        return "no difference"


def compare_samples(first: Samples, second: Samples, *, seed: int = 0, confidence: float = 0.95) -> Speedup:
    """Return how much faster the second ran than the first, from samples of the same rounds.

    Raises:
        InputError: the two have different numbers of rounds, or none.

    >>> compare_samples(Samples((2.0, 2.1, 2.0)), Samples((1.0, 1.0, 1.0))).verdict
    'faster'
    """
    if first.runs != second.runs or not first.runs:
        raise InputError(f"{first.runs} and {second.runs} rounds cannot be paired", allowed="equal numbers above 0")
    seconds = np.array([first.seconds, second.seconds])
    medians = np.median(seconds[:, _resample_rounds(first.runs, seed)], axis=-1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians[0] / medians[1], [tail, 1 - tail])
    return Speedup(first.median / second.median, float(low), float(high))


def _resample_rounds(rounds: int, seed: int) -> npt.NDArray[np.intp]:
    """Return (resamples, rounds) indices, drawn in circular blocks of about the cube root of the rounds."""
    generator = np.random.default_rng(seed)
    length = max(1, round(rounds ** (1 / 3)))
    blocks = -(-rounds // length)
    resamples = max(100, min(_RESAMPLES, _MAX_RESAMPLED // rounds))
    starts = generator.integers(rounds, size=(resamples, blocks, 1))
    indices = (starts + np.arange(length)) % rounds
    return indices.reshape(resamples, -1)[:, :rounds]


def interleave(
    runs: Sequence[Callable[[], object]],
    budget: Budget | None = None,
    *,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    waited: Callable[[], float] = float,
) -> tuple[Samples, ...]:
    """Time callables round by round, in a new random order in each round; one Samples for each, all equally long.

    ``progress`` is called after each round with the share of the budget that is used, 0 to 1. ``waited`` returns the
    seconds so far that shall not count: 0, or what the function of this name says where one thread does all the work.
    """
    budget = budget or Budget()
    generator = np.random.default_rng(seed)
    rounds: list[list[float]] = []
    for _ in range(budget.warmup_rounds):
        _time_round(runs, generator, waited)
    with _no_collection():
        start = time.perf_counter()
        used = 0.0
        while len(rounds) < budget.min_rounds or (used < 1 and len(rounds) < budget.max_rounds):
            rounds.append(_time_round(runs, generator, waited))
            spent = (time.perf_counter() - start) / budget.seconds if budget.seconds else 1.0
            used = max(spent, len(rounds) / budget.max_rounds)
            if progress is not None:
                progress(min(used, len(rounds) / budget.min_rounds, 1.0))
    return tuple(Samples(tuple(column)) for column in zip(*rounds, strict=True))


def _time_round(
    runs: Sequence[Callable[[], object]], generator: np.random.Generator, waited: Callable[[], float]
) -> list[float]:
    seconds = [0.0] * len(runs)
    for index in generator.permutation(len(runs)):
        run = runs[index]
        before = waited()
        start = time.perf_counter()
        run()
        spent = time.perf_counter() - start
        seconds[index] = spent - min(waited() - before, spent)
    return seconds


def waited() -> float:
    """Return how many seconds of its life the calling thread has waited for a core; 0 where the system counts none."""
    try:
        return int(Path(_WAITS).read_bytes().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the timed runs."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads that cannot be had."""
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise InputError(f"threads={threads}", allowed=f"1 to {most}")


def open_session(model: bytes | str | Path, *, threads: int | None = None, spin: bool = False) -> ort.InferenceSession:
    """Return a session on the CPU, all graph optimisations on, with a stated number of threads.

    ``spin`` lets its threads spin between runs, which disturbs other sessions.

    Raises:
        InputError: onnxruntime cannot load the model, or there cannot be so many threads.
    """
    check_threads(threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # fatal only: what goes wrong is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "0" if spin else "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        name = "the model" if isinstance(model, bytes) else str(model)
        raise InputError(f"onnxruntime cannot load {name}: {_first_line(error)}") from error


def bind(session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[np.generic]]) -> Callable[[], None]:
    """Return a callable that runs the session on these inputs without copying tensors in or out of Python.

    Raises:
        InputError: onnxruntime cannot run the model on these inputs.
    """
    binding = session.io_binding()
    try:
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
            if value.is_tensor():
                binding.bind_ortvalue_output(output.name, value)
    except Exception as error:  # likewise
        raise InputError(f"onnxruntime cannot run the model on these inputs: {_first_line(error)}") from error
    return lambda: session.run_with_iobinding(binding)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def physical_cores() -> int:
    """Return the number of physical cores that this process may use."""
    try:
        usable = os.sched_getaffinity(0)
        return len({Path(_SIBLINGS.format(cpu)).read_text() for cpu in usable})
    except (AttributeError, OSError):
        return os.cpu_count() or 1
