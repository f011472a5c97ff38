"""The bytes of an ONNX model, without copies of its weights: for files, also those that sessions map.

A model that came with weights in other files keeps them in one file beside its own, ``x.onnx.data`` for ``x.onnx``.
Weights that were in the file itself stay there, and new ones go where the model keeps its weights. Any other model is
one file, unless that would be too large for one protobuf message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

import onnx
import onnx_ir as ir

from surgery.errors import InputError
from surgery.kinds.onnx.places import OUTSIDE, all_tensors, is_whole, memory_of, note_place, place_of, tensor_of
from surgery.kinds.onnx.proto import sparse_tensors, write_proto
from surgery.kinds.onnx.tensors import shape_of
from surgery.system.mapped import drop_pages, map_file
from surgery.system.protobuf import header

__all__ = [
    "BESIDE",
    "KEEPS_OUTSIDE",
    "LARGE",
    "SOURCES",
    "Layout",
    "digest",
    "lay_out",
    "lean",
    "move_weights",
    "note_layout",
    "write_apart",
]

BESIDE = ".data"  # after the name of the model's own file
SOURCES = "surgery.sources"  # in the notes of a graph: the files that hold its model, its own first
KEEPS_OUTSIDE = "surgery.outside"  # in the notes of a graph whose model came with weights in other files
_NOWHERE = "nowhere"  # the location of weights that are left out
LARGE = 1024  # bytes of a weight that is worth a place outside
_MANY = 2**20  # bytes of a weight whose pages are worth letting go
_MOST_BYTES = 2**31 - 2**24  # of one protobuf message
_ALIGNED = 64  # bytes; so that the numbers can be used where they are mapped
_GRAPH, _INITIALIZER, _RAW = 7, 5, 9  # numbers of fields: of a model, of a graph, of a tensor

Piece: TypeAlias = bytes | ir.TensorProtocol


@dataclass(frozen=True)
class Layout:
    """The pieces of a model's own file and of the one beside it, in order; tensors stand for their bytes.

    ``places`` are where the tensors beside it start, by their number among all tensors of the model.
    """

    own: Sequence[Piece]
    beside: Sequence[Piece] = ()
    places: Mapping[int, int] = field(default_factory=dict)

    def write(self, file: IO[bytes]) -> None:
        """Write the model's own file."""
        _write(self.own, file)

    def write_beside(self, file: IO[bytes]) -> None:
        """Write the file beside it."""
        _write(self.beside, file)


def _write(pieces: Sequence[Piece], file: IO[bytes]) -> None:
    for raw in _raw(pieces):
        file.write(raw)
        if len(raw) >= _MANY:
            drop_pages()  # of what was just read


def _raw(pieces: Sequence[Piece]) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        yield piece if isinstance(piece, bytes) else memory_of(piece)


def note_layout(model: ir.Model) -> None:
    """Note in a model whether it keeps weights outside of its file, for when none of them are left."""
    if any(place_of(tensor) == OUTSIDE for tensor, _ in all_tensors(model)):
        model.graph.meta[KEEPS_OUTSIDE] = True


