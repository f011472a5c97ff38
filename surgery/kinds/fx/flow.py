"""Make the flow of an fx graph from its reader: the calls, reshapes and sums, and the costs of all other nodes."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from surgery.algebra.operators import Shape
from surgery.algebra.steps import Shift
from surgery.kinds.fx.epilogues import epilogue_of
from surgery.kinds.fx.functional import read_link
from surgery.kinds.fx.macs import macs_of
from surgery.kinds.fx.read import Reader
from surgery.kinds.layers import steps as layers
from surgery.kinds.layers.around import inner_of_chain
from surgery.kinds.layers.edit import Known
from surgery.kinds.layers.modules import called_shape
from surgery.kinds.layers.steps import read_link_module
from surgery.kinds.lazy import Lazy
from surgery.sites.flow import Call, Element, Flow, Layers, ModuleChain, Origin, Other, Reshape, Sum
from surgery.sites.site import Skip

__all__ = ["ChainCall", "Extras", "make_flow"]

_ADDITIONS = (torch.add, python_operator.add, torch.ops.aten.add.Tensor)


@dataclass(frozen=True, eq=False)
class ChainCall:
    """One call of the module of a chain: its node, its input and the module's path."""

    node: Node
    source: Node
    path: str


@dataclass(frozen=True, eq=False)
class Extras:
    """What a kind knows of a model in addition to its graph: chains that are modules, layers, and the record."""

    known: Sequence[Known] = ()
    chain_calls: Sequence[ChainCall] = ()
    broken: tuple[Skip, ...] = ()
    layers: Layers = field(default_factory=Layers)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    recorded: frozenset[str] = frozenset()
    proved: bool = True


def make_flow(reader: Reader, shape: Callable[[Node], Shape], extras: Extras) -> Flow:
    """Return the flow of a graph; ``shape`` gives the shape of a node's value, and is called as late as possible."""
    nodes = list(reader.nodes)
    calls = reader.calls
    # A value is one element: the last value of a call is the call; other values of a call, and nodes that an outline
    # stands for, are Other; all other nodes are looked at.
    taken = {value for call in calls.values() for value in call.values}
    elements: list[Element] = []
    for number, node in enumerate(nodes, reader.start):
        plain = number not in taken and node not in reader.outlined
        elements.append(calls.get(number) or (_element(number, node, reader) if plain else Other(number)))
    numbers = dict(reader.numbers)
    every = range(reader.start, reader.start + len(nodes))

    def node_of(value: int) -> Node:
        return nodes[value - reader.start]

    # shapes and costs may need a run on fake tensors, so they are computed only when they are asked for
    shapes = Lazy(every, lambda value: shape(node_of(value)))
    # a chain that stands as a module is one node in the graph, and its input may be padded or reshaped before the
    # factors
    inside = {numbers[call.node]: call for call in extras.chain_calls}
    modules = {path: known.modules[path] for known in extras.known for path in known.modules}

    def input_shape(value: int) -> Shape:
        if value in inside:
            return _shape_in_chain(modules[inside[value].path], shape(inside[value].source))
        return _shape_in_call(calls[value], reader, shapes[calls[value].source])

    return Flow(
        tuple(elements),
        {number: frozenset(numbers[user] for user in node.users) for number, node in enumerate(nodes, reader.start)},
        reader.tensors,
        shapes,
        Lazy(every, input_shape),
        Lazy(every, lambda value: macs_of(value, node_of(value), reader, shape)),
        Lazy(every, lambda value: node_of(value).name),
        reader.left,
        extras.layers,
        tuple(_module_chain(known, extras.chain_calls, numbers, reader) for known in extras.known),
        extras.broken,
        extras.origins,
        extras.recorded,
        extras.proved,
    )


def _element(number: int, node: Node, reader: Reader) -> Element:
    """Return the element for a node that does not call an operator."""
    source = node.args[0] if node.args else None
    if isinstance(source, Node):
        reshape = partial(Reshape, number, reader.numbers[source])
        if node.op == "call_module" and reader.module is not None:
            path = str(node.target)
            module = reader.module(path)
            # the bias of a chain that ends with a reshape is a module of its own
            if type(module) is layers.Shift:
                return reshape(Shift(module.bias.detach()), path, f"{path}.bias")
            if (step := read_link_module(module)) is not None:
                return reshape(step, path)
        elif node.op == "call_function" and node.target in _ADDITIONS:
            return _addition(number, node, source, reader)
        elif (step := read_link(node)) is not None:
            return reshape(step, reader.owner(node))
    return Other(number, epilogue_of(node, reader.module))


def _addition(number: int, node: Node, first: Node, reader: Reader) -> Element:
    """Return the addition of a parameter with one axis as a reshape (a shift), and any other addition as a sum."""
    second: Any = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if not isinstance(second, Node):
        return Other(number)
    name = reader.providers.get(second)
    # adding a parameter of shape (features,) is the last step of a chain; adding two activations may join branches
    if name is not None and reader.parameters[name].dim() == 1 and first not in reader.providers:
        shift = Shift(reader.parameters[name].detach())
        return Reshape(number, reader.numbers[first], shift, reader.owner(node), name)
    return Sum(number, (reader.numbers[first], reader.numbers[second]))


def _shape_in_call(call: Call, reader: Reader, shape: Shape) -> Shape:
    """Return the shape of the operator's input; a layer that does more than its operator may have another input."""
    module = None if call.path is None or reader.module is None else reader.module(call.path)
    return shape if module is None else called_shape(module, shape)


def _shape_in_chain(module: Any, shape: Shape) -> Shape:
    within = module.surgery_within
    return shape if within is None else inner_of_chain(module, within, shape)


def _module_chain(known: Known, calls: Sequence[ChainCall], numbers: Mapping[Node, int], reader: Reader) -> ModuleChain:
    own = sorted(numbers[call.node] for call in calls if call.path in known.modules)
    first = next((call.path for call in calls if own and numbers[call.node] == own[0]), None)
    chain = known.chain
    return ModuleChain(chain.names, chain.chains, chain.weights, chain.keys, tuple(own), reader.loop(first))
