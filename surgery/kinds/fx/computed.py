"""Weights that a graph computes from parameters and constants alone: each is computed once, and becomes a site.

Three kinds of computed weights are left alone, with the reason: random ones, those whose computation changes or reads
state that the model updates, and those whose parameters other parts of the graph use too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from surgery.errors import Refusal
from surgery.kinds.fx.functional import CallParts, read_call
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.recipe import Lifted, Recipe, read_recipe, run_recipe
from surgery.kinds.layers.tensors import key_of, refuse_tensor
from surgery.text import first_line

__all__ = ["Constants", "Values", "lift"]

Values = MutableMapping[Node, nn.Parameter | Refusal]

_PARAMETRIZED = re.compile(r"((?:.*\.)?)parametrizations\.(\w+)\.original\d*")
_RAW = re.compile(r"((?:.*\.)?weight)_(?:v|g|orig|raw)")
_MOST = 4096  # a parameter with at most this many entries is kept with its numbers, however small the weight is


@dataclass(frozen=True, eq=False)
class Constants:
    """How a kind of graphs finds the name and the tensor of a buffer or constant by its node.

    ``updated`` names buffers that a run changes without a node that writes to them.
    """

    find: Callable[[Node], tuple[str, Tensor] | None]
    updated: frozenset[str] = frozenset()


def lift(reader: Reader, constants: Constants, values: Values) -> Reader:
    """Return the reader with each computed weight as a parameter, in the place of the parameters it is computed from.

    ``values`` has the weights that were computed before, by node; new ones are added to it.
    """
    # Each computed weight has a main parameter, of its own size. In the new reader the weight stands at the place of
    # the main parameter, and all parameters that it is computed from are hidden: W = g v / |v| stands for v, and hides
    # g.
    found: dict[Node, Lifted] = {}
    refused: dict[Node, str] = {}
    weights = _weights(reader)
    constants = replace(constants, updated=_updated(reader, constants)) if weights else constants
    for node in weights:
        one = _Finder(reader, constants, values).find(node)
        if isinstance(one, Lifted):
            found[node] = one
        elif one is not None:
            refused[node] = one.reason
    hidden = {name for one in found.values() for names in one.names.values() for name in names}
    parameters: dict[str, Tensor] = {}
    heads = {one.names[one.main][0]: one for one in found.values()}
    for name, tensor in reader.parameters.items():
        if name in heads:
            one = heads[name]
            # the plain name of the weight may be taken by another parameter; then it keeps the name of its main
            # parameter
            free = one.name not in reader.parameters or one.name in hidden
            heads[name] = one = one if free else replace(one, name=name)
            parameters[one.name] = one.value
        elif name not in hidden:
            parameters[name] = tensor
    kept = {node: name for node, name in reader.providers.items() if name not in hidden}
    lifted = {one.name: one for one in heads.values()}
    inside = {node for one in lifted.values() for node in one.own}
    return replace(
        reader,
        parameters=parameters,
        providers=kept | {one.node: name for name, one in lifted.items()},
        outlined=reader.outlined | inside,
        lifted=lifted,
        refused=refused,
    )


def _updated(reader: Reader, constants: Constants) -> frozenset[str]:
    """Return the names of all buffers and constants that a run changes."""
    inputs = (read for node in reader.graph.nodes if _writes(node) for read in node.all_input_nodes)
    return frozenset(found[0] for read in inputs if (found := constants.find(read)) is not None) | constants.updated


def _writes(node: Node) -> bool:
    """Whether a node changes one of its inputs, by its schema or its name."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))
    return "out" in node.kwargs or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _weights(reader: Reader) -> list[Node]:
    """Return the nodes that give the weight of an operator's call and are neither parameters nor buffers."""
    nodes = (node for node in reader.graph.nodes if node not in reader.outlined)
    parts = [found for node in nodes if isinstance(found := read_call(node), CallParts)]
    weights = dict.fromkeys(each.weight for each in parts)
    return [node for node in weights if node not in reader.providers and node not in reader.buffers]


