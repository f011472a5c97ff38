"""Store a report with a model: in the record of a program, which ``surgery.save`` writes and ``surgery.load`` reads.

``decompose`` and ``recompose`` write a new record, so a report never outlives the model that it describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from surgery.errors import InputError

__all__ = ["attach", "read"]

_KEY = "surgery"


def attach(program: ExportedProgram, report: Mapping[str, Any]) -> None:
    """Add a report to the record of a program; only the record changes."""
    record = program.graph_module.meta.get(_KEY)
    kept = record if isinstance(record, dict) else {"version": 1, "sites": {}}
    program.graph_module.meta[_KEY] = {**kept, "report": dict(report)}


def read(program: ExportedProgram) -> dict[str, Any]:
    """Return the report stored with a program, unchecked: if the program came from a file, do not trust its values.

    Raises:
        InputError: the program has no report.
    """
    record = program.graph_module.meta.get(_KEY)
    report = record.get("report") if isinstance(record, dict) else None
    if not isinstance(report, dict):
        raise InputError(
            "the model has no report",
            next_step="make one with surgery decompose, and give its output to surgery report",
        )
    return dict(report)
