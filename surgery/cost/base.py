"""The interface of a backend: whatever measures costs where a model is to run.

A backend times operators against chains, for the choice of ranks, and whole models against an original, for promises.
A new one is a subclass of ``Backend`` in a folder of its own and a row in ``surgery.cost.base.BACKENDS``. It says

- ``key``: all that its numbers depend on besides the model: versions, the machine, the number of threads;
- ``channel_multiple``: the number of channels that its kernels like;
- ``time_pair``, ``time_one`` and ``time_models``: how it measures;
- ``time_nodes``: where the time of a model goes, if it can look inside of one.

What was measured is kept under the key, so that no backend sees the numbers of another. Models come to a backend as
.onnx files: whoever calls has exported them, and a backend knows neither torch's graphs nor how they are exported.

The backends by name. Each is imported when it is first asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy.typing as npt

from surgery.algebra import Chain, Operator, Shape
from surgery.cost.cache import Cache, cache_path, described, described_file
from surgery.cost.timing import Samples, Speedup
from surgery.errors import InputError
from surgery.text import Verdict

__all__ = ["BACKENDS", "Backend", "Comparison", "ModelFile", "ModelTimes", "NodeTimes", "Seconds", "make_backend"]

_Value = TypeVar("_Value")
_MOST_KEPT = 5000  # nodes of a model whose times are kept: the cache takes no larger values


@dataclass(frozen=True)
class Comparison:
    """Median seconds of an operator and of its chain, from one interleaved measurement.

    ``speedup`` is dense over chain, and ``low`` to ``high`` its 95 % interval. ``verdict`` says what the chain is.
    """

    dense_s: float
    chain_s: float
    speedup: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Seconds:
    """Median seconds of one run."""

    seconds: float


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A whole model to be timed: an .onnx file and its inputs by name, in order; ``name`` stands for it in errors."""

    name: str
    path: Path
    feeds: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ModelTimes:
    """The samples of each model, and the speed-up of each but the first over the first."""

    samples: tuple[Samples, ...]
    speedups: tuple[Speedup, ...]


@dataclass(frozen=True)
class NodeTimes:
    """Median seconds of one run of a model, and how many of them each of its values took, by name.

    The time of what was fused counts for the last value that it computes. Values without a time of their own are left
    out; the seconds of all are ``total`` at most.
    """

    total: float
    seconds: Mapping[str, float]


class Backend(ABC):
    """Measures operators, chains and models; what was measured before, in any process, is looked up.

    ``path`` is the file of what was measured, by default ``cache_path()``; ``keep=False`` uses no file.
    """

    name: ClassVar[str]
    threads: int

    def __init__(self, *, path: Path | None = None, keep: bool = True) -> None:
        self._cache = Cache((path or cache_path()) if keep else None)

    @property
    @abstractmethod
    def key(self) -> dict[str, Any]:
        """All that the numbers depend on besides what is measured, as JSON values."""

    @property
    @abstractmethod
    def channel_multiple(self) -> int:
        """The number of channels that the kernels like: ranks that are multiples of it waste nothing."""

    @abstractmethod
    def time_pair(self, dense: Operator | Chain, chain: Operator | Chain, shape: Shape) -> Comparison:
        """Time two against each other at an input shape; raises InputError where one of them cannot be run.

        The weights may be on the meta device, without numbers.
        """

    @abstractmethod
    def time_one(self, operator: Operator | Chain, shape: Shape) -> Seconds:
        """Time one at an input shape; raises InputError where it cannot be run."""

    @abstractmethod
    def time_models(
        self,
        models: Sequence[ModelFile],
        *,
        threads: int | None = None,
        seconds: float = 5.0,
        seed: int = 0,
        settled: Callable[[Sequence[Speedup]], bool] | None = None,
        patience: int = 1,
        progress: Callable[[float], None] | None = None,
    ) -> ModelTimes:
        """Time whole models for about ``seconds`` in all, each by itself, as its user will run it.

        ``threads=None`` leaves the number to the runtime. Where ``settled`` says that the speed-ups leave open what was
        asked, the measurement takes longer, up to ``patience`` times as long. ``progress`` gets the share that is done.

        Raises:
            InputError: a model cannot be run.
        """

    def time_nodes(
        self,
        model: ModelFile,
        *,
        threads: int | None = None,
        seconds: float = 2.0,
        progress: Callable[[float], None] | None = None,
    ) -> NodeTimes:
        """Time the nodes of a model for about ``seconds``; a backend that cannot do so times the whole alone.

        ``threads`` and ``progress`` are those of ``time_models``, and so is what is raised.
        """
        times = self.time_models([model], threads=threads, seconds=seconds, progress=progress)
        return NodeTimes(times.samples[0].median, {})

    def profile(
        self,
        model: ModelFile,
        *,
        threads: int | None = None,
        seconds: float = 2.0,
        progress: Callable[[float], None] | None = None,
    ) -> NodeTimes:
        """Return what ``time_nodes`` finds, or has found before of a model of this structure; raises as it does."""
        what = described_file(model.path, model.feeds) | {"nodes": threads}
        return self.recall(
            NodeTimes,
            what,
            lambda: self.time_nodes(model, threads=threads, seconds=seconds, progress=progress),
            keep=lambda found: len(found.seconds) <= _MOST_KEPT,
        )

    def compare(self, dense: Operator | Chain, chain: Operator | Chain, shape: Shape) -> Comparison:
        """Return both latencies at an input shape, and how much faster the chain is; raises as ``time_pair``."""
        what = described(shape, dense, chain)
        return self.recall(Comparison, what, lambda: self.time_pair(dense, chain, shape))

    def measure(self, operator: Operator | Chain, shape: Shape) -> float:
        """Return the median seconds of one run at an input shape; raises as ``time_one``."""
        return self.recall(Seconds, described(shape, operator), lambda: self.time_one(operator, shape)).seconds

    def recall(
        self,
        kind: type[_Value],
        what: Mapping[str, Any],
        measure: Callable[[], _Value],
        *,
        keep: Callable[[_Value], bool] = lambda _: True,
    ) -> _Value:
        """Return what this backend has measured before of ``what``, else measure it now, and keep it.

        ``what`` describes in JSON values all that the numbers depend on, but for the backend's own ``key``. ``kind`` is
        a dataclass of numbers and verdicts. A value that ``keep`` turns down is returned, but not kept.
        """
        return self._cache.recall(kind, {**what, **self.key, "backend": self.name}, measure, keep=keep)


def _onnxruntime(**options: Any) -> Backend:
    from surgery.cost.onnxruntime.backend import OnnxRuntime

    return OnnxRuntime(**options)


BACKENDS: dict[str, Callable[..., Backend]] = {
    "onnxruntime": _onnxruntime,
}


def make_backend(name: str = "onnxruntime", **options: Any) -> Backend:
    """Return a new backend of this name; the options are those of its class.

    Raises:
        InputError: an unknown name.

    >>> make_backend("abacus")
    Traceback (most recent call last):
    surgery.errors.InputError: the backend 'abacus' is not known; allowed: onnxruntime
    """
    if name not in BACKENDS:
        raise InputError(f"the backend {name!r} is not known", allowed=", ".join(BACKENDS))
    return BACKENDS[name](**options)
