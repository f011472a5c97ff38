"""Collect the JSON values of a report, from the result of decompose and the timing of both models.

Store a report with a model: in the record of a program, which ``surgery.save`` writes and ``surgery.load`` reads.

``decompose`` and ``recompose`` write a new record, so a report never outlives the model that it describes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from surgery.errors import InputError
from surgery.files.save import model_size
from surgery.kinds.registry import Model, kind_of
from surgery.passes.results import DecomposeResult, Search
from surgery.report.content import VERSION
from surgery.runtime.bench import Environment, Timing, environment

__all__ = ["attach", "collect", "read"]

_KEY = "surgery"


def attach(model: Model, report: Mapping[str, Any]) -> None:
    """Add a report to the record of a program or an ONNX model; only the record changes."""
    kind = kind_of(model)
    record = kind.kept(model)
    kept = record if isinstance(record, dict) else {"version": 1, "sites": {}}
    kind.keep(model, {**kept, "report": dict(report)})


def read(model: Model) -> dict[str, Any]:
    """Return the report stored with a model, unchecked: if the model came from a file, do not trust its values.

    Raises:
        InputError: the model has no report.
    """
    record = kind_of(model).kept(model)
    report = record.get("report") if isinstance(record, dict) else None
    if not isinstance(report, dict):
        raise InputError(
            "the model has no report",
            next_step="make one with surgery decompose, and give its output to surgery report",
        )
    return dict(report)


def collect(
    result: DecomposeResult[Any],
    *,
    timing: Timing | str | None = None,
    where: Environment | None = None,
    files: tuple[Path | None, Path | None] = (None, None),
) -> dict[str, Any]:
    """Return the content of a report as JSON values: numbers are finite, times in seconds, sizes in bytes.

    Args:
        result: what ``decompose`` returned.
        timing: the timing of both models, or the reason why there is none; by default that of the result's search.
        where: the machine; by default that of the timing, or else this machine.
        files: the files of both models, for their names and sizes; None for a file that is not written.
    """
    measured = timing if timing is not None or result.search is None else result.search.timing
    timed = measured if isinstance(measured, Timing) else None
    place = where or (timed.environment if timed is not None else environment())
    content = {
        "surgery_report": VERSION,
        "input": None if files[0] is None else str(files[0]),
        "output": None if files[1] is None else str(files[1]),
        "before": asdict(result.before) | {"file_size": _size(files[0])},
        "after": asdict(result.after) | {"file_size": _size(files[1])},
        "changes": [asdict(change) for change in result.changes],
        "skips": [asdict(skip) for skip in result.skips],
        "timing": measured if timed is None else timed.to_json(),
        "environment": asdict(place),
        "promise": None if result.promise is None else asdict(result.promise),
        "seen": None if result.seen is None else asdict(result.seen),
        "search": None if result.search is None else _search(result.search),
        "plan": json.loads(result.plan.to_json()),
    }
    plain: dict[str, Any] = _plain(content)
    return plain


def _size(path: Path | None) -> int | None:
    return None if path is None or not path.exists() else model_size(path)


def _search(search: Search) -> dict[str, Any]:
    return {
        "frontier": [list(point) for point in search.frontier],
        "chosen": None if search.chosen is None else list(search.chosen),
        "predicted_speedup": search.predicted,
        "cost": search.cost,
        "trials": [asdict(trial) for trial in search.trials],
        "metrics": None if search.metrics is None else list(search.metrics),
        "reached": [list(pair) for pair in search.reached],
    }


def _plain(value: Any) -> Any:
    """Return the value in JSON's types: tuples become lists, and numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