def lay_out(model: ir.Model, name: str, *, most: int = _MOST_BYTES, apart: bool = False) -> Layout:
    """Return the bytes of a model for a file of this name; no file gets more than ``most`` bytes of inner weights.

    Where they are ``apart``, all large weights go into the file beside it, wherever they belong.

    Raises:
        InputError: what has to be in the model's own file is too large.
    """
    beside: list[Piece] = []
    places: dict[int, int] = {}
    place = 0
    model = model.clone()
    chosen = _outside(model, 0 if apart else most)
    for number, (tensor, put) in enumerate(all_tensors(model)):
        if number in chosen:
            # Example of place 100: 28 bytes, to 128, for a large weight; none for one of a few float32 numbers.
            gap = -place % (_ALIGNED if tensor.nbytes >= LARGE else max(1, tensor.dtype.bitwidth // 8))
            beside += [bytes(gap), tensor]
            places[number] = place + gap
            put(_reference(tensor, f"{name}{BESIDE}", place + gap))
            place += gap + tensor.nbytes
    return Layout(_own(model, most), beside, places)


def write_apart(model: ir.Model, path: Path) -> Layout:
    """Write a model as a new file with all large weights beside it, which onnxruntime maps; return what was written.

    Earlier files of these names lose them, and stay whole for whoever has them mapped.

    onnxruntime lets go of what it has mapped as soon as it has the weight in a layout of its own. Weights that it reads
    from memory, or from a model's own file, stand there once more for as long as the session lasts, or while it opens.
    """
    layout = lay_out(model, path.name, apart=True)
    beside = path.with_name(path.name + BESIDE)
    for each, write in ((path, layout.write), (beside, layout.write_beside)):
        each.unlink(missing_ok=True)
        if each == path or layout.beside:
            with open(each, "xb") as file:
                write(file)
    return layout


def move_weights(model: ir.Model, path: Path, layout: Layout) -> None:
    """Let the large weights of a model stand in the file that ``write_apart`` wrote, in place of memory.

    What maps the file keeps its bytes, also when its name is gone.
    """
    if not layout.places:
        return
    with open(f"{path}{BESIDE}", "rb") as file:
        mapped = memoryview(map_file(file.fileno(), 0))
    for number, (tensor, put) in enumerate(all_tensors(model)):
        start = layout.places.get(number)
        if start is not None:
            moved, place = tensor_of(tensor, mapped[start : start + tensor.nbytes]), place_of(tensor)
            put(moved if place is None else note_place(moved, place))


def _outside(model: ir.Model, most: int) -> set[int]:
    """Return which tensors go into the file beside a model's own, by their place among all."""
    note_layout(model)
    places = [(number, tensor, place_of(tensor)) for number, (tensor, _) in enumerate(all_tensors(model))]
    stays = {id(tensor) for tensor in sparse_tensors(model)}
    places = [(number, tensor, place) for number, tensor, place in places if id(tensor) not in stays]
    large = {number for number, tensor, _ in places if tensor.nbytes >= LARGE and tensor.dtype != ir.DataType.STRING}
    found = {number for number, _, place in places if place == OUTSIDE}
    if model.graph.meta.get(KEEPS_OUTSIDE):
        found |= {number for number, _, place in places if place is None and number in large}
    inside = sum(tensor.nbytes for number, tensor, _ in places if number not in found)
    return found if inside <= most else found | large


def _reference(tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(shape_of(tensor)),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _own(model: ir.Model, most: int) -> list[Piece]:
    """Return the pieces of a model's own file; the model is a clone, which loses its large initializers."""
    taken = {}
    inside = sum(tensor.nbytes for tensor, _ in all_tensors(model) if not isinstance(tensor, ir.ExternalTensor))
    stays = {id(tensor) for tensor in sparse_tensors(model)}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < LARGE or id(tensor) in stays:
            continue
        if not isinstance(tensor, ir.StringTensor | ir.ExternalTensor):
            taken[name] = tensor
            value.const_value = _reference(tensor, "", 0)
    if inside > most:
        what = f"the weights take {inside / 2**30:.1f} GiB"
        raise InputError(what, allowed="ONNX models below 2 GiB", next_step="take the model from before its export")
    proto = write_proto(model)
    # Fields may come in any order: the graph is the last field of the model, and the initializers the last of the
    # graph. So their bytes can follow what protobuf writes, once the lengths in front of both count them.
    pieces: list[Piece] = []
    size = 0
    for tensor in proto.graph.initializer:
        held = taken.get(tensor.name)
        if held is not None:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
        start = tensor.SerializeToString()
        end: list[Piece] = [] if held is None else [header(_RAW, held.nbytes), held]
        length = len(start) + (0 if held is None else len(header(_RAW, held.nbytes)) + held.nbytes)
        pieces += [header(_INITIALIZER, length) + start, *end]
        size += len(header(_INITIALIZER, length)) + length
    proto.graph.ClearField("initializer")
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    return [proto.SerializeToString() + header(_GRAPH, len(graph) + size) + graph, *pieces]


def digest(model: ir.Model) -> str:
    """Return a text that is the same for equal models."""
    found = hashlib.sha256()
    layout = lay_out(model, "")
    for raw in _raw([*layout.own, *layout.beside]):
        found.update(raw)
    return found.hexdigest()


def lean(model: ir.Model) -> onnx.ModelProto:
    """Return a message without the large weights of a graph."""
    model = model.clone()
    for tensor, put in all_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            put(ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name))
    for value in model.graph.initializers.values():
        held = value.const_value
        if held is not None and held.nbytes >= LARGE and is_whole(held.dtype):
            value.const_value = _reference(held, _NOWHERE, 0)
    return ir.to_proto(model)
