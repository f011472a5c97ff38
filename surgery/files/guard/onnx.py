"""Check the files that an ONNX file refers to, before onnxruntime opens it.

An ONNX file may keep its weights in other files. These must be regular files in the folder of the ONNX file. Otherwise
onnxruntime could read any file of this user into a model, wait for a pipe, or take an address in its own memory for a
place in a file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import Message  # type: ignore[import-untyped]

from surgery.errors import FileError, UnsafeFileError
from surgery.system.opening import check_regular, read_regular, shown_name, shown_path

__all__ = ["check_onnx", "external_bytes", "read_onnx"]

_LARGEST = 2**31  # bytes of any protobuf message
_AGAIN = "export the model again"


def check_onnx(path: Path) -> None:
    """Raise FileError if the file is not an ONNX model, and UnsafeFileError if its weights lie outside its folder."""
    try:
        read_onnx(path, read_regular(path, most=_LARGEST))
    except FileError as error:
        named = error.what if error.what.startswith(shown_path(path)) else f"{shown_path(path)}: {error.what}"
        raise type(error)(named, allowed=error.allowed, next_step=error.next_step) from error.__cause__


def read_onnx(path: Path, raw: bytes) -> onnx.ModelProto:
    """Return the model in the bytes of a file at a path.

    Raises:
        FileError: they are not an ONNX model, or weights do not fit into the files that should hold them.
        UnsafeFileError: weights lie outside of the folder of the file.
    """
    try:
        model = onnx.ModelProto.FromString(raw)
    except Exception as error:  # protobuf's own errors differ from version to version
        raise FileError("is not an ONNX model, or is cut off", next_step="get it again") from error
    if not model.graph.node and not model.graph.output:
        raise FileError("is not an ONNX model: it has no graph", next_step="get it again")
    outside = list(_external(model))
    for location in dict.fromkeys(_said(tensor).get("location", "") for tensor in outside):
        _check_location(path, location)
    for tensor in outside:
        _check_place(path, tensor)
    for tensor in _all(model, onnx.TensorProto):
        _check_numbers(tensor)
    _check_graph(model.graph, frozenset())
    for function in model.functions:
        _check_nodes(function.node, set(function.input), frozenset())
    return model


def _check_numbers(tensor: onnx.TensorProto) -> None:
    """Raise FileError if a tensor has another number of bytes in the file than its shape says."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.HasField("raw_data"):
        size = _size(tensor)
        if any(dim < 0 for dim in tensor.dims) or (size and len(tensor.raw_data) != size):
            what = f"has {len(tensor.raw_data)} bytes for {shown_name(tensor.name)}, whose shape says {size}"
            raise FileError(what, next_step=_AGAIN)


def _check_graph(graph: onnx.GraphProto, outside: frozenset[str]) -> None:
    """Raise FileError if a node reads a value that nothing before it gives, or a name is given twice.

    ``outside`` are the values of the graphs around this one, which its nodes may read.
    """
    names = [tensor.name for tensor in graph.initializer]
    if not all(names):
        raise FileError("has a weight without a name", next_step=_AGAIN)
    known = {*names, *(value.name for value in graph.input), *(t.values.name for t in graph.sparse_initializer)}
    _check_nodes(graph.node, known, outside)
    for output in graph.output:
        if output.name not in known and output.name not in outside:
            raise FileError(f"gives {shown_name(output.name)}, which nothing computes", next_step=_AGAIN)


def _check_nodes(nodes: Iterable[onnx.NodeProto], known: set[str], outside: frozenset[str]) -> None:
    """Check nodes in order; what they give is added to ``known``."""
    for node in nodes:
        for name in node.input:
            if name and name not in known and name not in outside:
                what = f"has a {shown_name(node.op_type)} that reads {shown_name(name)}, which nothing before it gives"
                raise FileError(what, next_step=_AGAIN)
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _check_graph(inner, outside | known)
        given = [name for name in node.output if name]
        if twice := [name for name in given if name in known]:
            raise FileError(f"computes {shown_name(twice[0])} twice", next_step=_AGAIN)
        known.update(given)


def external_bytes(model: onnx.ModelProto) -> int:
    """Return how many bytes the weights outside of a model's own file take, by the shapes that the model says."""
    return sum(map(_size, _external(model)))


def _size(tensor: onnx.TensorProto) -> int:
    """Return how many bytes a tensor takes by its shape and its type; 0 for a type of another kind."""
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError):
        return 0
    return -(-math.prod(tensor.dims) * bits // 8)


def _said(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_place(path: Path, tensor: onnx.TensorProto) -> None:
    """Raise FileError if the numbers of a tensor would not lie inside of the file that should hold them."""
    said = _said(tensor)
    name = shown_name(tensor.name)
    texts = [said.get("offset", "0"), said.get("length", str(_size(tensor)))]
    if any(size < 0 for size in tensor.dims) or not all(re.fullmatch(r"\d{1,18}", text, re.ASCII) for text in texts):
        raise FileError(f"says no possible place for the numbers of {name}", next_step="get both files again")
    offset, length = map(int, texts)
    held = (path.parent / said.get("location", "")).stat().st_size
    if offset + max(length, _size(tensor)) > held or length < _size(tensor):
        what = f"says that {_size(tensor)} bytes of {name} lie at {offset} of a file of {held} bytes"
        raise FileError(what, next_step="get both files again")


def _external(model: Message) -> Iterator[onnx.TensorProto]:
    """Yield all tensors with external data in any part of a model."""
    return (tensor for tensor in _all(model, onnx.TensorProto) if tensor.external_data)


def _all(model: Message, kind: type[Message]) -> Iterator[Any]:
    """Yield all messages of a kind in any part of a model."""
    pending = [model]
    while pending:
        part = pending.pop()
        if isinstance(part, kind):
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
        what = f"has weights in {shown_name(location)}, outside its folder"
        raise UnsafeFileError(what, allowed="regular files in its folder, no links out", next_step="copy them there")
    check_regular(weights)
