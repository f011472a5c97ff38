"""Graph kinds: one adapter for each kind of model, behind the same few verbs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from surgery.errors import InputError
from surgery.kinds.base import Kind
from surgery.kinds.fx.kind import GraphModuleKind
from surgery.kinds.module.kind import ModuleKind
from surgery.kinds.program.kind import ProgramKind

__all__ = ["Model", "open_graph"]

Model = nn.Module | GraphModule | ExportedProgram


def open_graph(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    copies: bool = True,
    inplace: bool = False,
    known: bool = False,
) -> Kind:
    """Return the adapter of a model, on a copy of it unless told otherwise (a program is never changed itself).

    Without ``copies`` nothing may be changed through it, unless ``inplace`` says so. With ``known`` only the chains
    that decompose has made are wanted of a module that has any: nothing is captured for them.

    Raises:
        InputError: the object is no model, or it does not run on the example inputs.
    """
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise InputError(
            "a TorchScript model has no graph that can be changed",
            allowed="nn.Module, torch.fx.GraphModule, torch.export.ExportedProgram",
            next_step="give the module that it was made from, or export it: torch.export.export(module, inputs)",
        )
    if isinstance(model, ExportedProgram):
        return ProgramKind(model, args, kwargs)
    if isinstance(model, GraphModule):
        return GraphModuleKind(model, args, kwargs, copies=copies, inplace=inplace)
    if isinstance(model, nn.Module):
        return ModuleKind(model, args, kwargs, copies=copies, inplace=inplace, known=known)
    raise InputError(
        f"{type(model).__name__} is no model", allowed="nn.Module, torch.fx.GraphModule, torch.export.ExportedProgram"
    )
