"""Capture a module as a graph that runs, in the mode that it is in, so that it can be cut into stages.

torch.fx's trace comes first: its graph calls the module's own layers, and takes batches of any size. torch.export's
graph calls functions on the module's own parameters. Training mode stays: dropout draws, and batch norms learn.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from surgery.errors import CaptureError, InputError
from surgery.kinds.fx.run import bind_graph
from surgery.kinds.fx.stages import CutGraph, Origin
from surgery.kinds.fx.trace import trace_module
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.untouched import kept_random, kept_state
from surgery.text import first_line

__all__ = ["cut_module", "export_module"]


def cut_module(model: nn.Module, inputs: Inputs) -> CutGraph:
    """Return a module that is open to be cut into stages.

    Raises:
        InputError: there are no example inputs, or they do not fit the model.
        CaptureError: neither torch.fx nor torch.export can capture the model.
    """
    args, kwargs = inputs
    if not args and not kwargs:
        raise InputError("a module is cut along a run of it", next_step="give example_inputs")
    with kept_random(model):
        found = trace_module(model, args, kwargs, runs=True)
        if found is not None:
            graph, values = found
            try:
                return CutGraph(Origin(model, graph, _Binder(model, graph)), values)
            except InputError:
                pass  # the trace took a branch that the inputs do not take
        graph = _exported(model, args, kwargs)
        bind = _flat_binder(graph)
        return CutGraph(Origin(model, graph, bind), bind(args, kwargs))


class _Binder:
    """Gives the values of a traced graph's placeholders for a call of its module."""

    def __init__(self, model: nn.Module, graph: GraphModule) -> None:
        self._signature = inspect.signature(model.forward)
        self._nodes = list(graph.graph.find_nodes(op="placeholder"))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"the inputs do not fit the model: {error}") from None
        given = set(bound.arguments)
        bound.apply_defaults()
        return [self._value(str(node.target), given, bound.arguments) for node in self._nodes]

    def _value(self, name: str, given: set[str], values: dict[str, Any]) -> Any:
        if name in values:
            return values[name]
        fixed = name.removesuffix("_1")  # the tracer renames arguments that it fixes to their defaults
        if fixed in given:
            raise InputError(f"the input {fixed} is given", allowed="the inputs of the example, which left it out")
        return values[fixed]


def _flat_binder(graph: GraphModule) -> Any:
    return lambda args, kwargs: list(bind_graph(graph.graph, (args, kwargs)).values())


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    """Return torch.export's graph of a module, on the module's own parameters; the batch is any, if the model lets it.

    Raises:
        CaptureError: torch.export cannot capture the model.
    """
    program = export_module(model, args, kwargs)
    graph = program.module(check_guards=False)
    own: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    for path, module in graph.named_modules():
        for store in (module._parameters, module._buffers):
            for name in store:
                store[name] = own.get(f"{path}.{name}".lstrip("."), store[name])
    return graph


def export_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Return the program of a module in the mode that it is in; the batch is any, if the model lets it.

    Raises:
        CaptureError: torch.export cannot capture the model.
    """

    def axes(value: Any) -> Any:
        many = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] > 1
        return {0: Dim.AUTO} if many else None

    names = list(inspect.signature(model.forward).parameters)
    dynamic = {name: pytree.tree_map(axes, value) for name, value in zip(names, args, strict=False)}
    dynamic |= {name: pytree.tree_map(axes, value) for name, value in kwargs.items()}
    error: Exception = CaptureError("torch.export was not tried")
    for shapes in (dynamic, None):
        try:
            with warnings.catch_warnings(), kept_state(model):
                warnings.simplefilter("ignore")
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        except Exception as raised:  # user code may raise anything
            error = raised
    raise CaptureError(
        f"the model can be neither traced nor exported: {first_line(error)}",
        next_step="run torch.export.export(model, example_inputs) to see torch's own explanation",
    ) from error
