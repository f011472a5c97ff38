"""Load a model from a file without running code of the file. The content decides the kind of file, not the suffix.

A file that would run code is refused, unless the caller trusts it. The bytes that are checked are the bytes that are
loaded: the file is read once, and torch reads from memory. Every failure is one SurgeryError that names the file, the
fault and the next step. Every public function that reads a model takes the path of one as well, by ``model_of``.

====================================  =================================================================================
content                               what comes back
====================================  =================================================================================
``torch.export.save`` archive         the ExportedProgram, checked by ``guard/archive.py``
the same of torch 2.7 and earlier     the ExportedProgram, with ``trust`` only: its weights are pickles
state dict: torch.save, safetensors   the module that ``model`` makes, with these weights, in eval mode
pickled module: torch.save            the module, with ``trust`` only
TorchScript                           the ExportedProgram, with ``trust`` and ``example_inputs`` only
ONNX                                  the ``onnx_ir.Model``; its weights may lie in other files of its folder
text, anything else                   FileError
====================================  =================================================================================
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram
from typing_extensions import TypeVar

from surgery.errors import FileError, InputError, SurgeryError, UnsafeFileError, only_own_errors
from surgery.files.guard.archive import check_archive, entry_names, rewrite
from surgery.files.guard.sizes import check_fit, check_program_sizes
from surgery.files.memory import check_room, file_need, program_need
from surgery.files.onnx_model import read_model
from surgery.files.save import RECORD_KEY
from surgery.files.weights import FACTORY, cause, with_weights
from surgery.kinds.registry import Model, is_model, kind_of
from surgery.sites import Record
from surgery.system.opening import check_path, check_regular, open_regular, read_regular, shown_path
from surgery.system.quiet import quiet

__all__ = ["GivenModel", "load", "model_of"]

GivenModel = TypeVar("GivenModel", bound=Model, default=Any)  # Any is what a path gives: its file says which kind
_TRUST = "if you trust its author, pass --trust (in Python trust=True)"
_EXPORT = "export it again with torch.export.export(model, inputs) and torch.export.save"
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before torch 1.6
_START = 16  # bytes that tell an ONNX file, of which the rest is read piece by piece
_SUFFIXES = ".pt2, .pt, .safetensors, .onnx"


@dataclass(frozen=True)
class _Source:
    """A file read into memory, and the arguments of ``load`` for it."""

    path: Path
    raw: bytes
    trust: bool
    model: str | Callable[[], nn.Module] | nn.Module | None
    example_inputs: tuple[Any, ...] | None
    memory: int | None


def _zip_kind(raw: bytes) -> str:
    names = entry_names(raw)
    if "archive_format" in names:
        return "program"
    if "serialized_exported_program.json" in names:
        return "old program"
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    return "pickle" if "data.pkl" in names else "zip"


def _is_safetensors(raw: bytes) -> bool:
    # 8 bytes of length, then that many bytes of JSON, then the tensors.
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 10 or length > len(raw) - 8 or raw[8:9] != b"{":
        return False
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(raw[8 : 8 + length]), dict)
    return False


def _is_onnx(raw: bytes) -> bool:
    """Whether the bytes start as a ModelProto: field 1 (ir_version, a small varint), then a field with a length."""
    # A tag is the field's number times 8 plus 2, for a field with a length: these are the fields 2 to 8.
    tags = (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42)
    safetensors = raw[3:9] == b"\0\0\0\0\0{"  # the length of its header may begin like this
    return len(raw) > 4 and raw[0] == 0x08 and 0 < raw[1] < 0x80 and raw[2] in tags and not safetensors


def _is_text(raw: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        start = raw[:4096].decode("utf-8", errors="strict" if len(raw) <= 4096 else "ignore")
        return all(character.isprintable() or character.isspace() for character in start)
    return False


def _kind(raw: bytes) -> str:
    if raw.startswith(b"PK"):
        return _zip_kind(raw)
    if raw.startswith(_LEGACY_MAGIC):
        return "pickle"
    for kind, test in (("safetensors", _is_safetensors), ("text", _is_text)):
        if test(raw):
            return kind
    return "plain pickle" if raw[:1] == b"\x80" and raw[-1:] == b"." else "unknown"


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """Force ``weights_only=True`` inside torch, which else falls back to a full unpickler if the safe one fails."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _tie_again(program: ExportedProgram) -> None:
    """Make names that share one tensor share one object again, as they did before saving."""
    # torch loads one tensor object for each name. Objects of one form at one address were one tensor before.
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, tensor in program.state_dict.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.numel() or tensor.is_meta:
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        same = seen.setdefault((*place, type(tensor), tensor.requires_grad), tensor)
        program.state_dict[name] = same


