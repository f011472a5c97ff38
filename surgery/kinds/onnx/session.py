"""Sessions of onnxruntime on the CPU, opened with a stated number of threads."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime as ort
import torch

from surgery.errors import InputError
from surgery.system.machine import physical_cores
from surgery.text import first_line

__all__ = ["TOLERANCES", "check_threads", "open_session"]

# How far PyTorch and onnxruntime may be apart: relative Frobenius error of a whole output, by its coarsest float type.
TOLERANCES = {
    torch.float64: 1e-6,  # not 1e-12: exporters keep some constants in float32
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


_MOST_THREADS = 256  # or as many as there are cores


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads that is out of bounds."""
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise InputError(f"threads={threads}", allowed=f"1 to {most}")


def open_session(model: bytes | str | Path, *, threads: int | None = None, spin: bool = False) -> ort.InferenceSession:
    """Return a session on the CPU, all graph optimisations on, with a stated number of threads.

    ``spin`` lets its threads spin between runs, which disturbs other sessions.

    Raises:
        InputError: onnxruntime cannot load the model, or the number of threads is out of bounds.
    """
    check_threads(threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # fatal only: what goes wrong is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "0" if spin else "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no other base
        name = "the model" if isinstance(model, bytes) else str(model)
        raise InputError(f"onnxruntime cannot load {name}: {first_line(error)}") from error
