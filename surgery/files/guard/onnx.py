"""Read an ONNX file and what belongs to it, and check both, before anything else opens them.

The numbers of large weights are read once, into memory or into a file that is mapped; the rest is a small message. An
ONNX file may keep its weights in other files. These must be regular files in the folder of the ONNX file. Otherwise
onnxruntime could read any file of this user into a model, wait for a pipe, or take an address in its own memory for a
place in a file.
What is opened here is what is used: nothing is opened a second time by its name.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import Message  # type: ignore[import-untyped]

from surgery.errors import FileError, UnsafeFileError
from surgery.files.guard.onnx_graph import check_graphs
from surgery.files.guard.onnx_nodes import check_nodes
from surgery.system.mapped import map_file
from surgery.system.opening import open_inside, open_regular, shown_name, size_of
from surgery.system.protobuf import TAKEN, Array, Fields, Hollow, in_memory
from surgery.system.spill import Spill

__all__ = ["OnnxFile", "onnx_size", "read_onnx", "refer"]

_AGAIN = "export the model again"
_BOTH = "get both files again"
_MOST_AXES = 64  # of an array
_LARGE = 2**22  # bytes of a file whose numbers are worth a file of their own
_ALIGNED = 64  # bytes, far fewer than those of any numbers that are taken out of a file
_TENSOR: Fields = {9: TAKEN}
_ATTRIBUTE: dict[int, Any] = {5: _TENSOR, 10: _TENSOR}
_NODE: Fields = {5: _ATTRIBUTE}
_GRAPH: Fields = {1: _NODE, 5: _TENSOR}
_ATTRIBUTE |= {6: _GRAPH, 11: _GRAPH}
_MODEL: Fields = {7: _GRAPH, 25: {7: _NODE}}
_SPREAD = {  # the field of numbers that are not raw, by their type; narrow ones lie in int32_data
    **dict.fromkeys((ir.DataType.FLOAT, ir.DataType.COMPLEX64), "float_data"),
    **dict.fromkeys((ir.DataType.DOUBLE, ir.DataType.COMPLEX128), "double_data"),
    **dict.fromkeys((ir.DataType.UINT32, ir.DataType.UINT64), "uint64_data"),
    ir.DataType.INT64: "int64_data",
    ir.DataType.STRING: "string_data",
}
_FIELDS = (*dict.fromkeys(_SPREAD.values()), "int32_data")


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file: a message in which large numbers are elsewhere, and that elsewhere.

    A tensor with external data names a location in ``held``, the bytes that were read or mapped; those that were in the
    file itself are at locations that only this object has (``own``).
    """

    proto: onnx.ModelProto
    held: Mapping[str, memoryview]
    own: frozenset[str]

    def fill_sparse(self) -> None:
        """Put the numbers of sparse initializers into the message.

        Raises:
            FileError: there is another sparse tensor.
        """
        own = list(self.proto.graph.sparse_initializer)
        if sum(isinstance(part, onnx.SparseTensorProto) for part in _parts(self.proto)) != len(own):
            raise FileError("has a sparse weight in a node", next_step="export the model again with dense ones")
        for tensor in (each for sparse in own for each in (sparse.values, sparse.indices) if _is_external(each)):
            raw = bytes(self.numbers(tensor))
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = raw

    def numbers(self, tensor: onnx.TensorProto) -> memoryview:
        """Return the bytes of a tensor whose numbers are not in the message."""
        said = _said(tensor)
        return self.bytes_at(said["location"], int(said.get("offset", "0")), _size(tensor))

    def bytes_at(self, location: str, offset: int, size: int) -> memoryview:
        """Return bytes at a location."""
        return self.held[location][offset : offset + size]


def read_onnx(path: Path, file: BinaryIO) -> OnnxFile:
    """Return the ONNX file that is open, at its start; errors do not name it."""
    secret = secrets.token_hex(16)  # so that no text in the file can be one of our locations
    try:
        hollow = Hollow(
            file,
            size_of(file),
            _MODEL,
            lambda number: refer(onnx.TensorProto(), f"{secret}{number}").SerializeToString(),
            _room(size_of(file)),
        )
        model = onnx.ModelProto.FromString(hollow.raw)
        tensors = list(_tensors(model))
    except UnicodeError as error:
        raise FileError("has a name that is no text", next_step=_AGAIN) from error
    except Exception as error:  # protobuf's own errors differ from version to version
        raise FileError("is not an ONNX model, or is cut off", next_step="get it again") from error
    if not model.graph.node and not model.graph.output:
        raise FileError("is not an ONNX model: it has no graph", next_step="get it again")
    if model.ir_version > onnx.IR_VERSION:
        what = f"has version {model.ir_version} of the ONNX format, which is newer than this onnx knows"
        raise FileError(what, allowed=f"up to {onnx.IR_VERSION}", next_step="install a newer onnx, or export it again")
    own = {f"{secret}{number}": array.data for number, array in enumerate(hollow.taken)}
    outside = [tensor for tensor in tensors if _is_external(tensor)]
    for tensor in tensors:
        _check_form(tensor)
    locations = dict.fromkeys(_said(tensor).get("location", "") for tensor in outside)
    held = own | {location: _map(path, location) for location in locations if location not in own}
    for tensor in outside:
        _check_place(tensor, held)
    check_graphs(model)
    check_nodes(model)
    return OnnxFile(model, held, frozenset(own))


