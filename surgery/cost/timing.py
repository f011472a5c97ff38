"""The one timing core: callables run interleaved, in random order, and compared with an interval.

Callables are interleaved because a machine drifts (clock, heat, neighbours): what runs in the same round is disturbed
alike. Their order is random because what runs after a large model finds its own weights evicted from the caches.

Busy machines: a thread that has used up its slice waits for a core, for milliseconds, whatever it works at, so that the
median of short runs tells of the others' slices. Two models, 3.8 and 2.6 ms alone, took 8.0 and 6.6 (load 8 on two
cores; 1.21x instead of 1.46x). What runs on the calling thread alone can be timed without those waits (``waited``).

Intervals: samples of two callables are a pair round by round, so that rounds are resampled, not samples. They are
resampled in blocks of neighbouring rounds, since disturbances last longer than a round (moving-block bootstrap, Kunsch
1989).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from surgery.errors import InputError
from surgery.text import Verdict

__all__ = [
    "MARGIN",
    "Budget",
    "Samples",
    "Speedup",
    "compare_samples",
    "interleave",
    "waited",
]

MARGIN = 0.02  # 96 pairs of equal operators: 89 within this, the worst 4 % apart; the interval misses such chance
_RESAMPLES = 1000
_MAX_RESAMPLED = 2_000_000  # random indices in one bootstrap: bounds its memory
_WAITS = "/proc/thread-self/schedstat"  # nanoseconds on a core, and ready without one


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds until ``seconds`` are over, but at least ``min_rounds`` and at most ``max_rounds``.

    ``warmup_rounds`` come first and are not counted. In each round everything runs once.
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
    """Seconds of each run of one thing, in the order of the rounds."""

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
        """The seconds that nine runs in ten stay below."""
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
    def verdict(self) -> Verdict:
        """What the second is: "faster" or "slower" if the interval excludes 1 and the margin is passed."""
        if self.low > 1 and self.value > 1 + MARGIN:
            return "faster"
        if self.high < 1 and self.value < 1 / (1 + MARGIN):
            return "slower"
        return "no difference"


def compare_samples(first: Samples, second: Samples, *, seed: int = 0, confidence: float = 0.95) -> Speedup:
    """Return how much faster the second ran than the first, from samples of the same rounds.

    Raises:
        InputError: the two have different numbers of rounds, or none at all.

    >>> compare_samples(Samples((2.0, 2.1, 2.0)), Samples((1.0, 1.0, 1.0))).verdict
    'faster'
    """
    if first.runs != second.runs or not first.runs:
        raise InputError(f"{first.runs} and {second.runs} rounds cannot be paired", allowed="equal numbers above 0")
    seconds = np.array([first.seconds, second.seconds])
    # (2, resamples, rounds): both are resampled at the same rounds, so that what disturbed a round counts for both.
    medians = np.median(seconds[:, _resample_rounds(first.runs, seed)], axis=-1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians[0] / medians[1], [tail, 1 - tail])
    return Speedup(first.median / second.median, float(low), float(high))


def _resample_rounds(rounds: int, seed: int) -> npt.NDArray[np.intp]:
    """Return (resamples, rounds) indices, drawn in circular blocks of about the cube root of the rounds."""
    # Invariant: each row is whole blocks of neighbouring rounds, cut to the number of rounds. For example 8 rounds have
    # blocks of 2, and a row may be [6 7, 0 1, 6 7, 3 4]: what disturbed two rounds in a row stays together.
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
    """Time callables round by round, in a new random order in each round; return equally many samples of each.

    ``progress`` is called after each round with the share of the budget that is used, 0 to 1. ``waited`` returns the
    seconds so far that are not to count: by default 0. The function of this name counts right if one thread does all
    the work.
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
    """Return how many seconds the calling thread has waited for a core in its life; 0 if the system does not count."""
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
