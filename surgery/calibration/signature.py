"""How a model is called: how many of an item's values are its inputs, under which names, in batches of what size."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from surgery.errors import InputError
from surgery.graphs import Model
from surgery.inputs import Inputs, normalise_inputs, program_inputs

__all__ = ["Signature", "fixed_batch", "read_signature"]


@dataclass(frozen=True)
class Signature:
    """The names of a model's inputs in order, of which the first ``positional`` cannot be given by name.

    ``taken`` is how many values of a sequence are inputs: what follows is labels. ``required`` are inputs that must be
    there; ``open_ended`` models take other names too.
    """

    names: tuple[str, ...]
    taken: int
    required: frozenset[str]
    positional: int = 0
    open_ended: bool = False

    def arrange(self, item: Any) -> Inputs:
        """Return one item of the user's as inputs ``(args, kwargs)``, without labels.

        Raises:
            InputError: too few values, or names that the model does not have.
        """
        if isinstance(item, Mapping):
            return self._by_name(item)
        args, kwargs = normalise_inputs(item)
        if isinstance(item, Tensor) or kwargs:
            return args, kwargs
        if len(args) < len(self.required):
            what = f"a calibration input has {len(args)} values"
            raise InputError(what, allowed=f"{', '.join(self.names)}, and labels, which are left out")
        return args[: self.taken], {}

    def _by_name(self, item: Mapping[Any, Any]) -> Inputs:
        _, given = normalise_inputs(item)
        if len(given) == 1 and len(self.required) == 1 and not set(given) & set(self.names) and not self.open_ended:
            return tuple(given.values()), {}  # one array, one input: its name says nothing
        missing = [name for name in self.names if name in self.required and name not in given]
        if missing:
            what = f"the calibration inputs have no {', '.join(missing)} (they have {', '.join(given) or 'none'})"
            raise InputError(what, allowed=", ".join(self.names))
        first = self.names[: self.positional]
        known = given if self.open_ended else {name: given[name] for name in self.names if name in given}
        args = tuple(known[name] for name in first if name in known)
        return args, {name: value for name, value in known.items() if name not in first}


def read_signature(model: Model, example: Inputs) -> Signature:
    """Return how a model is called, by its own graph or ``forward``, and by example inputs if there are any."""
    if isinstance(model, ExportedProgram):
        args, kwargs = program_inputs(model)
        names = [str(name) for name in model.graph_signature.user_inputs]
        flat = len(names) == len(args) + len(kwargs)
        first = names[: len(args)] if flat else [f"arg{i}" for i in range(len(args))]
        every = (*first, *kwargs)
        return Signature(every, len(args), frozenset(every), positional=len(args))
    parameters = inspect.signature(model.forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    plain = [p for p in parameters if p.kind not in variadic]
    names = [p.name for p in plain]
    needed = [p.name for p in plain if p.default is p.empty]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    args, kwargs = example
    taken = len(args) or len(needed) or len(names)
    if isinstance(model, GraphModule) and hasattr(model.graph._codegen, "pytree_info"):
        inner = model.graph._codegen.pytree_info.in_spec.child(0)
        return Signature(tuple(names), taken, frozenset(needed), positional=inner.num_children)
    return Signature(tuple(names), taken, frozenset(needed), open_ended=open_ended)


def fixed_batch(model: Model) -> int | None:
    """Return the only batch size that a graph takes, or None if it takes any: the first axis of its first tensor."""
    if isinstance(model, ExportedProgram):
        inputs = [n for n in model.graph.find_nodes(op="placeholder") if n.name in model.graph_signature.user_inputs]
        return _first_size(inputs)
    if isinstance(model, GraphModule) and hasattr(model.graph._codegen, "pytree_info"):
        return _first_size(model.graph.find_nodes(op="placeholder"))
    return None


def _first_size(placeholders: Iterable[Node]) -> int | None:
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim():
            size = value.shape[0]
            return size if isinstance(size, int) else None
    return None
