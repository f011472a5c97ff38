"""Whole models timed as a user runs them: each exported once, alone in new processes, under default sessions.

``bench`` times models together in the calling process. That is quick, but the models share caches, memory and cores. A
model that keeps its weights in the cache when it runs alone pays for the other's there, and is faster for its user than
``bench`` says. Here each model has processes to itself (``surgery.cost.onnxruntime.processes``). A program's dynamic
sizes stay dynamic, because some of the runtime's fusions depend on them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from surgery.cost.base import Backend, make_backend
from surgery.cost.timing import Speedup
from surgery.errors import InputError, only_own_errors
from surgery.files.load import model_of
from surgery.kinds.onnx.session import check_threads
from surgery.kinds.registry import Model
from surgery.runtime.bench import (
    ModelComparison,
    ModelTiming,
    Timing,
    check_models,
    describe_feeds,
    environment,
    name_of,
)
from surgery.runtime.compare import shared_inputs
from surgery.runtime.written import Written, write_model
from surgery.system.scratch import scratch_folder

__all__ = ["Apart", "time_apart", "time_batches"]

_WIDE = 1.1  # an interval whose upper end is more than this times the lower one says too little for a search

_Given: TypeAlias = Model | str | os.PathLike[str]


@dataclass(frozen=True)
class _Patience:
    """The speed-up asked for, if any, and how many times as long a timing may take to tell whether it is reached.

    A search goes on from the speed-up that was measured, so that its interval must be narrow, too.
    """

    goal: float | None
    patience: int

    def answered(self, found: Speedup) -> bool:
        # Example of the goal 1.2: the interval [1.1, 1.3] leaves it open; [1.25, 1.3] reaches it; [1.25, 1.4] reaches
        # it, too, but is too wide to go on from, as 1.4 > 1.1 * 1.25.
        return self.goal is None or not (found.low < self.goal <= found.high or found.high > _WIDE * found.low)


@only_own_errors
def time_apart(
    models: Sequence[_Given],
    example_inputs: Any = None,
    *,
    names: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    backend: Backend | None = None,
    progress: Callable[[float], None] | None = None,
) -> Timing:
    """Time models each alone in new processes, for about ``seconds`` in all after their export.

    Models, inputs and names are those of ``bench``. The ``backend`` is onnxruntime unless another is given. With
    onnxruntime, the processes of all models take turns of a quarter of a second, in four to eight generations. Models
    that are slow to load take longer than the seconds. A process opens one session with default options, except for the
    ``threads`` if they are given, and runs it with plain arrays. What it waits for a core that others use does not
    count, as far as the system tells (``without_waits``). Intervals are those of ``compare_generations``, which know
    how far processes differ.

    Raises:
        InputError: as ``bench``, or a process failed.
        CaptureError, CheckError: a model that cannot be exported, as ``export_onnx`` says.

    >>> import torch
    >>> time_apart([nn.Linear(8, 8)], torch.ones(1, 8), seconds=0.0).models[0].runs >= 6
    True
    """
    with _written(models, example_inputs, names, seed) as written:
        return _time(backend or make_backend(), written, threads=threads, seconds=seconds, seed=seed, progress=progress)


class Apart:
    """A model that others are timed against, one after another, as ``time_apart`` does; it is exported once.

    Models run with the ``threads`` of the backend.
    """

    def __init__(self, model: nn.Module | ExportedProgram, example_inputs: Any, backend: Backend) -> None:
        self._backend = backend
        self._inputs = shared_inputs([model], example_inputs)
        held = ExitStack()
        weakref.finalize(self, held.close)  # also when Python ends
        self._folder = held.enter_context(scratch_folder())
        self._first = write_model(model, self._inputs, self._folder / "first.onnx", name_of(model))

    def against(
        self,
        model: nn.Module | ExportedProgram,
        *,
        goal: float | None = None,
        patience: int = 1,
        seconds: float = 5.0,
        progress: Callable[[float], None] | None = None,
    ) -> Timing:
        """Return the timing of both; arguments and exceptions are those of ``time_apart``.

        Where the interval leaves open whether the ``goal``, a speed-up, is reached, or is wider than a tenth, it takes
        longer, up to ``patience`` times as long.
        """
        later = write_model(model, self._inputs, self._folder / "later.onnx", name_of(model))
        asked = _Patience(goal, patience)
        return self._time([self._first, later], asked, seconds, progress)

    def alone(
        self,
        *,
        seconds: float = 5.0,
        progress: Callable[[float], None] | None = None,
    ) -> ModelTiming:
        """Return the timing of the model itself."""
        return self._time([self._first], None, seconds, progress).models[0]

    def _time(
        self,
        models: Sequence[Written],
        asked: _Patience | None,
        seconds: float,
        progress: Callable[[float], None] | None,
    ) -> Timing:
        threads = self._backend.threads
        return _time(self._backend, models, asked, threads=threads, seconds=seconds, seed=0, progress=progress)


@only_own_errors
def time_batches(
    models: Sequence[_Given],
    example_inputs: Any = None,
    *,
    batches: Sequence[int] = (1, 8, 64),
    names: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    backend: Backend | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[int, Timing]:
    """Time models as ``time_apart`` does, at several sizes of their dynamic batch axis, which share the seconds.

    The batch axis is the first dynamic size of the first input that has one, and every other axis of that name. Inputs
    are repeated along it, or cut.

    Raises:
        InputError: as ``time_apart``, or a model does not have a dynamic size, or ``batches`` are not above 0.
    """
    if not batches or not all(isinstance(batch, int) and batch >= 1 for batch in batches):
        raise InputError(f"batches={tuple(batches)}", allowed="one or more whole numbers above 0")
    found: dict[int, Timing] = {}
    with _written(models, example_inputs, names, seed) as written:
        for batch in batches:
            found[batch] = _time(
                backend or make_backend(),
                [_resized(model, batch) for model in written],
                threads=threads,
                seconds=seconds / len(batches),
                seed=seed,
                progress=None if progress is None else _part(progress, len(found), len(batches)),
            )
    return found


def _part(progress: Callable[[float], None], done: int, parts: int) -> Callable[[float], None]:
    return lambda share: progress((done + share) / parts)


@contextmanager
def _written(
    models: Sequence[_Given], example_inputs: Any, names: Sequence[str] | None, seed: int
) -> Iterator[list[Written]]:
    """Yield the models as files, in a folder that is removed whatever happens, or where they were."""
    check_models(models, names)
    opened = [model_of(model) for model in models]
    inputs = shared_inputs(opened, example_inputs, seed=seed)
    with scratch_folder() as folder:
        written = []
        for index, (model, given) in enumerate(zip(opened, models, strict=True)):
            called = name_of(given) if names is None else names[index]
            try:
                written.append(write_model(model, inputs, folder / f"{index}.onnx", called))
            except InputError as error:
                raise InputError(f"{called}: {error.what}", allowed=error.allowed, next_step=error.next_step) from error
        del opened, model  # their weights are in the files
        yield written


def _resized(model: Written, batch: int) -> Written:
    names = [size for shape in model.shapes for size in shape if not isinstance(size, int)]
    if not names or names[0] is None:
        what = f"{model.file.name} has no dynamic batch axis"
        raise InputError(what, next_step="export it with dynamic_shapes, or time it at its one size with time_apart")
    feeds = {}
    for (name, array), shape in zip(model.file.feeds.items(), model.shapes, strict=True):
        for axis, size in enumerate(shape):
            if size == names[0]:
                # Example of 2 samples: a batch of 5 is 0 1 0 1 0, and a batch of 1 is 0.
                array = np.take(array, np.arange(batch) % array.shape[axis], axis)
        feeds[name] = np.ascontiguousarray(array)
    return replace(model, file=replace(model.file, feeds=feeds))


def _time(
    backend: Backend,
    models: Sequence[Written],
    asked: _Patience | None = None,
    *,
    threads: int | None,
    seconds: float,
    seed: int,
    progress: Callable[[float], None] | None,
) -> Timing:
    check_threads(threads)
    where = environment(threads)
    files = [model.file for model in models]

    def settled(found: Sequence[Speedup]) -> bool:
        return asked is None or all(map(asked.answered, found))

    patience = 1 if asked is None else asked.patience
    times = backend.time_models(
        files, threads=threads, seconds=seconds, seed=seed, settled=settled, patience=patience, progress=progress
    )
    rows = zip(files[1:], times.speedups, strict=True)
    return Timing(
        tuple(ModelTiming(file.name, samples) for file, samples in zip(files, times.samples, strict=True)),
        tuple(ModelComparison(file.name, s.value, s.low, s.high, s.verdict) for file, s in rows),
        where,
        describe_feeds(files[0].feeds),
    )
