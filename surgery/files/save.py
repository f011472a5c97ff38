"""Save a model with its record: a program as a .pt2 archive, a module as safetensors, an ONNX model as ONNX.

``model_size`` says how large the files of a model are.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import onnx_ir as ir
import safetensors.torch
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from surgery.errors import FileError, InputError, only_own_errors
from surgery.files.guard.archive import RECORD
from surgery.files.structure import record_of
from surgery.kinds.onnx.layout import BESIDE, SOURCES, lay_out
from surgery.kinds.registry import is_model, kind_of
from surgery.system.opening import check_path, shown_path
from surgery.system.writing import Writer, write_together
from surgery.text import first_line

__all__ = ["RECORD_KEY", "check_ending", "model_files", "model_size", "save", "state_dict_writer"]

RECORD_KEY = "surgery"  # in the metadata of a safetensors file
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)

_ENDINGS = {".onnx": "an ONNX file", ".pt2": "a .pt2 archive", ".safetensors": "safetensors"}
_SAVABLE = "change the model so that torch.export.save takes it, or save its state_dict()"


def _extra_files(program: ExportedProgram) -> dict[str, str] | None:
    record = program.graph_module.meta.get("surgery")
    if not isinstance(record, dict):
        return None
    try:
        return {RECORD: json.dumps(record, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise InputError(f"the record in graph_module.meta['surgery'] is not JSON: {error}") from error


@only_own_errors
def save(
    model: ExportedProgram | nn.Module | torch.fx.GraphModule | ir.Model,
    path: str | os.PathLike[str],
    *,
    force: bool = True,
) -> None:
    """Save an ExportedProgram as a .pt2 archive, an ONNX model as ONNX, or a module as safetensors, with its record.

    The record of a program is ``program.graph_module.meta["surgery"]``, a dict of JSON values. The record of a module
    says which layers are factored and how: ``surgery.load(path, model=factory)`` gives a fresh module the same
    structure and the saved weights. An ONNX model that came with weights in other files, or is too large for one, gets
    a second file, ``path`` with ``.data`` after it; both appear together. Nothing is pickled. Missing folders are not
    made. ``force`` replaces an existing file.

    Raises FileError if the file cannot be written, or its name has the ending of another kind of file, and InputError
    if the model cannot be saved; an existing file then stays as it was.

    >>> save(program, "model.pt2")  # doctest: +SKIP
    """
    check_path(path)
    write_together(model_files(model, path), force=force)


def model_files(
    model: ExportedProgram | nn.Module | ir.Model, path: str | os.PathLike[str]
) -> list[tuple[Path, Writer]]:
    """Return the files that hold a model at a path, the path's own last, each with what writes it as ``save`` does.

    Errors name ``path``. Raises InputError as ``save``.
    """
    if not is_model(model):
        raise InputError(
            f"cannot save a {type(model).__name__}", allowed="ExportedProgram, onnx_ir.Model, nn.Module, GraphModule"
        )
    check_ending(model, path)
    kind = kind_of(model)
    target = Path(path)
    if (onnx := kind.as_onnx(model)) is not None:
        layout, other = lay_out(onnx, target.name), target.with_name(target.name + BESIDE)
        own, *others = onnx.graph.meta.get(SOURCES, ("",))
        if layout.beside and os.path.realpath(other) in others and os.path.realpath(target) != own:
            what = f"{shown_path(other)}: holds the weights of {shown_path(own)}"
            raise FileError(what, next_step="choose another name for the output")
        return [*([(other, layout.write_beside)] if layout.beside else []), (target, layout.write)]
    if (program := kind.program(model)) is not None:
        return [(target, _program_writer(program, os.fspath(path)))]
    return [(target, _module_writer(kind.runnable(model), os.fspath(path)))]


def check_ending(model: Any, path: str | os.PathLike[str]) -> None:
    """Raise FileError if a file's name ends as those of another kind of file than the one that would be written."""
    kind = kind_of(model)
    own = ".onnx" if kind.is_onnx else ".safetensors" if kind.program(model) is None else ".pt2"
    if Path(path).suffix in {*_ENDINGS} - {own}:
        what = f"{shown_path(path)}: the model would be written as {_ENDINGS[own]}"
        others = "surgery export writes ONNX files" if own == ".pt2" else None
        raise FileError(what, allowed=f"names that end in {own}", next_step=others)


def _program_writer(model: ExportedProgram, name: str) -> Writer:
    def write(file: IO[bytes]) -> None:
        guarded = _Guarded(file)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of its own deprecations while it pickles
                torch.export.save(model, guarded, extra_files=_extra_files(model))  # type: ignore[arg-type]
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)[:160]}"
            what = f"{name}: torch cannot save this {type(model).__name__}: {reason}"
            raise (guarded.error or InputError(what, next_step=_SAVABLE)) from error
        if guarded.error is not None:
            raise guarded.error

    return write


class _Guarded(io.RawIOBase):
    """A file that keeps its first error instead of raising it, and ignores all writes after it.

    torch's writer of archives is C++: a Python error that passes through it ends the process.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._place = 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            # ``_place`` follows where torch believes to write, also after an error.
            if self.error is None:
                if self._file.tell() != self._place:
                    self._file.seek(self._place)
                self._file.write(data)
        except BaseException as error:
            self.error = error
        self._place += size
        return size

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset if whence == 0 else self._place + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _module_writer(model: nn.Module, name: str) -> Writer:
    if isinstance(model, torch.fx.GraphModule) and model.meta.get("surgery"):
        what = f"{name}: a graph with factored functions cannot be saved as a state dict"
        raise InputError(what, next_step="decompose the module it was made from, or its exported program")
    lazy = [key for key, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        what = f"{name}: {lazy[0]} of the state dict is a lazy weight without values"
        raise InputError(what, next_step="run the model once")
    state = model.state_dict()
    others = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    plain = [key for key, value in state.items() if key not in others and type(value) not in _PLAIN]
    if others or plain:
        first = (others + plain)[0]
        what = f"{name}: {first} of the state dict is a {type(state[first]).__name__}"
        raise InputError(what, allowed="tensors", next_step="save it before it is quantized, or by its own tool")
    return state_dict_writer(state, metadata={RECORD_KEY: json.dumps(record_of(model).to_json())})


def state_dict_writer(state: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> Writer:
    """Return a function that writes a state dict as safetensors, with tied weights repeated under each name."""

    def write(file: IO[bytes]) -> None:
        own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
        file.write(safetensors.torch.save(own, metadata))

    return write


def model_size(path: Path) -> int:
    """Return how many bytes the files of a saved model take: of an ONNX model also those beside its own."""
    from surgery.files.guard.onnx import onnx_size

    return onnx_size(path) if path.suffix == ".onnx" else path.stat().st_size