@dataclass(frozen=True, eq=False)
class _Finder:
    reader: Reader
    constants: Constants
    values: Values

    def find(self, weight: Node) -> Lifted | Refusal | None:
        """Return a computed weight, or why it is left alone; None if it depends on the inputs, or on no parameter."""
        nodes = self._ancestors(weight)
        names = [self.reader.providers[node] for node in nodes if node in self.reader.providers]
        if not names:
            return None
        own = _own(nodes, weight)
        parameters = {name: self.reader.parameters[name] for name in dict.fromkeys(names)}
        recipe = self._recipe(nodes)
        refusal = self._refuse(nodes, parameters, own)
        if refusal is not None or isinstance(recipe, Refusal):
            return refusal or (recipe if isinstance(recipe, Refusal) else None)
        value = self._value(nodes, recipe, parameters)
        if isinstance(value, Refusal):
            return value
        main = _main(parameters, value)
        if isinstance(main, Refusal):
            return main
        aliases = {name: tuple(self.reader.names[key_of(tensor)]) for name, tensor in parameters.items()}
        return Lifted(_weight_name(main), weight, own, recipe, parameters, aliases, main, value)

    def _ancestors(self, weight: Node) -> list[Node]:
        """Return all nodes that a weight is computed by, in graph order; an empty list if it depends on an input."""
        found: set[Node] = set()
        pending = [weight]
        while pending:
            node = pending.pop()
            if node in found:
                continue
            found.add(node)
            # the walk stops at parameters and constants; at an input it fails, since then the weight is not fixed
            if node in self.reader.providers or self.constants.find(node) is not None:
                continue
            if node.op in ("placeholder", "get_attr") or node in self.reader.outlined:
                return []
            pending += node.all_input_nodes
        nodes = list(self.reader.graph.nodes)
        before = nodes[: nodes.index(weight)]
        # assertions about values on the way have no users, so the walk from the weight does not find them
        idle = {node for node in before if _idle(node) and found.issuperset(node.all_input_nodes)}
        found |= idle
        return [*(node for node in before if node in found), weight]

    def _recipe(self, nodes: Sequence[Node]) -> Recipe | Refusal:
        leaf = {node: ("parameter", self.reader.providers[node]) for node in nodes if node in self.reader.providers}
        constants = {node: found for node in nodes if (found := self.constants.find(node)) is not None}
        return read_recipe(nodes, leaf | {node: ("buffer", name) for node, (name, _) in constants.items()})

    def _refuse(self, nodes: Sequence[Node], parameters: Mapping[str, Tensor], own: Collection[Node]) -> Refusal | None:
        """Refuse parameters that other nodes use too, state that the model updates, and modules with parameters."""
        for name, tensor in parameters.items():
            if (reason := refuse_tensor(tensor, f"parameter {name}")) is not None:
                return Refusal(reason)
            strangers = self.reader.uses[key_of(tensor)] - set(own) - set(nodes[-1].users)
            if strangers:
                users = ", ".join(sorted(node.name for node in strangers))
                return Refusal(f"its weight is computed from {name}, which is also used by {users}")
        for node in nodes:
            constant = self.constants.find(node)
            if constant is not None and constant[0] in self.constants.updated:
                return Refusal(f"its weight is computed from {constant[0]}, which the model updates")
            if node.op == "call_module" and self.reader.module is not None:
                module = self.reader.module(str(node.target))
                if any(True for _ in (*module.parameters(), *module.buffers())):
                    return Refusal(f"its weight is computed by {node.target}, a module with parameters of its own")
        return None

    def _value(self, nodes: Sequence[Node], recipe: Recipe, parameters: Mapping[str, Tensor]) -> nn.Parameter | Refusal:
        weight = nodes[-1]
        if weight not in self.values:
            constants = dict(found for node in nodes if (found := self.constants.find(node)) is not None)
            value = _compute(recipe, {**parameters, **constants}, self.reader.module)
            if isinstance(value, Tensor):
                trains = any(tensor.requires_grad for tensor in parameters.values())
                value = nn.Parameter(value, requires_grad=trains)
            self.values[weight] = value
        return self.values[weight]


def _idle(node: Node) -> bool:
    """Whether nothing uses the value of a node, such as an assertion about its input before a cast."""
    return not node.users and bool(node.all_input_nodes) and node.op in ("call_function", "call_method")


def _own(nodes: Sequence[Node], weight: Node) -> tuple[Node, ...]:
    """Return the nodes that only serve to compute the weight, in order."""
    own = {weight, *filter(_idle, nodes)}
    # from last to first, so that the users of each node are decided before the node itself
    for node in reversed(nodes):
        if all(user in own for user in node.users):
            own.add(node)
    return tuple(node for node in nodes if node in own)


def _compute(recipe: Recipe, tensors: Mapping[str, Tensor], module: Any) -> Tensor | Refusal:
    """Return the value of a weight; refuse a random weight, and one whose computation changes the tensors it reads."""
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    # the weight is computed once, on copies; if this draws random numbers, or changes a copy, one value cannot stand
    # for all runs
    devices = sorted({tensor.device.index or 0 for tensor in copies.values() if tensor.is_cuda})
    with torch.random.fork_rng(devices):
        before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        try:
            value = run_recipe(recipe, copies, module)
        except Exception as error:  # operators may raise anything
            return Refusal(f"its weight cannot be computed alone: {first_line(error)}")
        after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    if not all(map(torch.equal, before, after)):
        return Refusal("its weight is computed from random numbers")
    fake = any(isinstance(tensor, FakeTensor) for tensor in copies.values())
    if not fake and not all(torch.equal(copies[name], tensors[name]) for name in copies):
        return Refusal("what computes its weight changes its parameters or buffers")
    if (reason := refuse_tensor(value)) is not None:
        return Refusal(reason)
    return value.detach().clone(memory_format=torch.contiguous_format)


def _main(parameters: Mapping[str, Tensor], value: Tensor) -> str | Refusal:
    """Return the name of the parameter that is as large as the weight; refuse if there is none, or several large ones.

    All parameters but this one are kept with their numbers, so they have to be small.
    """
    sizes = {name: tensor.numel() for name, tensor in parameters.items()}
    mains = [name for name, size in sizes.items() if size == value.numel()]
    # those of the weight's own shape come first
    mains.sort(key=lambda name: parameters[name].shape != value.shape)
    if not mains:
        return Refusal("its weight is computed from parameters of other sizes, which could not be restored")
    large = [name for name in sizes if name != mains[0] and sizes[name] > max(_MOST, value.numel() // 2)]
    if large:
        return Refusal(f"its weight is computed from several large parameters: {', '.join([mains[0], *large])}")
    return mains[0]


def _weight_name(main: str) -> str:
    """Return the name of a computed weight, from the name of its main parameter.

    >>> _weight_name("conv.parametrizations.weight.original1"), _weight_name("conv.weight")
    ('conv.weight', 'conv.weight')
    """
    if (match := _PARAMETRIZED.fullmatch(main)) is not None:
        return f"{match[1]}{match[2]}"
    return match[1] if (match := _RAW.fullmatch(main)) is not None else main
