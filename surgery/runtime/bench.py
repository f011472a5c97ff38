"""Time whole models under onnxruntime, interleaved, on the same inputs, and say which is faster with what certainty."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy.typing as npt
import onnxruntime as ort
import torch

from surgery.cost.onnxruntime.sessions import bind
from surgery.cost.timing import Budget, Samples, compare_samples, interleave, waited
from surgery.errors import InputError, only_own_errors
from surgery.files.load import model_of
from surgery.kinds.onnx.session import check_threads, open_session
from surgery.kinds.registry import Model, is_model
from surgery.runtime.compare import shared_inputs
from surgery.runtime.written import Written, write_model
from surgery.system.machine import cpu_name, physical_cores
from surgery.system.memory import give_back
from surgery.system.scratch import scratch_folder
from surgery.text import Verdict

__all__ = [
    "Environment",
    "ModelComparison",
    "ModelTiming",
    "Ready",
    "Timing",
    "bench",
    "check_models",
    "describe_feeds",
    "environment",
    "make_ready",
    "name_of",
    "time_ready",
]


@dataclass(frozen=True)
class Environment:
    """Where it was measured: everything that a latency depends on.

    ``load`` is the number of processes that wanted a core in the minute before (None if the system does not say). On a
    busy machine, expect wide intervals, and do not trust a comparison with more than one thread.
    """

    threads: int
    load: float | None
    cpu: str
    instruction_set: str
    python: str
    torch: str
    onnxruntime: str
    surgery: str


@dataclass(frozen=True)
class ModelTiming:
    """Latency of one model; ``path`` is its file, or the class of a model in memory."""

    path: str
    samples: Samples = field(repr=False)

    @property
    def median_s(self) -> float:
        """Median seconds of one run."""
        return self.samples.median

    @property
    def p90_s(self) -> float:
        """Seconds that nine runs in ten stay below."""
        return self.samples.p90

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return self.samples.spread

    @property
    def runs(self) -> int:
        """Number of timed runs."""
        return self.samples.runs


@dataclass(frozen=True)
class ModelComparison:
    """Speed-up of one model over the first, with its 95 % interval, and "faster", "slower" or "no difference"."""

    path: str
    speedup: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Timing:
    """Latencies of all models, each later one compared with the first, and the environment.

    ``inputs`` say what they ran on, as ``x float32 8x3x224x224``.
    """

    models: tuple[ModelTiming, ...]
    comparisons: tuple[ModelComparison, ...]
    environment: Environment
    inputs: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the timing as JSON values; times in seconds."""
        keys = ("path", "median_s", "p90_s", "spread", "runs")
        return {
            "models": [{key: getattr(model, key) for key in keys} for model in self.models],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "inputs": list(self.inputs),
            "environment": asdict(self.environment),
        }


@dataclass(frozen=True, eq=False)
class Ready:
    """A model that is loaded in onnxruntime, with its inputs in place: each call of ``run`` is one run."""

    path: str
    run: Callable[[], None]
    inputs: tuple[str, ...]