def _load_program(source: _Source) -> ExportedProgram:
    from torch.export.pt2_archive._package import load_pt2  # with the compiler: half a second

    archive = check_archive(source.raw, trust=source.trust)
    with contextlib.nullcontext() if source.trust else _only_weights():
        programs = load_pt2(archive.stream).exported_programs
    if list(programs) != ["model"]:
        raise FileError(f"holds the programs {list(programs)}", allowed="one, named model", next_step=_EXPORT)
    program: ExportedProgram = programs["model"]
    if not source.trust:
        check_program_sizes(program)
    if not source.trust:
        check_fit(program)
    check_room(program_need(program), source.memory)
    _tie_again(program)
    if archive.record is not None:
        program.graph_module.meta["surgery"] = archive.record
    return program


def _load_old_program(source: _Source) -> ExportedProgram:
    if not source.trust:
        raise UnsafeFileError(
            "is a program saved by torch 2.7 or earlier, as pickles", next_step=f"{_EXPORT}, or {_TRUST}"
        )
    return torch.export.load(io.BytesIO(source.raw))


def _load_torchscript(source: _Source) -> ExportedProgram:
    if not source.trust:
        raise UnsafeFileError("is TorchScript, which carries code", next_step=f"{_EXPORT}; {_TRUST}")
    if source.example_inputs is None:
        raise InputError("is TorchScript: its conversion needs example_inputs=(...)", next_step=_EXPORT)
    from torch._export.converter import TS2EPConverter

    try:
        script = torch.jit.load(io.BytesIO(source.raw), map_location="cpu")
        return TS2EPConverter(script, source.example_inputs).convert()
    except Exception as error:
        raise FileError(f"is TorchScript that cannot be converted: {cause(error)}", next_step=_EXPORT) from error


def _load_pickle(source: _Source) -> nn.Module | ExportedProgram:
    raw = rewrite(source.raw)[0].getvalue() if source.raw.startswith(b"PK") else source.raw
    try:
        found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not source.trust:
            raise _not_weights(error) from None
        found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False)
    if is_model(found):
        return found
    return with_weights(source.model, _unwrap(found))


def _not_weights(error: pickle.UnpicklingError) -> FileError:
    # torch names the first global that it refuses; without one, the bytes are damaged rather than unsafe.
    called = re.search(r"GLOBAL ([\w.]+)", str(error))
    if called is None:
        return FileError(f"cannot be read as weights ({cause(error)})", next_step="get the file again from its source")
    what = f"holds pickled objects ({called[1]}), and loading them runs code"
    return UnsafeFileError(what, next_step=f"save the module's state_dict() and {FACTORY}; {_TRUST}")


def _load_safetensors(source: _Source) -> nn.Module:
    import safetensors.torch

    header = json.loads(source.raw[8 : 8 + int.from_bytes(source.raw[:8], "little")])
    metadata = header.get("__metadata__")
    said = metadata.get(RECORD_KEY) if isinstance(metadata, dict) else None
    return with_weights(source.model, safetensors.torch.load(source.raw), None if said is None else _record(said))


def _record(said: Any) -> Record:
    try:
        return Record.from_json(json.loads(said)).check()
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, SurgeryError):
            raise
        raise FileError("has a damaged record of factored layers", next_step="save the model again") from error


