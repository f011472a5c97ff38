"""Load an ONNX model from the bytes of its file; its weights may lie in other files of the same folder."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from surgery.files.guard.onnx import external_bytes, read_onnx
from surgery.files.memory import check_room, file_need
from surgery.kinds.onnx.graph import read_record
from surgery.kinds.onnx.proto import read_proto

__all__ = ["read_model"]


def read_model(path: Path, raw: bytes, *, memory: int | None) -> ir.Model:
    """Return the model in the bytes of the file at a path; weights in other files are read when they are used.

    Raises:
        FileError: the bytes are not an ONNX model, its record is damaged, or it needs more than ``memory`` bytes.
        UnsafeFileError: weights lie outside of the folder of the file.
    """
    proto = read_onnx(path, raw)
    check_room(file_need(len(raw) + external_bytes(proto)), memory)
    model = read_proto(proto)
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, os.path.realpath(path.parent))
    read_record(model)  # a damaged one is told before any work
    return model
