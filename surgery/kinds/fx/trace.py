"""Capture the graph of an nn.Module: traced by torch.fx or torch.export, or seen in one run.

The graphs serve to find calls and are not run. So unpacked recurrent layers are captured as their outlines.

This is for models that neither torch.fx nor torch.export can capture, as those with packed sequences or with control
flow that depends on data. The resulting graph has the calls of modules and the values that they read, but not how these
values are computed. So sites can be found, but nothing is proved about the dataflow.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn.utils.rnn import PackedSequence

from surgery.algebra import Shape
from surgery.errors import CaptureError, InputError
from surgery.kinds.layers.carried import is_watched
from surgery.kinds.layers.factored import is_chain
from surgery.kinds.layers.modules import is_operator_module
from surgery.kinds.layers.recurrent import UnpackedRecurrent, outlining
from surgery.kinds.layers.steps import is_link_module
from surgery.kinds.layers.untouched import evaluation, kept_random, kept_state
from surgery.system.quiet import quiet
from surgery.text import first_line

__all__ = ["Watched", "export_program", "run_once", "tensors_in", "trace_module", "trace_outline", "watch"]

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


class _WholeTracer(_Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, UnpackedRecurrent) or super().is_leaf_module(m, module_qualified_name)


def trace_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, runs: bool = False
) -> tuple[GraphModule, tuple[Any, ...]] | None:
    """Trace a module symbolically; return the graph and the values of its placeholders, or None if tracing fails.

    Arguments that the example inputs leave out are fixed to their defaults. A proxy would not do: it is never None, and
    would silently take the other branch of ``if mask is None``. A model with hooks, or with a forward on the instance,
    is not traced, because the tracer does not see them. A graph that ``runs`` calls unpacked recurrent layers as they
    are; others have their outlines. None comes back, too, where a graph that ``runs`` would lack writes to buffers: the
    tracer sees no buffer, so a forward that counts in one does so while it is traced, and never again.
    """
    bound = None if is_watched(model) else _bind(model, args, kwargs)
    if bound is None:
        return None
    given, defaults = bound
    try:
        with warnings.catch_warnings(), nullcontext() if runs else outlining(), kept_state(model):
            warnings.simplefilter("ignore")
            for module in model.modules():
                is_operator_module(module)  # this may run the module's forward, and must do so before the tracer is on
            tracer = _WholeTracer() if runs else _Tracer()
            buffers = _versions(model)
            graph = tracer.trace(model, concrete_args=defaults or None)
            if runs and not _same(buffers, _versions(model)):
                return None
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


def _versions(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Return the buffers, each with how often it was written to."""
    return [(buffer, buffer._version) for buffer in model.buffers() if not buffer.is_inference()]


