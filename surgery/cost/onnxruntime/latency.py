"""Latencies of operators and chains, measured once for each structure and kept on disk.

A latency depends on shapes and geometry, on the machine and on the runtime, not on the values of weights; the key of
a stored one holds exactly these. All are measured in float32 (``onnx_model`` says why), so that the dtype is no part
of it. A pair of a dense operator and its chain is measured in one interleaved run, and stored as a pair.

The file is ``latencies.sqlite3`` in ``~/.cache/surgery`` (``$XDG_CACHE_HOME/surgery``); the environment variable
``SURGERY_CACHE`` names another folder, or is ``off``. Any number of processes may share it. Where it cannot be read or
written, a log line says so, and measuring goes on without it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Conv, Geometry, Operator, Shape
from surgery.algebra.steps import Branches, Shift, Step
from surgery.cost.onnxruntime.model import build_choice, build_model, entries
from surgery.cost.onnxruntime.timing import (
    VERDICTS,
    Budget,
    Samples,
    bind,
    compare_samples,
    interleave,
    open_session,
    physical_cores,
)
from surgery.errors import FileError
from surgery.system.opening import check_regular, shown_path
from surgery.system.scratch import scratch_folder
from surgery.text import first_line

__all__ = ["Comparison", "Latencies", "Seconds", "cache_path", "channel_multiple", "cpu_name"]

_PROTOCOL = 2  # raise it whenever the way of measuring changes: stored latencies are then measured anew
_CPU_FIELDS = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
_LEAST, _MOST = 1e-12, 1e12  # of seconds, and of ratios of them: what is stored may be from anywhere
_LONGEST = 1 << 20  # bytes of a value, or of a key
_WAIT = 2.0  # seconds for another process that writes
_STEPS = 100_000  # of SQLite's machine: one of our statements takes a few dozen
_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Comparison:
    """Median seconds of a dense operator and of its chain, from one interleaved run.

    ``speedup`` is dense over chain, ``low`` to ``high`` its 95 % interval; ``verdict`` says whether the chain is
    "faster", "slower", or there is "no difference".
    """

    dense_s: float
    chain_s: float
    speedup: float
    low: float
    high: float
    verdict: str


class Latencies:
    """Measures operators and chains under onnxruntime; what was measured before, in any process, is looked up.

    ``threads`` defaults to the physical cores; ``budget`` is for one measurement; ``path`` is the file, by default
    ``cache_path()``; ``keep=False`` uses no file. ``measured`` counts the measurements that really ran.

    >>> from surgery.algebra.operators import Linear
    >>> latencies = Latencies(threads=1, budget=Budget(seconds=0.01), keep=False)
    >>> latencies.measure(Linear(torch.ones(4, 4)), (1, 4)) > 0
    True
    """

    def __init__(
        self,
        *,
        threads: int | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        path: Path | None = None,
        keep: bool = True,
    ) -> None:
        self.threads = physical_cores() if threads is None else threads
        self.budget = budget or Budget(seconds=0.3, max_rounds=500)
        self.seed = seed
        self.measured = 0
        self._store = _Store((path or cache_path()) if keep else None)
        self._known: dict[str, dict[str, Any]] = {}

    def compare(self, dense: Operator | Chain, chain: Operator | Chain, shape: Shape) -> Comparison:
        """Return both latencies at an input shape, and how much faster the chain is.

        Raises:
            InputError: onnxruntime cannot run one of the two.
        """

        def measure() -> Comparison:
            first, second = self._time_pair(dense, chain, shape)
            found = compare_samples(first, second, seed=self.seed)
            return Comparison(first.median, second.median, found.value, found.low, found.high, found.verdict)

        return self.recall(Comparison, _described(shape, dense, chain), measure)

    def measure(self, operator: Operator | Chain, shape: Shape) -> float:
        """Return the median seconds of one run at an input shape; raises InputError as ``compare``."""
        what = _described(shape, operator)
        return self.recall(Seconds, what, lambda: Seconds(self._time_single(operator, shape).median)).seconds

    def recall(
        self,
        kind: type[_Value],
        what: dict[str, Any],
        measure: Callable[[], _Value],
        *,
        keep: Callable[[_Value], bool] = lambda _: True,
    ) -> _Value:
        """Return what was measured before of what is described in JSON values, in all that its latency depends on.

        If it never was, on this machine with these versions and threads, it is measured now, and kept if ``keep`` says
        so. ``kind`` is a dataclass of numbers and verdicts.
        """
        key = self._key(what)
        found = self._look_up(key, kind)
        if found is None:
            found = measure()
            if keep(found):
                self._keep(key, asdict(found))  # type: ignore[call-overload]  # any dataclass
        return found

    def _time_pair(self, first: Operator | Chain, second: Operator | Chain, shape: Shape) -> tuple[Samples, Samples]:
        session = open_session(build_choice(first, second, shape), threads=self.threads, spin=True)
        x = self._input(first, shape)
        runs = [bind(session, {"input": x, "second": np.array(choice)}) for choice in (False, True)]
        return self._interleave(runs)  # type: ignore[return-value]  # as many as there are runs

    def _time_single(self, operator: Operator | Chain, shape: Shape) -> Samples:
        session = open_session(build_model(operator, shape), threads=self.threads, spin=True)
        return self._interleave([bind(session, {"input": self._input(operator, shape)})])[0]

    def _interleave(self, runs: list[Callable[[], None]]) -> tuple[Samples, ...]:
        self.measured += 1
        return interleave(runs, self.budget, seed=self.seed)

    def _input(self, operator: Operator | Chain, shape: Shape) -> npt.NDArray[Any]:
        generator = np.random.default_rng(self.seed)
        if limit := entries(operator):
            return generator.integers(limit, size=shape, dtype=np.int64)
        return generator.standard_normal(shape, dtype=np.float32)

    def _key(self, what: dict[str, Any]) -> str:
        key = what | {
            "threads": self.threads,
            "onnxruntime": ort.__version__,
            "cpu": cpu_name(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "protocol": _PROTOCOL,
        }
        return json.dumps(key, sort_keys=True, separators=(",", ":"))

    def _look_up(self, key: str, kind: type[_Value]) -> _Value | None:
        fields = self._known.get(key) or self._store.get(key)
        if fields is None:
            return None
        try:
            found = kind(**fields)
        except TypeError:
            return None  # written by another version, or by someone else
        if not all(map(_is_sensible, fields, fields.values())):
            return None
        self._known[key] = fields
        return found

    def _keep(self, key: str, fields: dict[str, Any]) -> None:
        self._known[key] = fields
        self._store.put(key, fields)


@dataclass(frozen=True)
class Seconds:
    """Median seconds of one run."""

    seconds: float


def _is_sensible(name: str, value: Any) -> bool:
    if name == "verdict":
        return value in VERDICTS
    return isinstance(value, float) and _LEAST <= value <= _MOST


def _described(shape: Shape, *operators: Operator | Chain) -> dict[str, Any]:
    return {"operators": [_structure(operator) for operator in operators], "shape": list(shape)}


def _structure(operator: Step | Chain) -> Any:
    """Return all that a latency depends on in an operator or another step of a chain, as JSON values."""
    if isinstance(operator, Chain):
        return [_structure(step) for step in operator.steps]
    if isinstance(operator, Branches):
        return {"branches": [[_structure(part) for part in row] for row in operator.rows]}
    if not isinstance(operator, Operator):
        return {"kind": type(operator).__name__} | ({} if isinstance(operator, Shift) else asdict(operator))
    found: dict[str, Any] = {
        "kind": type(operator).__name__,
        "weight": list(operator.weight.shape),
        "bias": operator.bias is not None,
    }
    if isinstance(operator, Conv):
        found |= {"groups": operator.groups, "geometry": asdict(operator.geometry)}
    return found


class _Store:
    """Text keys to JSON values in one SQLite file; after the first failure it is silent and empty."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def get(self, key: str) -> dict[str, Any] | None:
        rows = self._execute("SELECT fields FROM latencies WHERE key = ?", (key,))
        try:
            found = json.loads(rows[0][0]) if rows else None
        except (TypeError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, fields: dict[str, Any]) -> None:
        self._execute("INSERT OR REPLACE INTO latencies VALUES (?, ?)", (key, json.dumps(fields)))

    def _execute(self, statement: str, values: tuple[str, ...]) -> list[tuple[Any, ...]]:
        if self._path is None:
            return []
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self._path):
                check_regular(self._path)
            with closing(sqlite3.connect(self._path, timeout=_WAIT, isolation_level=None)) as connection:
                _bound(connection)
                connection.execute("CREATE TABLE IF NOT EXISTS latencies (key TEXT PRIMARY KEY, fields TEXT)")
                return connection.execute(statement, values).fetchmany(1)
        except (sqlite3.Error, OSError, FileError) as error:
            _warn(f"the latency cache {shown_path(self._path)} cannot be used ({first_line(error)})")
            self._path = None
            return []


