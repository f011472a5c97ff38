"""Measurements kept on disk: texts that say all that a measurement depends on, and the numbers that were found.

The file is ``latencies.sqlite3`` in ``~/.cache/surgery`` (``$XDG_CACHE_HOME/surgery``). The environment variable
``SURGERY_CACHE`` names another folder, or is ``off``. Any number of processes may share the file. Where it cannot be
read or written, a log line says so, and measuring goes on without it.

What a latency depends on in operators and chains: kinds, shapes and geometries, as JSON values, and no numbers.
The same of a whole .onnx file, but for the values of its weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from dataclasses import fields as declared
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt
import onnx

from surgery.algebra import Branches, Chain, Operator, Shape, Shift, Step
from surgery.errors import FileError
from surgery.system.opening import check_regular, shown_path
from surgery.text import VERDICTS, first_line

__all__ = ["Cache", "Store", "cache_path", "described", "described_file"]


def described(shape: Shape, *operators: Operator | Chain) -> dict[str, Any]:
    """Return an input shape and the structure of what runs on it, as JSON values.

    >>> import torch
    >>> from surgery.algebra.operators import Linear
    >>> described((1, 3), Linear(torch.ones(2, 3)))
    {'operators': [{'kind': 'Linear', 'weight': [2, 3], 'bias': False}], 'shape': [1, 3]}
    """
    return {"operators": [_structure(operator) for operator in operators], "shape": list(shape)}


def _structure(step: Step | Chain) -> Any:
    if isinstance(step, Chain):
        return [_structure(each) for each in step.steps]
    if isinstance(step, Branches):
        return {"branches": [[_structure(each) for each in row] for row in step.rows]}
    kind = type(step).__name__
    if not isinstance(step, Operator):
        return {"kind": kind} | ({} if isinstance(step, Shift) else asdict(step))
    found: dict[str, Any] = {"kind": kind, "weight": list(step.weight.shape), "bias": step.bias is not None}
    form = step.form
    return found if form.geometry is None else found | {"groups": form.kernel[0], "geometry": asdict(form.geometry)}


_LEAST, _MOST = 1e-12, 1e12  # of seconds, and of ratios of them: what is stored may be from anywhere
_LONGEST = 1 << 20  # bytes of a value, or of a key
_WAIT = 2.0  # seconds for another process that writes
_STEPS = 100_000  # of SQLite's machine: one of our statements takes a few dozen
_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


class Cache:
    """Values that were measured before, in this process or, with a ``path``, in any; ``path=None`` uses no file."""

    def __init__(self, path: Path | None) -> None:
        self._store = Store(path)
        self._known: dict[str, dict[str, Any]] = {}

    def recall(
        self,
        kind: type[_Value],
        what: Mapping[str, Any],
        measure: Callable[[], _Value],
        *,
        keep: Callable[[_Value], bool] = lambda _: True,
    ) -> _Value:
        """Return the value that is known for ``what``, which is JSON values; else measure it, and keep it.

        ``kind`` is a dataclass of numbers, numbers by name, and verdicts. A value that ``keep`` turns down is returned,
        but not kept.
        """
        key = json.dumps(what, sort_keys=True, separators=(",", ":"))
        found = self._look_up(key, kind)
        if found is None:
            found = measure()
            if keep(found):
                self._known[key] = asdict(found)  # type: ignore[call-overload]  # any dataclass
                self._store.put(key, self._known[key])
        return found

    def _look_up(self, key: str, kind: type[_Value]) -> _Value | None:
        fields = self._known.get(key) or self._store.get(key)
        if fields is None:
            return None
        try:
            found = kind(**fields)
        except TypeError:
            return None  # written by another version, or by someone else
        named = {field.name for field in declared(kind) if str(field.type).startswith("Mapping")}  # type: ignore[arg-type]
        if not all(_is_sensible(name, value, name in named) for name, value in fields.items()):
            return None
        self._known[key] = fields
        return found


def _is_sensible(name: str, value: Any, by_name: bool) -> bool:
    if name == "verdict":
        return value in VERDICTS
    if by_name:
        return isinstance(value, dict) and all(_is_sensible("", each, False) for each in value.values())
    return isinstance(value, float) and _LEAST <= value <= _MOST


class Store:
    """Text keys to JSON values in one SQLite file; after the first failure it is silent and empty."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the fields that are stored under a key; None where there are none, or what is there cannot be read."""
        rows = self._execute("SELECT fields FROM latencies WHERE key = ?", (key,))
        try:
            found = json.loads(rows[0][0]) if rows else None
        except (TypeError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, fields: dict[str, Any]) -> None:
        """Store the fields of a key, in the place of those that it had."""
        self._execute("INSERT OR REPLACE INTO latencies VALUES (?, ?)", (key, json.dumps(fields)))

    def _execute(self, statement: str, values: tuple[str, ...]) -> list[tuple[Any, ...]]:
        if self._path is None:
            return []
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A link to itself is there for ``lexists`` alone, and is then no regular file.
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
    """Return the file of stored latencies; None if ``SURGERY_CACHE`` is ``off``, or there is no home folder for it."""
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


_LARGE = 1024  # bytes of a tensor whose values say nothing of the graph, as those of a shape do
_DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data")


def described_file(path: Path, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Return a digest of the graph of an .onnx file, without the numbers of large weights, and of its inputs' shapes.

    Names count, because what is measured of nodes is told by names.
    """
    proto = onnx.load(path, load_external_data=False)
    for node in proto.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() > _LARGE or tensor.data_location == onnx.TensorProto.EXTERNAL:
            for name in _DATA:
                tensor.ClearField(name)
    shapes = [(name, list(array.shape), str(array.dtype)) for name, array in feeds.items()]
    found = hashlib.sha256(proto.SerializeToString(deterministic=True))
    found.update(json.dumps(shapes).encode())
    return {"file": found.hexdigest()}
