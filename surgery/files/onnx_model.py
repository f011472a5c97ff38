"""Load an ONNX model from an open file; its weights may lie in other files of the same folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from surgery.errors import FileError
from surgery.files.guard.onnx import OnnxFile, read_onnx
from surgery.files.memory import check_room, file_need
from surgery.kinds.onnx.graph import read_record
from surgery.kinds.onnx.layout import SOURCES, lean
from surgery.kinds.onnx.places import INSIDE, OUTSIDE, all_tensors, note_place, tensor_of
from surgery.kinds.onnx.proto import read_proto
from surgery.system.opening import size_of

__all__ = ["read_model"]


def read_model(path: Path, file: BinaryIO, *, memory: int | None) -> ir.Model:
    """Return the model in the file at a path, which is open; weights in other files are mapped into memory.

    Raises:
        FileError: the file is not an ONNX model, its record is damaged, or it needs more than ``memory`` bytes.
        UnsafeFileError: weights lie outside of the folder of the file.
    """
    found = read_onnx(path, file)
    outside = sum(raw.nbytes for location, raw in found.held.items() if location not in found.own)
    check_room(file_need(size_of(file) + outside), memory)
    found.fill_sparse()
    model = read_proto(found.proto)
    for tensor, put in all_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            put(_held(tensor, found))
    try:
        lean(model)  # copies it and writes it, as each command does at its end
    except Exception as error:  # of onnx_ir, for a graph that cannot be right
        raise FileError("has a graph that cannot be copied", next_step="export the model again") from error
    others = [path.parent / location for location in found.held if location not in found.own]
    model.graph.meta[SOURCES] = tuple(map(os.path.realpath, [path, *others]))
    read_record(model)  # a damaged one is told before any work
    return model


def _held(tensor: ir.ExternalTensor, file: OnnxFile) -> ir.TensorProtocol:
    location = str(tensor.location)
    raw = file.bytes_at(location, tensor.offset or 0, tensor.nbytes)
    return note_place(tensor_of(tensor, raw), INSIDE if location in file.own else OUTSIDE)