def _room(total: int) -> Callable[[int], Array]:
    """Return what gives memory for the numbers of a file of ``total`` bytes.

    That of a large file is mapped from a file without a name, so that it need not stay in memory.
    """
    whole, end = Spill().room(total + total // _ALIGNED) if total >= _LARGE else None, 0

    def room(size: int) -> Array:
        nonlocal end
        start, end = end, end + -(-size // _ALIGNED) * _ALIGNED
        return in_memory(size) if whole is None or end > len(whole) else whole[start : start + size]

    return room


def onnx_size(path: Path) -> int:
    """Return how many bytes the files of an ONNX model take, which was read before; other files count alone."""
    size = path.stat().st_size
    with contextlib.suppress(Exception), open_regular(path) as file:
        proto = onnx.ModelProto.FromString(Hollow(file, size_of(file), _MODEL).raw)
        locations = {_said(tensor)["location"] for tensor in _tensors(proto) if tensor.external_data}
        return size + sum((path.parent / location).stat().st_size for location in locations)
    return size


def refer(tensor: onnx.TensorProto, location: str) -> onnx.TensorProto:
    """Let a tensor say that its numbers are at a location; return it."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def _check_form(tensor: onnx.TensorProto) -> None:
    """Raise FileError if a tensor has other numbers than its shape and type say, or says in two ways where they are."""
    name = shown_name(tensor.name)
    filled = [field for field in _FIELDS if len(getattr(tensor, field))]
    if len(tensor.dims) > _MOST_AXES or any(dim < 0 for dim in tensor.dims):
        raise FileError(f"has the weight {name} of an impossible shape", next_step=_AGAIN)
    try:
        kind = ir.DataType(tensor.data_type)
        is_text = kind == ir.DataType.STRING  # of no size
        size = 0 if is_text else _size(tensor)
    except (TypeError, ValueError) as error:
        raise FileError(f"has the weight {name} of an unknown type", next_step=_AGAIN) from error
    keys = [entry.key for entry in tensor.external_data]
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if len(filled) + tensor.HasField("raw_data") + _is_external(tensor) > 1 or len(set(keys)) < len(keys):
        raise FileError(f"says in two ways where the numbers of {name} are", next_step=_AGAIN)
    if (keys and not external) or tensor.HasField("segment") or (external and is_text):
        raise FileError(f"keeps {name} where it cannot be", next_step=_AGAIN)
    if external:
        return
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            what = f"has {len(tensor.raw_data)} bytes for {name}, whose shape says {size}"
            raise FileError(what, next_step=_AGAIN)
        return
    count, field = math.prod(tensor.dims), _SPREAD.get(kind, "int32_data")
    # A complex number is two entries. Numbers narrower than a byte are packed: three of int4 are two bytes, and may be
    # as many entries, or three.
    wanted = {2 * count if "COMPLEX" in kind.name else count, size if size and kind.bitwidth < 8 else count}
    if filled not in ([], [field]):
        raise FileError(f"keeps the numbers of {name} as those of another type", next_step=_AGAIN)
    if len(getattr(tensor, field)) not in wanted:
        raise FileError(
            f"has {len(getattr(tensor, field))} numbers for {name}, whose shape says {count}", next_step=_AGAIN
        )


def _size(tensor: onnx.TensorProto) -> int:
    """Return how many bytes a tensor takes by its shape and its type."""
    return -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)


def _said(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_place(tensor: onnx.TensorProto, held: Mapping[str, memoryview]) -> None:
    """Raise FileError if the numbers of a tensor would not lie inside of the file that should hold them."""
    said, size, name = _said(tensor), _size(tensor), shown_name(tensor.name)
    there = held[said.get("location", "")].nbytes
    texts = [said.get("offset", "0"), said.get("length", str(size))]
    # Numbers of 18 digits are below 2^63, so that no sum of two wraps around wherever it is computed.
    if not all(re.fullmatch(r"\d{1,18}", text, re.ASCII) for text in texts):
        raise FileError(f"says no possible place for the numbers of {name}", next_step=_BOTH)
    offset, length = map(int, texts)
    if offset + max(length, size) > there or length < size:
        what = f"says that {size} bytes of {name} lie at {offset} of a file of {there} bytes"
        raise FileError(what, next_step=_BOTH)


def _tensors(model: Message) -> Iterator[onnx.TensorProto]:
    """Yield all tensors in any part of a model; as ``_parts``."""
    return (part for part in _parts(model) if isinstance(part, onnx.TensorProto))


def _parts(model: Message) -> Iterator[Message]:
    """Yield all messages in a model.

    Raises:
        UnicodeError: a text in them is none.
    """
    pending = [model]
    while pending:
        part = pending.pop()
        yield part
        for field, value in part.ListFields():
            if field.type == field.TYPE_MESSAGE:
                pending.extend([value] if isinstance(value, Message) else value)
            elif field.type == field.TYPE_STRING and not _are_texts(value):
                raise UnicodeError


def _are_texts(value: Any) -> bool:
    """Whether the value of a field, or each of its values, is a text; protobuf gives bytes that are none as bytes."""
    return isinstance(value, str) or (not isinstance(value, bytes) and all(isinstance(text, str) for text in value))


def _map(path: Path, location: str) -> memoryview:
    """Return the bytes of another file of the folder, mapped into memory."""
    if not location.isprintable():
        raise UnsafeFileError(f"has weights in {shown_name(location)}", next_step=_BOTH)
    try:
        with open_inside(path.parent, location) as file:
            return memoryview(map_file(file.fileno(), 0) if size_of(file) else b"")
    except UnsafeFileError as error:
        what = f"has weights in {shown_name(location)}, {error.what}"
        raise UnsafeFileError(what, allowed=error.allowed, next_step=error.next_step) from error