def _bound(connection: sqlite3.Connection) -> None:
    """Bound what a file's own views and triggers can do, in steps and memory."""
    connection.set_progress_handler(lambda: True, _STEPS)  # true: no further
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)


@cache
def _warn(what: str) -> None:
    _log.warning("%s; measuring without it", what)


def cache_path() -> Path | None:
    """Return the file of stored latencies; None if ``SURGERY_CACHE`` is ``off``, or there is no home to have it in."""
    chosen = os.environ.get("SURGERY_CACHE", "")
    if chosen.lower() == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(chosen or (base if os.path.isabs(base) else "~/.cache"))
    try:
        folder = folder.expanduser()
    except RuntimeError:
        _warn(f"there is no home folder for the latency cache, {shown_path(folder)} (SURGERY_CACHE names another)")
        return None
    return (folder if chosen else folder / "surgery") / "latencies.sqlite3"


@cache
def cpu_name() -> str:
    """Return the processor's model with its family and stepping: virtual machines hide all but these."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine()
    found = [fields[name] for name in _CPU_FIELDS if fields.get(name)]
    return f"{found[0]} ({'/'.join(found[1:])})" if found else platform.machine()


@cache
def channel_multiple() -> int:
    """Return the channel block of onnxruntime's fast convolution here: ranks that are multiples of it waste nothing.

    onnxruntime asks MLAS (``MlasNchwcGetBlockSize``): 16 with AVX-512, 8 with other vector units of x86-64, 16 with
    NEON in recent versions. So it is not guessed: onnxruntime optimises a convolution to one channel, and its filter
    comes back padded to a whole block. Where there is no blocked convolution, or no room for a temporary file, 16 with
    AVX-512, otherwise 8.
    """
    graph = _optimised(build_model(Conv(torch.ones(1, 64, 3, 3), geometry=Geometry.pointwise(2)), (1, 64, 3, 3)))
    if graph is not None and any(node.domain == "com.microsoft.nchwc" for node in graph.node):
        return max(int(weight.dims[0]) for weight in graph.initializer)
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def _optimised(model: bytes) -> onnx.GraphProto | None:
    """Return the graph that onnxruntime makes of a model; None where there is no room for the file it needs."""
    try:
        with scratch_folder() as folder:
            file = folder / "optimised.onnx"
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.optimized_model_filepath = str(file)
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            return onnx.load(file).graph
    except FileError:
        return None