def _unwrap(found: Any) -> dict[str, torch.Tensor]:
    """Return the state dict inside a checkpoint, without the prefixes of DistributedDataParallel and compile."""
    if isinstance(found, Mapping):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(found.get(key), Mapping):
                found = found[key]
                break
    if not isinstance(found, Mapping) or not found or not all(isinstance(key, str) for key in found):
        raise FileError(
            f"holds a {type(found).__name__}", allowed="a state dict, or a dict with one under 'state_dict'"
        )
    tensors = dict(found)
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _refusal(what: str, **extra: str) -> Callable[[_Source], nn.Module]:
    def refuse(_: _Source) -> nn.Module:
        raise FileError(what, **extra)

    return refuse


_LOADERS: dict[str, Callable[[_Source], ExportedProgram | nn.Module | ir.Model]] = {
    "program": _load_program,
    "old program": _load_old_program,
    "torchscript": _load_torchscript,
    "pickle": _load_pickle,
    "safetensors": _load_safetensors,
    "zip": _refusal("is a zip file, but not a model", next_step=_EXPORT),
    "text": _refusal("is a text file", allowed="a model file"),
    "plain pickle": _refusal("is a pickle that torch.save did not write", next_step=_EXPORT),
    "unknown": _refusal("is not a model file, or is cut off", allowed=_SUFFIXES, next_step=_EXPORT),
}


@only_own_errors
def load(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    model: str | Callable[[], nn.Module] | nn.Module | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    memory: int | None = None,
) -> ExportedProgram | nn.Module | torch.fx.GraphModule | ir.Model:
    """Return the model in a file: an ExportedProgram, an ``onnx_ir.Model``, or an ``nn.Module`` for a state dict.

    ``trust`` allows files that run code. ``model`` makes the module for a state dict: ``"package.module:factory"``, or
    a function without arguments. It may also be a dense module, which is changed in place. A module that
    ``surgery.save`` saved gets its factored layers again. ``example_inputs`` are needed to convert TorchScript, and are
    unused otherwise. A model is refused, before the memory is taken, if work on it may need more than ``memory`` bytes,
    by default nine tenths of the free memory. The record of earlier surgery on a program is in
    ``program.graph_module.meta["surgery"]``.

    Raises UnsafeFileError for a file that would run code, FileError for a file that is not a model, and InputError if
    ``model`` or ``example_inputs`` is missing or does not work. The message is one line.

    >>> program = load("model.pt2")  # doctest: +SKIP
    """
    check_path(path)
    check_regular(path)
    try:
        check_room(file_need(os.path.getsize(path)), memory)
        with open_regular(path) as file:
            if _is_onnx(file.peek(_START)[:_START]):  # type: ignore[attr-defined]  # it is buffered
                return read_model(Path(path), file, memory=memory)
        raw = read_regular(path)
        if not raw:
            raise FileError("is empty", next_step="get the file again from its source")
        with quiet():
            return _LOADERS[_kind(raw)](_Source(Path(path), raw, trust, model, example_inputs, memory))
    except SurgeryError as error:
        next_step = error.next_step
        if isinstance(error, UnsafeFileError) and not next_step:
            next_step = _TRUST
        what = f"{shown_path(path)}: {' '.join(error.what.split())}"
        raise type(error)(what, allowed=error.allowed, next_step=next_step) from error.__cause__
    except (Exception, SystemExit) as error:
        raise FileError(f"{os.fspath(path)}: cannot be loaded: {cause(error)}", next_step=_EXPORT) from error


def model_of(model: GivenModel | str | os.PathLike[str]) -> GivenModel:
    """Return a model as it is, or the one in the file at a path, as ``load`` opens it without trust.

    Raises:
        InputError: it is neither a model nor a path.
        FileError: as ``load``.
    """
    if isinstance(model, str | os.PathLike):
        return cast(GivenModel, load(model))
    kind_of(model)
    return model
