"""Capture of an nn.Module's graph: torch.fx's symbolic tracing first, torch.export where that fails.

These graphs serve to find calls, not to be run: unpacked recurrent layers give their outline.
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
            return False  # torch's own, but made of layers
        return (
            is_operator_module(m)
            or is_link_module(m)
            or is_chain(m)
            or super().is_leaf_module(m, module_qualified_name)
        )


def trace_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[GraphModule, tuple[Any, ...]] | None:
    """Trace symbolically; return the graph with the values of its placeholders, or None where tracing fails.

    Arguments that the example inputs leave out are fixed to their defaults: a tracer's proxy is never None, and would
    silently take the other branch of ``if mask is None``. A tracer does not see hooks on the model itself, nor a
    forward of the instance: a model that has one is not traced.
    """
    bound = None if is_watched(model) else _bind(model, args, kwargs)
    if bound is None:
        return None
    given, defaults = bound
    try:
        with warnings.catch_warnings(), outlining(), kept_state(model):
            warnings.simplefilter("ignore")
            for module in model.modules():
                is_operator_module(module)  # which may run its forward, and is known afterwards: here no tracer sees it
            graph = _Tracer().trace(model, concrete_args=defaults or None)
            traced = GraphModule(model, graph)  # while the model has the constants that the tracer put there
    except Exception:  # user code on proxies may raise anything; torch.export is tried next
        return None
    values = []
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if not name.startswith("*"):  # no variadic argument is given: _bind has seen to that
            # the tracer renames arguments that it fixes
            values.append(given[name] if name in given else defaults[name.removesuffix("_1")])
    return traced, tuple(values)


def trace_outline(module: nn.Module) -> Graph:
    """Return the graph of the outline of an unpacked recurrent module, from its input alone."""
    tracer = _Tracer()
    tracer.traced_func_name = "outline"
    return tracer.trace(module)


def _bind(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the given arguments of forward and the defaults of the others; None where they do not fit or are variadic.

    Without any example inputs, the arguments without a default count as given, with no value.
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
    """Export in evaluation mode, with the training flags left as they were.

    Raises:
        CaptureError: torch.export cannot capture the model either.
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
    """Let a model run for its graph alone: in evaluation mode, recurrent layers in outline, tensors as outputs."""
    with kept_state(model), evaluation(model), outlining(), _plain_outputs(model):
        yield


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """Let a model return the tensors in its output alone: torch.export does not know caches and other classes."""
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
