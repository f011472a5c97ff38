"""Save a model so that the file is always whole: the old one or the new one, never a part of either.

The bytes go to a temporary file in the target's folder, are flushed to the disk, and take the target's name in one
step. A crash at any moment leaves the target as it was; an error or Ctrl-C also removes the temporary file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from surgery.archive import RECORD
from surgery.errors import FileError, InputError
from surgery.record import record_of
from surgery.text import first_line

__all__ = ["RECORD_KEY", "save", "save_state_dict", "write_atomically"]

RECORD_KEY = "surgery"  # of the metadata of a safetensors file
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)

_SAVABLE = "change the model so that torch.export.save takes it, or save its state_dict()"
_EXISTS = "pass --force (in Python force=True) to overwrite it, or choose another name"


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise FileError(f"{target}: is a folder", allowed="a file name")
    if not target.parent.is_dir():
        raise FileError(f"{target}: the folder {target.parent} does not exist", next_step="make it first")
    if target.exists() and not force:
        raise FileError(f"{target}: exists already", next_step=_EXISTS)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(temporary: Path, target: Path, *, force: bool) -> None:
    if force:
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)  # unlike replace, it fails if someone else made the target meanwhile
    except FileExistsError:
        raise FileError(f"{target}: exists already", next_step=_EXISTS) from None
    temporary.unlink()


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None], *, force: bool = True) -> None:
    """Let ``write`` fill a file that appears at ``path`` only when it is complete and on the disk.

    ``force=False`` refuses a target that exists. A link is followed. Whatever ``write`` raises passes through, after
    the temporary file was removed; an OSError becomes a FileError.
    """
    target = Path(os.path.realpath(path))
    _check_target(target, force=force)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, target, force=force)
        _sync_folder(target.parent)
    except OSError as error:
        raise FileError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _extra_files(program: ExportedProgram) -> dict[str, str] | None:
    record = program.graph_module.meta.get("surgery")
    if not isinstance(record, dict):
        return None
    try:
        return {RECORD: json.dumps(record, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise InputError(f"the record in graph_module.meta['surgery'] is not JSON: {error}") from error


def save(
    model: ExportedProgram | nn.Module | torch.fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    force: bool = True,
) -> None:
    """Save an ExportedProgram as a .pt2 archive with its record, or a module as safetensors with its record.

    The record of a program is ``program.graph_module.meta["surgery"]``, a dict of JSON values. That of a module says
    which layers are factored and how: ``surgery.load(path, model=factory)`` gives a fresh module the same structure,
    and the numbers. Nothing is pickled. Folders are not made. Raises FileError where the file cannot be written, and
    InputError for a model that cannot be saved; the file that was there stays as it was.

    >>> save(program, "model.pt2")  # doctest: +SKIP
    """
    if isinstance(model, ExportedProgram):
        _save_program(model, path, force=force)
    elif isinstance(model, nn.Module):
        _save_module(model, path, force=force)
    else:
        raise InputError(f"cannot save a {type(model).__name__}", allowed="ExportedProgram, nn.Module, GraphModule")


def _save_program(model: ExportedProgram, path: str | os.PathLike[str], *, force: bool) -> None:
    def write(file: IO[bytes]) -> None:
        try:
            torch.export.save(model, file, extra_files=_extra_files(model))
        except (OSError, InputError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)[:160]}"
            what = f"{os.fspath(path)}: torch cannot save this {type(model).__name__}: {reason}"
            raise InputError(what, next_step=_SAVABLE) from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations while it pickles
        write_atomically(path, write, force=force)


def _save_module(model: nn.Module, path: str | os.PathLike[str], *, force: bool) -> None:
    if isinstance(model, torch.fx.GraphModule) and model.meta.get("surgery"):
        what = f"{os.fspath(path)}: a graph with factored functions cannot be saved as a state"
        raise InputError(what, next_step="decompose the module it was made from, or its exported program")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        what = f"{os.fspath(path)}: {lazy[0]} of the state is a weight that is not made yet"
        raise InputError(what, next_step="run the model once")
    state = model.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    plain = [name for name, value in state.items() if name not in others and type(value) not in _PLAIN]
    if others or plain:
        what = f"{os.fspath(path)}: {(others + plain)[0]} of the state is a {type(state[(others + plain)[0]]).__name__}"
        raise InputError(what, allowed="tensors", next_step="save it before it is quantized, or by its own tool")
    record = {RECORD_KEY: json.dumps(record_of(model).to_json())}
    save_state_dict(state, path, force=force, metadata=record)


def save_state_dict(
    state: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    force: bool = True,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a state dict as safetensors; tied weights are written under each of their names, as strict loading wants.

    Raises FileError where the file cannot be written; the file that was there stays as it was.
    """
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}

    def write(file: IO[bytes]) -> None:
        file.write(safetensors.torch.save(own, metadata))

    write_atomically(path, write, force=force)