@only_own_errors
def bench(
    models: Sequence[Model | str | os.PathLike[str]],
    example_inputs: Any = None,
    *,
    names: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Timing:
    """Time models under onnxruntime on the same inputs, interleaved, for about ``seconds`` in all.

    Models are modules, programs, ONNX models, or paths of their files. PyTorch models are exported to temporary files
    and checked first. Without ``example_inputs``, those are used that ``compare`` would use; dynamic sizes of an ONNX
    model are 1. ``names`` replace the models' paths in the
    result. ``threads`` defaults to the physical cores. ``progress`` gets the share of the time that has passed.

    Models that take turns find their weights evicted from the caches, as in a program that does other things between
    two runs. ``time_apart`` times each model as it runs by itself, again and again, in its own processes. There a model
    whose weights fit in the cache is faster; one whose weights do not fit is as fast as here.

    Raises:
        InputError: no models, or models that do not take the same inputs.
        CaptureError, CheckError: a model that cannot be exported, as ``export_onnx`` says.

    >>> bench([torch.nn.Linear(8, 8)], torch.ones(1, 8), seconds=0.01).models[0].runs >= 11
    True
    """
    check_models(models, names)
    ready = make_ready(models, example_inputs, names=names, threads=threads, seed=seed)
    return time_ready(ready, threads=threads, seconds=seconds, seed=seed, progress=progress)


def make_ready(
    models: Sequence[Model | str | os.PathLike[str]],
    example_inputs: Any = None,
    *,
    names: Sequence[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    move: bool = False,
) -> list[Ready]:
    """Return models to be timed, perhaps more than once; arguments and exceptions are those of ``bench``.

    With ``move`` the weights of ONNX models then stand in temporary files, and no longer in memory.
    """
    check_threads(threads)
    threads = threads or physical_cores()
    opened = [model_of(model) for model in models]
    inputs = shared_inputs(opened, example_inputs, seed=seed)
    with scratch_folder() as folder:
        written: list[Written] = []
        for name, model in zip(names or map(name_of, models), opened, strict=True):
            with _naming(name):
                path = folder / f"{len(written)}.onnx"
                written.append(write_model(model, inputs, path, name, move=move))
        del opened, model  # their weights are in the files
        gc.collect()  # a graph and its nodes hold each other, and the weights, also of copies that nobody needs
        return [_opened(each, threads) for each in written]


def time_ready(
    ready: Sequence[Ready],
    *,
    threads: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Timing:
    """Time models that are ready, interleaved, for about ``seconds`` in all, with the threads they were made for.

    With one thread, the time that a run waits for a core in use by other programs does not count, if the system
    reports it.
    """
    where = environment(threads)
    runs = [model.run for model in ready]
    budget, waits = Budget(seconds, max_rounds=10_000), waited if where.threads == 1 else float
    samples = interleave(runs, budget, seed=seed, progress=progress, waited=waits)
    rows = [(model.path, sample) for model, sample in zip(ready, samples, strict=True)]
    return Timing(
        tuple(ModelTiming(path, sample) for path, sample in rows),
        tuple(_compare(path, samples[0], later, seed) for path, later in rows[1:]),
        where,
        ready[0].inputs,
    )


def check_models(models: Any, names: Sequence[str] | None) -> None:
    """Raise InputError unless there is a list of models and, if any, one name for each."""
    if isinstance(models, str | os.PathLike) or is_model(models) or not models:
        raise InputError("timing needs a list of models", allowed="one or more")
    if names is not None and len(names) != len(models):
        raise InputError(f"{len(names)} names for {len(models)} models", allowed="one name for each model")


def name_of(model: Any) -> str:
    """Return what a model is called in results: its path, or the class of a model in memory."""
    return os.fspath(model) if isinstance(model, str | os.PathLike) else type(model).__name__


def describe_feeds(feeds: Mapping[str, npt.NDArray[Any]]) -> tuple[str, ...]:
    """Return each input of a session in words: its name, type and shape."""
    return tuple(f"{name} {a.dtype} {'x'.join(map(str, a.shape)) or 'scalar'}" for name, a in feeds.items())


def _opened(model: Written, threads: int) -> Ready:
    """Return a model that was written, loaded in onnxruntime."""
    file = model.file
    with _naming(file.name):
        session = open_session(file.path, threads=threads)
        run = bind(session, file.feeds)
    give_back()  # the copies of weights that onnxruntime has brought into its own layouts
    return Ready(file.name, run, describe_feeds(file.feeds))


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Let errors name the model."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{model}: {error.what}", allowed=error.allowed, next_step=error.next_step) from error


def _compare(path: str, first: Samples, later: Samples, seed: int) -> ModelComparison:
    speedup = compare_samples(first, later, seed=seed)
    return ModelComparison(path, speedup.value, speedup.low, speedup.high, speedup.verdict)


def environment(threads: int | None = None) -> Environment:
    """Return this machine, these versions and the number of threads (by default the physical cores)."""
    try:
        ours = version("model-surgery")
    except PackageNotFoundError:
        ours = "not installed"
    return Environment(
        threads=threads or physical_cores(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        cpu=cpu_name(),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
        onnxruntime=ort.__version__,
        surgery=ours,
    )
