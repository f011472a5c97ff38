"""Capture the graph of an nn.Module: by torch.fx's symbolic tracing, or by torch.export if tracing fails.

The graphs serve to find calls and are not run. So unpacked recurrent layers are captured as their outlines.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Tracer

from surgery.errors import CaptureError, InputError
from surgery.kinds.fx.watch import tensors_in
from surgery.kinds.layers.carried import is_watched
from surgery.kinds.layers.factored import is_chain
from surgery.kinds.layers.modules import is_operator_module
from surgery.kinds.layers.recurrent import outlining
from surgery.kinds.layers.steps import is_link_module
from surgery.kinds.layers.untouched import evaluation, kept_state
from surgery.text import first_line

__all__ = ["export_program", "trace_module", "trace_outline"]


_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _TRANSFORMERS):
            return False  # a class of torch, which would be a leaf, but one that is made of layers
        return (
            is_operator_module(m)
            or is_link_module(m)
            or is_chain(m)
            or super().is_leaf_module(m, module_qualified_name)
        )


def trace_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[GraphModule, tuple[Any, ...]] | None:
    """Trace a module symbolically; return the graph and the values of its placeholders, or None if tracing fails.

    Arguments that the example inputs leave out are fixed to their defaults. A proxy would not do: it is never None, and
    would silently take the other branch of ``if mask is None``. A model with hooks, or with a forward on the instance,
    is not traced, because the tracer does not see them.
    """
    bound = None if is_watched(model) else _bind(model, args, kwargs)
    if bound is None:
        return None
    given, defaults = bound
    try:
        with warnings.catch_warnings(), outlining(), kept_state(model):
            warnings.simplefilter("ignore")
            for module in model.modules():
                is_operator_module(module)  # this may run the module's forward, and must do so before the tracer is on
            graph = _Tracer().trace(model, concrete_args=defaults or None)
            traced = GraphModule(model, graph)  # while the model still has the constants that the tracer put there
    except Exception:  # user code on proxies may raise anything; torch.export is tried next
        return None
    values = []
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if not name.startswith("*"):  # _bind has made sure that no variadic argument is given
            # the tracer renames arguments that it fixes
            values.append(given[name] if name in given else defaults[name.removesuffix("_1")])
    return traced, tuple(values)


def trace_outline(module: nn.Module) -> Graph:
    """Return the graph of an unpacked recurrent module's outline, with the module's input as its only placeholder."""
    tracer = _Tracer()
    tracer.traced_func_name = "outline"
    return tracer.trace(module)


def _bind(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the given arguments of forward, and the defaults of the other arguments; None if variadic ones are given.

    Without example inputs, the arguments without a default count as given, with the value None.

    Raises:
        InputError: the example inputs do not fit the signature of forward.
    """
    signature = inspect.signature(model.forward)
    variadic = {p.name for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    defaults = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    if not args and not kwargs:
        given: dict[str, Any] = dict.fromkeys(set(signature.parameters) - variadic - set(defaults))
    else:
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise InputError(f"the example inputs do not fit the model: {error}") from None
    if variadic & set(given):
        return None
    return given, {name: value for name, value in defaults.items() if name not in given}


def export_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Export a module in evaluation mode; its training flags are restored afterwards.

    Raises:
        CaptureError: torch.export cannot capture the model.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet(model):
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs)
    except Exception as error:  # user code may raise anything
        raise CaptureError(
            f"the model can be neither traced nor exported: {first_line(error)}",
            next_step="run torch.export.export(model, example_inputs) to see torch's own explanation",
        ) from error


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Prepare a model for capture: evaluation mode, outlines of recurrent layers, and plain tensors as outputs."""
    with kept_state(model), evaluation(model), outlining(), _plain_outputs(model):
        yield


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """Let a model return only the tensors in its output: torch.export does not know caches and other classes."""
    own, forward = vars(model).get("forward"), model.forward

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors_in(forward(*args, **kwargs))

    vars(model)["forward"] = plain
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own
