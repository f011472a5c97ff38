"""Sessions of onnxruntime on the CPU: opened with a stated number of threads, and bound to their inputs.

After a run, onnxruntime's workers spin for milliseconds, waiting for the next. The workers of the session that has just
run would then occupy the cores of the one that is being timed. There are two answers:

- Whole models are sessions of their own. Their workers spin within a run, as in production, but stop at its end
  (``session.force_spinning_stop``). The first nodes of a run then wait some tens of microseconds for their workers.
- Single operators are too short for that. The two of a pair are the branches of one model in one session
  (``model.build_choice``). Both use the same workers, which spin between runs (``spin=True``) and are awake when an
  operator starts, as they are inside a network.

Measured on two idle cores with two threads (a 3x3 convolution of 128 channels at 28x28; a linear layer of 512 at 16
rows), in microseconds: each alone 1040 and 44; as a branch 1020 and 42; in a session next to another one whose workers
spin up to 2010 and 41; stopped after each run 1050 and 56; never spinning 1050 and 64, and short chains twice as slow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from surgery.errors import InputError
from surgery.system.machine import physical_cores
from surgery.text import first_line

__all__ = ["bind", "check_threads", "open_session"]

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


def bind(session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[np.generic]]) -> Callable[[], None]:
    """Return a callable that runs the session on these inputs without copying tensors in or out of Python.

    Raises:
        InputError: onnxruntime cannot run the model on these inputs.
    """
    binding = session.io_binding()
    try:
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
            if value.is_tensor():
                binding.bind_ortvalue_output(output.name, value)
    except Exception as error:  # likewise
        raise InputError(f"onnxruntime cannot run the model on these inputs: {first_line(error)}") from error
    return lambda: session.run_with_iobinding(binding)
