"""Check the files that an ONNX file refers to, before onnxruntime opens it.

An ONNX file may keep its weights in other files. These must be regular files in the folder of the ONNX file. Otherwise
onnxruntime could read any file of this user into a model, wait for a pipe, or take an address in its own memory for a
place in a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

from surgery.errors import FileError, UnsafeFileError
from surgery.system.opening import check_regular, read_regular, shown_name, shown_path

__all__ = ["check_onnx", "external_bytes", "read_onnx"]

_LARGEST = 2**31  # bytes of any protobuf message


def check_onnx(path: Path) -> None:
    """Raise FileError if the file is not an ONNX model, and UnsafeFileError if its weights lie outside its folder."""
    read_onnx(path, read_regular(path, most=_LARGEST))


def read_onnx(path: Path, raw: bytes) -> onnx.ModelProto:
    """Return the model in the bytes of a file at a path.

    Raises:
        FileError: they are not an ONNX model, or weights do not fit into the files that should hold them.
        UnsafeFileError: weights lie outside of the folder of the file.
    """
    try:
        model = onnx.ModelProto.FromString(raw)
    except Exception as error:  # protobuf's own errors differ from version to version
        raise FileError(f"{shown_path(path)}: is not an ONNX model, or is cut off", next_step="get it again") from error
    if not model.graph.node and not model.graph.output:
        raise FileError(f"{shown_path(path)}: is not an ONNX model: it has no graph", next_step="get it again")
    for location in dict.fromkeys(_locations(model)):
        _check_location(path, location)
    return model


def external_bytes(model: onnx.ModelProto) -> int:
    """Return how many bytes the weights outside of a model's own file take, by the sizes that the model says."""
    total = 0
    for tensor in _external(model):
        said = {entry.key: entry.value for entry in tensor.external_data}.get("length", "")
        total += int(said) if said.isascii() and said.isdigit() and len(said) < 20 else 0
    return total


def _locations(model: onnx.ModelProto) -> Iterator[str]:
    for tensor in _external(model):
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _external(model: Message) -> Iterator[onnx.TensorProto]:
    """Yield all tensors with external data in any part of a model."""
    pending = [model]
    while pending:
        part = pending.pop()
        if isinstance(part, onnx.TensorProto):
            if part.external_data:
                yield part
            continue
        for _, value in part.ListFields():
            if isinstance(value, Message):
                pending.append(value)
            elif not isinstance(value, str | bytes | int | float):
                pending.extend(each for each in value if isinstance(each, Message))


def _check_location(path: Path, location: str) -> None:
    weights, folder = path.parent / location, os.path.realpath(path.parent)
    plain = location.isprintable() and not os.path.isabs(location) and ".." not in Path(location).parts
    if not plain or not Path(os.path.realpath(weights)).is_relative_to(folder):
        what = f"{shown_path(path)}: has weights in {shown_name(location)}, outside its folder"
        raise UnsafeFileError(what, allowed="regular files in its folder, no links out", next_step="copy them there")
    check_regular(weights)
