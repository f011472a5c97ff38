"""Sessions of onnxruntime on the CPU with a stated number of threads, and what they are fed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor
from torch.export import ExportedProgram

from surgery.errors import InputError
from surgery.kinds.inputs import Inputs, flatten_inputs
from surgery.kinds.onnx.layout import write_apart
from surgery.kinds.onnx.tensors import DTYPES
from surgery.system.machine import physical_cores
from surgery.system.mapped import drop_pages
from surgery.system.scratch import scratch_folder
from surgery.text import first_line

__all__ = [
    "TOLERANCES",
    "check_threads",
    "feed",
    "fitting_inputs",
    "open_model",
    "open_session",
    "run_session",
]

# How far PyTorch and onnxruntime may be apart: relative Frobenius error of a whole output, by its coarsest float type.
TOLERANCES = {
    torch.float64: 1e-6,  # not 1e-12: exporters keep some constants in float32
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


_DTYPES = {f"tensor({known.name.lower()})": dtype for known, dtype in DTYPES.items()}
_GIVE = "give example_inputs (on the command line --input-shape)"
_NAME = "model.onnx"
_MOST_THREADS = 256  # or as many as there are cores


def run_session(session: ort.InferenceSession, names: list[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
    """Return what a session gives for its inputs.

    Raises:
        InputError: onnxruntime cannot run the model on them.
    """
    try:
        found: list[Any] = session.run(names, feeds)
    except Exception as error:  # onnxruntime's exceptions share no other base
        what = f"onnxruntime cannot run the model on these inputs: {first_line(error)}"
        raise InputError(what, next_step="try other sizes: it may take one batch size alone") from error
    return found


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads that is out of bounds."""
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise InputError(f"threads={threads}", allowed=f"1 to {most}")


def open_model(model: ir.Model, *, threads: int | None = None, small: bool = False) -> ort.InferenceSession:
    """Return a session of a model, as ``open_session``; it maps the weights, which take no memory of its own.

    Raises:
        FileError: there is no room for a file of them.
    """
    with scratch_folder() as folder:
        write_apart(model, folder / _NAME)
        drop_pages()  # which were read for that
        return open_session(folder / _NAME, threads=threads, small=small, name="the model")


def open_session(
    model: bytes | str | Path,
    *,
    threads: int | None = None,
    spin: bool = False,
    small: bool = False,
    name: str = "",
    configure: Callable[[ort.SessionOptions], None] = lambda _: None,
) -> ort.InferenceSession:
    """Return a session on the CPU, all graph optimisations on, with a stated number of threads.

    ``spin`` lets its threads spin between runs, which disturbs other sessions. A ``small`` one does without the copies
    of weights in other layouts, and may be slower. Errors call it by ``name``, or else by its path. ``configure`` sets
    further options.

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
    configure(options)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no other base
        name = name or ("the model" if isinstance(model, bytes) else str(model))
        said = first_line(error) if isinstance(model, bytes) else first_line(error).replace(str(model), name)
        raise InputError(f"onnxruntime cannot load {name}: {said}", next_step=_remedy(str(error))) from error


def _remedy(said: str) -> str | None:
    """Return what to do about an error of onnxruntime as it loads a model."""
    if "NOT_IMPLEMENTED" in said:  # it has no kernel for a type
        return "convert it to float32"
    if "is not a registered function/op" in said:
        return "no library of operators is loaded: give a file of the part without them (onnx.utils.extract_model)"
    return None


def feed(
    session: ort.InferenceSession, inputs: Inputs, program: ExportedProgram | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Return what the session takes: inputs by name by their names, the others in order.

    ``program`` is the one that was exported to it, if there is one: it knows the place of nested inputs and names.

    Raises:
        InputError: another number of inputs, another shape or type; the message shows both sides.
    """
    # of a number and of a tensor of any shape, sessions say the same
    declared = {d.name: (_DTYPES.get(d.type), tuple(d.shape) or None) for d in session.get_inputs()}
    tensors = fitting_inputs(declared, inputs, program)
    return {name: _array_of(tensor, name) for name, tensor in tensors.items()}


def fitting_inputs(
    declared: Mapping[str, tuple[torch.dtype | None, Sequence[Any] | None]],
    inputs: Inputs,
    program: ExportedProgram | None = None,
) -> dict[str, Tensor]:
    """Return inputs by the names of those that a model declares, each with its dtype and shape, None where not known.

    Raises:
        InputError: another number of inputs, another shape or type; the message shows both sides.
    """
    tensors = flatten_inputs(inputs if program else _by_name(inputs, list(declared)), program)
    fits = len(tensors) == len(declared) and all(map(_fits, tensors, declared.values()))
    if not fits:
        wanted = ", ".join(f"{name} {_words(dtype)} {_show(shape)}" for name, (dtype, shape) in declared.items())
        given = ", ".join(f"{_words(t.dtype)} {_show(t.shape)}" for t in tensors)
        what = f"the inputs do not fit the model: given {given or 'none'}"
        raise InputError(what, allowed=wanted or "no inputs", next_step=_GIVE)
    return dict(zip(declared, tensors, strict=True))


def _array_of(tensor: Tensor, name: str) -> npt.NDArray[Any]:
    """Return an input as an array; raises InputError for bfloat16, which NumPy does not have."""
    if tensor.dtype == torch.bfloat16:
        what = f"the input {name} is bfloat16, which onnxruntime does not take from Python"
        raise InputError(what, next_step="give the model a float32 input with a Cast after it")
    found: npt.NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return found


def _by_name(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """Bring inputs by name into the session's order."""
    args, kwargs = inputs
    if len(names) == len(kwargs) == 1:
        return args, kwargs  # nothing can be mistaken
    rest = names[len(args) :]
    if kwargs and set(kwargs) != set(rest):
        raise InputError(f"inputs named {', '.join(kwargs)}", allowed=", ".join(rest) or "none by name")
    return args, {name: kwargs[name] for name in rest if name in kwargs}


def _fits(tensor: Tensor, declared: tuple[torch.dtype | None, Sequence[Any] | None]) -> bool:
    dtype, shape = declared
    if dtype != tensor.dtype or (shape is not None and len(shape) != tensor.dim()):
        return False
    pairs = () if shape is None else zip(shape, tensor.shape, strict=True)
    return all(not isinstance(size, int) or size == got for size, got in pairs)


def _words(dtype: torch.dtype | None) -> str:
    return "of no type that torch has" if dtype is None else str(dtype).removeprefix("torch.")


def _show(shape: Sequence[Any] | None) -> str:
    return "of any shape" if shape is None else "x".join(map(str, shape)) or "scalar"
