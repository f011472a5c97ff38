"""Find the calls of a module by watching one run on the example inputs: which modules are called, and on which values.

This is for models that neither torch.fx nor torch.export can capture, as those with packed sequences or with control
flow that depends on data. The resulting graph has the calls of modules and the values that they read, but not how these
values are computed. So sites can be found, but nothing is proved about the dataflow.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.utils.rnn import PackedSequence

from surgery.algebra.operators import Shape
from surgery.errors import InputError
from surgery.kinds.layers.factored import is_chain
from surgery.kinds.layers.modules import is_operator_module
from surgery.kinds.layers.recurrent import UnpackedRecurrent
from surgery.kinds.layers.untouched import evaluation, kept_random, kept_state
from surgery.text import first_line

__all__ = ["Watched", "run_once", "tensors_in", "watch"]

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
            what = f"the model does not accept the example inputs: {first_line(error)}"
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