def _same(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    return len(before) == len(after) and all(a is b and m == n for (a, m), (b, n) in zip(before, after, strict=True))


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
        with quiet(), torch.no_grad(), _prepared(model):
            return torch.export.export(model, args, kwargs)
    except Exception as error:  # user code may raise anything
        raise CaptureError(
            f"the model can be neither traced nor exported: {first_line(error)}",
            next_step="run torch.export.export(model, example_inputs) to see torch's own explanation",
        ) from error


@contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
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


_Key = tuple[Any, ...]


@dataclass(eq=False)
class Watched:
    """The calls of modules in one run, in order, as nodes of a graph; the shapes of the values are known."""

    graph: Graph = field(default_factory=Graph)
    shapes: dict[Node, Shape] = field(default_factory=dict)
    _values: dict[int, tuple[weakref.ref[Tensor], int, Node]] = field(default_factory=dict)
    _loops: dict[str, tuple[Node, list[Shape]]] = field(default_factory=dict)

    def note(self, path: str, value: Tensor) -> None:
        """Note a call of the module at a path, on a value."""
        self.graph.call_module(path, (self._source(value),))

    def note_step(self, path: str, value: Tensor, *, batch_first: bool) -> None:
        """Note one call of a part in the loop of a recurrent layer; the graph has one call for all steps together."""
        # All steps have the shape (N, H): together they are (T, N, H), or (N, T, H) where batch_first. In a packed
        # sequence, steps have different numbers of rows: together they are (sum of all rows, H).
        if path not in self._loops:
            source = self.graph.call_function(_value)
            self._loops[path] = (source, [])
            self.graph.call_module(path, (source,))
        source, steps = self._loops[path]
        steps.append(tuple(value.shape))
        count, *rest = len(steps), *steps[0]
        if len(set(steps)) > 1:
            self.shapes[source] = (sum(shape[0] for shape in steps), *steps[0][1:])
        else:
            self.shapes[source] = (rest[0], count, *rest[1:]) if batch_first else (count, *rest)

    def begin_loops(self, path: str) -> None:
        """Note that a new call of the recurrent layer at a path begins."""
        for part in [part for part in self._loops if part.startswith(f"{path}.")]:
            del self._loops[part]

    def _source(self, value: Tensor) -> Node:
        """Return the node of a value: the same node for the same tensor, as long as nothing has written to it."""
        known = self._values.get(id(value))
        # an id may be used again after its tensor is freed, and a tensor that is written to has a new value
        version = 0 if value.is_inference() else value._version
        if known is not None and known[0]() is value and known[1] == version:
            return known[2]
        node = self.graph.call_function(_value)
        self.shapes[node] = tuple(value.shape)
        self._values[id(value)] = (weakref.ref(value), version, node)
        return node


def _value() -> None:
    """Represent a value of which only the shape is known."""


def watch(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Watched:
    """Run a module once, in evaluation mode, and return the calls of its modules with weights.

    Raises:
        InputError: the model does not run on the example inputs.
    """
    found = Watched()
    handles = []
    for path, module in root.named_modules():
        if isinstance(module, UnpackedRecurrent):
            handles.append(module.register_forward_pre_hook(lambda m, a, p=path: found.begin_loops(p)))
        see = _seer(root, path, module, found)
        if see is not None:
            handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
    try:
        run_once(root, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _seer(root: nn.Module, path: str, module: nn.Module, found: Watched) -> Callable[..., None] | None:
    """Return the hook for a module to watch, or None: an operator, a chain, or a module with parameters of its own."""
    owns = any(parameter is not None for parameter in module._parameters.values())
    # factors are not looked at one by one: their chain is
    inside = any(is_chain(root.get_submodule(prefix)) for prefix in _prefixes(path))
    if inside or not path or not (is_operator_module(module) or is_chain(module) or owns):
        return None
    if isinstance(module, UnpackedRecurrent):
        return None
    parent = root.get_submodule(path.rpartition(".")[0])
    # input weights (ih) run once for all steps; the recurrent parts run once in each step
    loops = isinstance(parent, UnpackedRecurrent) and not path.rpartition(".")[2].startswith("ih_")

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs.get("input")
        if not isinstance(value, Tensor):
            return
        if loops:
            found.note_step(path, value, batch_first=bool(parent.batch_first))
        else:
            found.note(path, value)

    return see


def _prefixes(path: str) -> list[str]:
    words = path.split(".")
    return [".".join(words[:at]) for at in range(1, len(words))]


def run_once(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module in evaluation mode and return its output; its state and the random state are restored afterwards.

    Raises:
        InputError: the model does not run on the example inputs.
    """
    try:
        with torch.no_grad():
            return _run(root, args, kwargs)
    except Exception:  # a model may need gradients in its forward
        try:
            with torch.enable_grad():
                return _run(root, args, kwargs)
        except Exception as error:  # a model may raise anything
            what = f"the model does not accept the inputs: {first_line(error)}"
            raise InputError(what, next_step="check their number, shapes and dtypes") from error


def _run(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with kept_random(root), evaluation(root), kept_state(root):
        return root(*args, **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in an output, each once, including those in caches and other objects."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found.setdefault(id(item), item)
        elif id(item) not in seen:
            seen.add(id(item))
            todo += _inside(item)
    return list(found.values())


def _inside(value: Any) -> list[Any]:
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, nn.Module | type) or callable(value):
        return []
    return list(getattr(value, "__dict__", {}).values())
