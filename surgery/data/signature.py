"""How a model is called: how many of an item's values are its inputs, of what names, types and sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from surgery.data.inputs import Inputs, normalise_inputs, program_inputs
from surgery.errors import InputError
from surgery.kinds.registry import Model

__all__ = ["Declared", "Signature", "declared_inputs", "fixed_batch", "read_signature"]

_ANY = 2**31  # a bound that torch.export has of its own is above this


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


@dataclass(frozen=True)
class Declared:
    """What is known of an input: its dtype, its sizes (None where they may vary), and how many ids it knows, if any.

    ``shape`` is that of the example inputs, with the names of sizes that vary where there are names. ``longest`` is the
    largest size that the second axis may have, where there is a limit.
    """

    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    shape: tuple[int | str, ...]
    ids: int | None = None
    longest: int | None = None


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


def declared_inputs(model: Model, example: Inputs, signature: Signature) -> dict[str, Declared]:
    """Return what is known of the inputs that are tensors, by name: from the graph, else from the example inputs."""
    args, kwargs = program_inputs(model) if isinstance(model, ExportedProgram) else example
    given = dict(zip(signature.names, args, strict=False)) | kwargs
    found = {
        name: Declared(value.dtype, (None,) * value.dim(), tuple(value.shape), _ids_of_module(model, name))
        for name, value in given.items()
        if isinstance(value, Tensor)
    }
    nodes = _input_nodes(model)
    if len(nodes) == len(signature.names):
        values = zip(_names_in_order(model, signature), nodes, strict=True)
        found |= {name: _declared(node, model) for name, node in values if isinstance(node.meta.get("val"), Tensor)}
    return found


def _input_nodes(model: Model) -> list[Node]:
    if isinstance(model, ExportedProgram):
        inputs = {str(name) for name in model.graph_signature.user_inputs}
        return [node for node in model.graph.find_nodes(op="placeholder") if node.name in inputs]
    return list(model.graph.find_nodes(op="placeholder")) if isinstance(model, GraphModule) else []


def _names_in_order(model: Model, signature: Signature) -> Sequence[str]:
    """Return the names in the order of the graph: a program may be called with others of the same names."""
    if not isinstance(model, ExportedProgram) or model.call_spec.in_spec is None:
        return signature.names
    first = signature.names[: signature.positional]
    return *first, *(model.call_spec.in_spec.child(1).context or [])


def _declared(node: Node, model: Model) -> Declared:
    value = node.meta["val"]
    sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    embedded = [user for user in node.users if "embedding" in str(user.target) and user.args[1:2] == (node,)]
    weights = [user.args[0].meta.get("val") for user in embedded if isinstance(user.args[0], Node)]
    ids = next((len(w) for w in weights if isinstance(w, Tensor)), None)
    return Declared(value.dtype, sizes, shape, ids, _longest(value.shape, model))


def _longest(shape: torch.Size, model: Model) -> int | None:
    """Return the largest size of the second axis that a program takes, or None if it takes any."""
    if len(shape) < 2 or isinstance(shape[1], int):
        return shape[1] if len(shape) > 1 else None
    known = model.range_constraints.get(shape[1].node.expr) if isinstance(model, ExportedProgram) else None
    return int(known.upper) if known is not None and known.upper < _ANY else None


def _ids_of_module(model: Model, name: str) -> int | None:
    """Return how many ids a model of Hugging Face transformers knows."""
    embeddings = getattr(model, "get_input_embeddings", None)
    if name != "input_ids" or embeddings is None:
        return None
    known = getattr(embeddings(), "num_embeddings", None)
    return known if isinstance(known, int) else None
