"""Where a report travels: in the record of a program, which ``surgery.save`` writes and ``surgery.load`` reads.

``decompose`` and ``recompose`` write the record anew, so a report never outlives the model that it is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from surgery.errors import InputError

__all__ = ["attach", "read"]

_KEY = "surgery"


def attach(program: ExportedProgram, report: Mapping[str, Any]) -> None:
    """Put a report into the record of a program, beside what is there; only the record is changed."""
    record = program.graph_module.meta.get(_KEY)
    kept = record if isinstance(record, dict) else {"version": 1, "sites": {}}
    program.graph_module.meta[_KEY] = {**kept, "report": dict(report)}


def read(program: ExportedProgram) -> dict[str, Any]:
    """Return the report that travels with a program, as it is: from a file, nothing in it is to be trusted.

    Raises:
        InputError: the program has none.
    """
    record = program.graph_module.meta.get(_KEY)
    report = record.get("report") if isinstance(record, dict) else None
    if not isinstance(report, dict):
        raise InputError(
            "the model has no report",
            next_step="make one with surgery decompose, and give its output to surgery report",
        )
    return dict(report)
