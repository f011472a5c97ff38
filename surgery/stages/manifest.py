"""The manifest of a folder of stages: JSON that anybody may have written, so that each value is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from surgery.errors import FileError, InputError
from surgery.stages.report import BALANCES, Crossing, SplitReport, StageReport, StripLayer
from surgery.system.rows import Row, parse_json

__all__ = ["MANIFEST", "SUFFIXES", "Manifest", "StageFile", "read_manifest"]

MANIFEST = "manifest.json"
SUFFIXES = {"program": ".pt2", "onnx": ".onnx"}  # of the files of stages, by their kind
_VERSION = 1
_MOST_STAGES = 4096
_AGAIN = "write the folder again with surgery split"
_TOP = ("surgery_split", "kind", "origin", "inputs", "outputs", "stages", "crossings", "objective", "notes", "layers")


@dataclass(frozen=True)
class StageFile:
    """The file of a stage in its folder, and the names of the values that it takes and gives, in order."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a folder of stages holds. ``kind`` is that of its files, ``origin`` that of the model that was cut.

    ``whole`` is what the kind needs to put the stages together again.
    """

    kind: str
    origin: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[StageFile, ...]
    report: SplitReport
    whole: Mapping[str, Any]

    def to_json(self) -> str:
        """Return the manifest as JSON text: a stage, a value or a layer on each line."""
        report = self.report.to_json()
        said = [vars(stage) | numbers for stage, numbers in zip(self.stages, report["stages"], strict=True)]
        names = ("balance", "link", "relay", "memory", "bottleneck", "bound", "gap")
        top = {
            "surgery_split": _VERSION,
            "kind": self.kind,
            "origin": self.origin,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "stages": said,
            "crossings": report["crossings"],
            "objective": {name: report[name] for name in names},
            "notes": report["notes"],
            "layers": report["layers"],
            "whole": self.whole,
        }
        return "{\n" + ",\n".join(f'"{key}": {_lines(value)}' for key, value in top.items()) + "\n}\n"


def _lines(value: Any) -> str:
    """Return a value as JSON text, a list of objects with each on a line of its own."""
    if isinstance(value, Sequence) and value and isinstance(value[0], dict):
        return "[\n  " + ",\n  ".join(json.dumps(each, allow_nan=False) for each in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def read_manifest(text: str) -> Manifest:
    """Read a manifest from JSON text.

    Raises:
        FileError: the text is no manifest; the message names the place.
    """
    try:
        found = parse_json(text)
    except ValueError as error:
        raise FileError(f"the manifest is not JSON: {error}", next_step=_AGAIN) from None
    try:
        return _read(Row.of(found, "manifest", _AGAIN))
    except FileError:
        raise
    except InputError as error:
        raise FileError(error.what, allowed=error.allowed, next_step=error.next_step) from None


def _read(top: Row) -> Manifest:
    if top.values.get("surgery_split") != _VERSION:
        top.refuse("surgery_split", str(_VERSION))
    top.only(*_TOP, "whole")
    kind = top.text("kind")
    if kind not in SUFFIXES:
        top.refuse("kind", ", ".join(SUFFIXES))
    rows = top.rows("stages")
    if not 1 <= len(rows) <= _MOST_STAGES:
        raise FileError(f"the manifest has {len(rows)} stages", allowed=f"1 to {_MOST_STAGES}", next_step=_AGAIN)
    stages = tuple(StageFile(row.text("file"), row.texts("inputs"), row.texts("outputs")) for row in rows)
    found = Manifest(
        kind=kind,
        origin=top.text("origin"),
        inputs=top.texts("inputs"),
        outputs=top.texts("outputs"),
        stages=stages,
        report=_report(top, rows),
        whole=top.row("whole").values,
    )
    _check_files(found)
    _check_values(found)
    return found


def _check_files(manifest: Manifest) -> None:
    """Each stage has the file that ``surgery split`` gives it: none leads out of the folder, and none is read twice."""
    for at, stage in enumerate(manifest.stages):
        name = f"stage{at}{SUFFIXES[manifest.kind]}"
        if stage.file != name:
            what = f"manifest.stages[{at}].file is {stage.file[:80]!r}"
            raise FileError(what, allowed=name, next_step=_AGAIN)


def _check_values(manifest: Manifest) -> None:
    """Each value is given once, and taken only by later stages: in this order the stages can run."""
    known = set(manifest.inputs)
    if len(known) < len(manifest.inputs):
        raise FileError("the manifest names an input twice", next_step=_AGAIN)
    for at, stage in enumerate(manifest.stages):
        for name in stage.inputs:
            if name not in known:
                what = f"stage {at} takes {name[:80]!r}, which is no input, and which no stage before it gives"
                raise FileError(what, next_step=_AGAIN)
        for name in stage.outputs:
            if name in known:
                raise FileError(f"stage {at} gives {name[:80]!r}, which is there already", next_step=_AGAIN)
            known.add(name)
    if missing := [name for name in manifest.outputs if name not in known]:
        raise FileError(f"the output {missing[0][:80]!r} is given by no stage", next_step=_AGAIN)


_COUNTS = ("operations", "macs", "tensor_bytes", "bytes_in", "bytes_out")


def _report(top: Row, rows: Sequence[Row]) -> SplitReport:
    goal = top.row("objective")
    goal.only("balance", "link", "relay", "memory", "bottleneck", "bound", "gap")
    balance = next((each for each in BALANCES if each == goal.values.get("balance")), None)
    if balance is None:
        goal.refuse("balance", ", ".join(BALANCES))
    link = goal.number("link")
    if not link > 0:
        goal.refuse("link", "bytes a second above 0")
    return SplitReport(
        stages=tuple(map(_stage, rows)),
        crossings=tuple(_crossing(row, len(rows)) for row in top.rows("crossings")),
        layers=tuple(_layer(row, len(rows)) for row in top.rows("layers")),
        balance=balance,
        link=link,
        relay=goal.truth("relay"),
        memory=None if goal.values.get("memory") is None else goal.count("memory"),
        bottleneck=_positive(goal, "bottleneck"),
        bound=None if goal.values.get("bound") is None else _positive(goal, "bound"),
        notes=top.texts("notes"),
    )


def _stage(row: Row) -> StageReport:
    row.only("file", "inputs", "outputs", *(field.name for field in fields(StageReport)))
    operations, macs, tensor_bytes, bytes_in, bytes_out = map(row.count, _COUNTS)
    measured = None if row.values.get("measured_s") is None else _positive(row, "measured_s")
    times = _positive(row, "predicted_s"), measured
    return StageReport(operations, row.text("first"), row.text("last"), macs, tensor_bytes, bytes_in, bytes_out, *times)


def _crossing(row: Row, stages: int) -> Crossing:
    row.only("value", "bytes", "source", "targets")
    targets = tuple(row.items("targets"))
    for target in targets:
        if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < stages:
            row.refuse("targets", f"numbers of stages below {stages}")
    return Crossing(row.text("value"), row.count("bytes"), _below(row, "source", stages), targets)


def _layer(row: Row, stages: int) -> StripLayer:
    row.only("name", "stage", "seconds", "bytes_after")
    stage = _below(row, "stage", stages)
    return StripLayer(row.text("name"), stage, _positive(row, "seconds"), row.count("bytes_after"))


def _below(row: Row, key: str, stages: int) -> int:
    found = row.count(key)
    if found >= stages:
        row.refuse(key, f"the number of a stage, below {stages}")
    return found


def _positive(row: Row, key: str) -> float:
    found = row.number(key)
    if found < 0:
        row.refuse(key, "a number from 0")
    return found
