"""The kinds of models, by name: one row for each kind."""

from __future__ import annotations

from typing import Any, TypeAlias

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from surgery.errors import InputError
from surgery.kinds.base import Access, Kind, OpenModel
from surgery.kinds.fx.kind import GraphModuleKind
from surgery.kinds.inputs import Inputs
from surgery.kinds.module.kind import ModuleKind
from surgery.kinds.observed import Observed, calibrating
from surgery.kinds.onnx.kind import OnnxKind, OnnxProtoKind
from surgery.kinds.program.kind import ProgramKind

__all__ = ["KINDS", "Model", "check_inplace", "is_model", "kind_of", "observe", "open_model"]

Model: TypeAlias = nn.Module | GraphModule | ExportedProgram | ir.Model | onnx.ModelProto

# the first kind that knows the class of a model opens it: a GraphModule is an nn.Module too
KINDS: dict[str, Kind] = {
    "program": ProgramKind(),
    "fx": GraphModuleKind(),
    "module": ModuleKind(),
    "onnx": OnnxKind(),
    "onnx-proto": OnnxProtoKind(),
}


def is_model(value: Any) -> bool:
    """Whether there is a kind that can open a value."""
    return any(isinstance(value, kind.models) for kind in KINDS.values())


def kind_of(model: Any) -> Kind:
    """Return the kind of a model.

    Raises:
        InputError: no kind can open it.
    """
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise InputError(
            "a TorchScript model has no graph that can be changed",
            allowed=_allowed(),
            next_step="give the module that it was made from, or export it: torch.export.export(module, inputs)",
        )
    for kind in KINDS.values():
        if isinstance(model, kind.models):
            return kind
    raise InputError(f"{type(model).__name__} is not a model", allowed=_allowed())


def _allowed() -> str:
    return ", ".join([*(kind.label for kind in reversed(KINDS.values())), "or the path of a file with one"])


def open_model(
    model: Any, inputs: Inputs = ((), {}), *, copies: bool = True, inplace: bool = False, known: bool = False
) -> OpenModel:
    """Open a model; unless told otherwise, a copy of it is changed. ``Access`` explains the flags.

    Raises:
        InputError: the object is not a model, or it does not run on the example inputs.
        CaptureError: its graph cannot be captured.
    """
    return kind_of(model).open(model, inputs, Access(copies, inplace, known))


def observe(model: Any, inputs: Inputs) -> Observed:
    """Return a model in a form that can be run and watched; ``inputs`` are a batch of calibration inputs.

    Raises:
        InputError: the model does not run on them.
        CaptureError: its graph cannot be captured.
    """
    with calibrating():
        return open_model(model, inputs, copies=False).observe()


def check_inplace(model: Any) -> None:
    """Raise InputError for a model that cannot be changed in place."""
    reason = kind_of(model).refuse_inplace(model)
    if reason is not None:
        raise InputError(reason, next_step="use the model that is returned")
