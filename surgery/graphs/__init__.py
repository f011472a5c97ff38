"""Graph kinds: one adapter for each kind of model, behind the same few verbs."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from surgery.errors import InputError
from surgery.graphs.chains import ChainSpot
from surgery.graphs.exported import ProgramKind
from surgery.graphs.graph_module import GraphModuleKind
from surgery.graphs.kind import Found, GraphKind
from surgery.graphs.module import ModuleKind
from surgery.graphs.runs import Run
from surgery.graphs.view import Call, Spot

__all__ = ["Call", "ChainSpot", "Found", "GraphKind", "Model", "Run", "Spot", "open_graph"]

Model = nn.Module | GraphModule | ExportedProgram


def open_graph(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], *, copies: bool = True, inplace: bool = False
) -> GraphKind:
    """Return the adapter of a model, on a copy of it unless told otherwise (a program is never changed itself).

    Without ``copies`` nothing may be changed through it, unless ``inplace`` says so.

    Raises:
        InputError: the object is no model.
        CaptureError: the graph of an nn.Module can be neither traced nor exported.
    """
    if isinstance(model, ExportedProgram):
        return ProgramKind(model, args, kwargs)
    if isinstance(model, GraphModule):
        return GraphModuleKind(model, args, kwargs, copies=copies, inplace=inplace)
    if isinstance(model, nn.Module):
        return ModuleKind(model, args, kwargs, copies=copies, inplace=inplace)
    raise InputError(
        f"{type(model).__name__} is no model", allowed="nn.Module, torch.fx.GraphModule, torch.export.ExportedProgram"
    )
