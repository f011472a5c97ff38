"""Sessions of onnxruntime on the CPU, opened with a stated number of threads; they may share the memory of weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from surgery.errors import InputError
from surgery.files.guard.onnx import OnnxFile, refer
from surgery.kinds.onnx.layout import IN_MEMORY, LARGE, lean
from surgery.kinds.onnx.places import is_whole, tensor_of
from surgery.system.machine import physical_cores
from surgery.text import first_line

__all__ = ["TOLERANCES", "check_threads", "open_file", "open_model", "open_session", "run_session"]

Weights = Mapping[str, ir.TensorProtocol]

# How far PyTorch and onnxruntime may be apart: relative Frobenius error of a whole output, by its coarsest float type.
TOLERANCES = {
    torch.float64: 1e-6,  # not 1e-12: exporters keep some constants in float32
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

_MOST_THREADS = 256  # or as many as there are cores


def run_session(session: ort.InferenceSession, names: list[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
    """Return what a session gives for its inputs.

    Raises:
        InputError: onnxruntime cannot run the model on them.
    """
    try:
        found: list[Any] = session.run(names, feeds)
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise InputError(f"onnxruntime cannot run the model: {first_line(error)}") from error
    return found


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads that is out of bounds."""
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise InputError(f"threads={threads}", allowed=f"1 to {most}")


def open_model(model: ir.Model, *, threads: int | None = None, small: bool = False) -> ort.InferenceSession:
    """Return a session of a model, which reads the model's weights where they are; as ``open_session``."""
    proto, weights = lean(model)
    return open_session(_serialise(proto), threads=threads, small=small, weights=weights)


def open_file(file: OnnxFile, *, threads: int | None = None) -> ort.InferenceSession:
    """Return a session of a file that was read and checked, as it is; raises as ``open_session``."""
    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    weights: dict[str, ir.TensorProtocol] = {}
    shared = []
    for tensor in proto.graph.initializer:
        if tensor.external_data and (raw := file.numbers(tensor)).nbytes >= LARGE and is_whole(tensor.data_type):
            weights[tensor.name] = tensor_of(ir.serde.deserialize_tensor(tensor), raw)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            shared.append(tensor)
    for tensor in file.outer_tensors(proto):
        raw_data = bytes(file.numbers(tensor))
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = raw_data
    for tensor in shared:
        refer(tensor, IN_MEMORY)
    return open_session(_serialise(proto), threads=threads, weights=weights)


def _serialise(proto: onnx.ModelProto) -> bytes:
    try:
        raw: bytes = proto.SerializeToString()
    except Exception as error:  # protobuf's own errors differ from version to version
        raise InputError("the model without its large weights takes more than 2 GiB") from error
    return raw


def _shared(array: npt.NDArray[Any], tensor: ir.TensorProtocol) -> ort.OrtValue:
    """Return a value of onnxruntime on the memory of an array, the numbers of a tensor; it does not keep the memory."""
    if array.dtype.type.__module__ == "numpy":
        return ort.OrtValue.ortvalue_from_numpy(array)
    words = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)  # of a type that numpy has not
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(words, int(tensor.dtype))


def open_session(
    model: bytes | str | Path,
    *,
    threads: int | None = None,
    spin: bool = False,
    small: bool = False,
    weights: Weights = MappingProxyType({}),
) -> ort.InferenceSession:
    """Return a session on the CPU, all graph optimisations on, with a stated number of threads.

    ``spin`` lets its threads spin between runs, which disturbs other sessions. A ``small`` one
    does without the copies of weights in other layouts, and may be slower. ``weights`` are the initializers that
    the model says to be in other files; the session reads them where they are in memory.

    Raises:
        InputError: onnxruntime cannot load the model, or the number of threads is out of bounds.
    """
    check_threads(threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1" if small else "0")
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if small else levels.ORT_ENABLE_ALL
    options.log_severity_level = 4  # fatal only: what goes wrong is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "0" if spin else "1")
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in weights.items()}
    source = model if isinstance(model, bytes) else str(model)
    try:
        if weights:
            shared = [_shared(arrays[name], tensor) for name, tensor in weights.items()]
            options.add_external_initializers(list(weights), shared)
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no other base
        name = "the model" if isinstance(model, bytes) else str(model)
        raise InputError(f"onnxruntime cannot load {name}: {first_line(error)}") from error
    session.surgery_weights = arrays  # their memory has to live as long as it
    return session
