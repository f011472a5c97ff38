"""Manifests of folders of stages that lie: each maker changes the honest one, or the folder around it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.stages.manifest import MANIFEST

__all__ = ["FOLDERS"]

Maker = Callable[[Path], None]


def _edited(change: Callable[[dict[str, Any]], object]) -> Maker:
    def make(folder: Path) -> None:
        said = json.loads((folder / MANIFEST).read_text())
        change(said)
        (folder / MANIFEST).write_text(json.dumps(said))

    return make


def _stage(at: int, **values: Any) -> Maker:
    return _edited(lambda said: said["stages"][at].update(values))


def _top(**values: Any) -> Maker:
    return _edited(lambda said: said.update(values))


def _goal(**values: Any) -> Maker:
    return _edited(lambda said: said["objective"].update(values))


def _file(name: str, change: Callable[[Path], object]) -> Maker:
    def make(folder: Path) -> None:
        change(folder / name)

    return make


def _text(text: str | bytes) -> Maker:
    raw = text.encode() if isinstance(text, str) else text
    return _file(MANIFEST, lambda path: path.write_bytes(raw))


def _replaced(old: str, new: str) -> Maker:
    def make(folder: Path) -> None:
        text = (folder / MANIFEST).read_text()
        assert old in text
        (folder / MANIFEST).write_text(text.replace(old, new, 1))

    return make


def _linked(name: str) -> Maker:
    """The file lies outside, and a link to it inside."""

    def make(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return make


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _swapped(folder: Path) -> None:
    for old, new in (("stage0", "x"), ("stage1", "stage0"), ("x", "stage1")):
        (folder / f"{old}.pt2").rename(folder / f"{new}.pt2")


def _circle(said: dict[str, Any]) -> None:
    """Stage 0 takes what stage 1 gives."""
    said["stages"][0]["inputs"] = list(said["stages"][1]["outputs"])


def _given_twice(said: dict[str, Any]) -> None:
    said["stages"][1]["outputs"] = list(said["stages"][0]["outputs"])


FOLDERS: dict[str, Maker] = {
    "file above": _stage(0, file="../stage0.pt2"),
    "file below": _stage(0, file="stages/stage0.pt2"),
    "absolute file": _stage(0, file="/etc/passwd"),
    "file with a drive": _stage(0, file="C:stage0.pt2"),
    "file of another stage": _stage(1, file="stage0.pt2"),
    "no file": _stage(0, file=None),
    "file of zero bytes": _stage(0, file="stage0.pt2\0"),
    "manifest is a link": _linked(MANIFEST),
    "stage is a link": _linked("stage1.pt2"),
    "manifest is a pipe": _file(MANIFEST, _pipe),
    "stage is a pipe": _file("stage0.pt2", _pipe),
    "stage is a folder": _file("stage0.pt2", _folder),
    "stage is missing": _file("stage1.pt2", Path.unlink),
    "stage is empty": _file("stage1.pt2", lambda path: path.write_bytes(b"")),
    "stage is text": _file("stage1.pt2", lambda path: path.write_text("a stage")),
    "stage of another kind": _file("stage1.pt2", lambda path: path.write_bytes(b"\x08\x08:\x00B\x04\n\x00\x10\x11")),
    "stages swapped": _swapped,
    "not JSON": _text("stages: 2"),
    "not UTF-8": _text(b'{"surgery_split": "\xff"}'),
    "empty": _text(""),
    "a list": _text("[]"),
    "nothing in it": _text("{}"),
    "deep": _text("[" * 200_000),
    "deep objects": _text('{"surgery_split": 1, "whole": ' + '{"a":' * 200_000),
    "many digits": _replaced('"macs": ', '"macs": 1' + "0" * 5000),
    "not a number": _replaced('"predicted_s": ', '"predicted_s": NaN, "first": "x", "predicted": '),
    "infinity": _replaced('"predicted_s": ', '"predicted_s": Infinity, "first": "x", "predicted": '),
    "a name twice": _replaced('"kind": ', '"kind": "program", "kind": '),
    "another version": _top(surgery_split=2),
    "version in words": _top(surgery_split="1"),
    "unknown field": _top(code="import os"),
    "unknown field of a stage": _stage(0, code="import os"),
    "unknown kind": _top(kind="pickle"),
    "kind of other files": _top(kind="onnx"),
    "no stages": _top(stages=[]),
    "stages by name": _top(stages={"0": {}}),
    "stage is a text": _top(stages=["stage0.pt2"]),
    "stages without end": _edited(lambda said: said.update(stages=said["stages"] * 5000)),
    "a circle": _edited(_circle),
    "value given twice": _edited(_given_twice),
    "input of no stage": _stage(1, inputs=["nowhere"]),
    "input twice": _edited(lambda said: said.update(inputs=said["inputs"] * 2)),
    "one input too many": _edited(lambda said: said["stages"][1]["inputs"].append(said["inputs"][0])),
    "one output too many": _edited(lambda said: said["stages"][1]["outputs"].append("more")),
    "output of no stage": _top(outputs=["nowhere"]),
    "names are numbers": _stage(0, inputs=[1, 2]),
    "names are a text": _stage(0, inputs="x"),
    "an empty name": _stage(0, outputs=[""]),
    "negative bytes": _stage(0, bytes_out=-1),
    "huge bytes": _stage(0, bytes_out=2**63),
    "bytes in parts": _stage(0, bytes_out=0.5),
    "bytes are true": _stage(0, bytes_out=True),
    "bytes in words": _stage(0, tensor_bytes="1 GB"),
    "negative seconds": _stage(0, predicted_s=-1.0),
    "huge seconds": _stage(0, predicted_s=1e300),
    "no seconds": _stage(0, predicted_s=None),
    "seconds are a list": _stage(0, measured_s=[1.0]),
    "no link": _goal(link=0),
    "link in words": _goal(link="1GB/s"),
    "unknown balance": _goal(balance="luck"),
    "balance is a list": _goal(balance=["time"]),
    "negative bound": _goal(bound=-1),
    "relay in words": _goal(relay="no"),
    "objective is a list": _top(objective=[1]),
    "crossing to no stage": _edited(lambda said: said["crossings"][0].update(targets=[7])),
    "crossing to before": _edited(lambda said: said["crossings"][0].update(targets=[-1])),
    "crossing from no stage": _edited(lambda said: said["crossings"][0].update(source=2)),
    "layer of no stage": _edited(lambda said: said["layers"][0].update(stage=9)),
    "layer without a name": _edited(lambda said: said["layers"][0].update(name=3)),
    "notes are numbers": _top(notes=[1]),
    "whole is a list": _top(whole=[]),
    "whole is empty": _top(whole={}),
}
