"""Read an fx graph: which nodes call operators, and on which parameters. A value's number is the place of its node.

All of torch's kinds of models are read through a ``Reader``. Parameters are identified by their memory, so that tied
weights are one parameter, whatever their names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy

from surgery.algebra import Operator
from surgery.errors import Refusal
from surgery.kinds.fx.functional import CallParts, read_call, transposed_source
from surgery.kinds.fx.nodes import function_name, is_region, looked_through, refuse_use
from surgery.kinds.fx.recipe import Lifted
from surgery.kinds.layers.modules import (
    is_operator_module,
    is_outlined,
    read_module,
    refuse_module,
    stored_as,
    weight_path,
)
from surgery.kinds.layers.tensors import count, key_of, refuse_tensor
from surgery.kinds.layers.unpacking import is_packed
from surgery.kinds.layers.within import Within, within_of
from surgery.sites import Call, Left, Loop, Skip, Tensors, site_name

__all__ = ["Reader"]


def _same(call: Call, reader: Reader) -> Call | Skip:
    return call


def _no_loop(path: str | None) -> Loop | None:
    return None


def _no_owner(node: Node) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Reader:
    """An fx graph together with the meaning of its nodes.

    ``parameters`` has every name, including aliases of tied weights. ``providers`` maps nodes to parameter names;
    ``buffers`` are the nodes that provide buffers or constants. ``module`` returns the module at the path of a
    call_module node. ``adapt`` may replace or refuse a call. ``owner`` returns the path of the module whose reshape a
    function call is, and ``loop`` the recurrent loop around the module at a path. Nodes in ``outlined`` are skipped,
    because an outline is read in their place. ``lifted`` are the computed weights that count as parameters, by name,
    and ``refused`` says why other computed weights do not, by node. ``given`` returns calls that need not be read.
    Values are numbered from ``start``, so that they keep their numbers when a changed graph is read again.
    """

    graph: Graph
    parameters: Mapping[str, Tensor]
    providers: Mapping[Node, str]
    buffers: frozenset[Node] = frozenset()
    module: Callable[[str], nn.Module] | None = None
    adapt: Callable[[Call, Reader], Call | Skip] = _same
    owner: Callable[[Node], str | None] = _no_owner
    loop: Callable[[str | None], Loop | None] = _no_loop
    outlined: frozenset[Node] = frozenset()
    lifted: Mapping[str, Lifted] = field(default_factory=dict)
    refused: Mapping[Node, str] = field(default_factory=dict)
    given: Callable[[Reader], Mapping[int, Call]] = lambda reader: {}
    start: int = 0

    @cached_property
    def nodes(self) -> list[Node]:
        """The nodes in order; a node that replaces another takes its place."""
        return list(self.graph.nodes)

    @cached_property
    def original(self) -> tuple[Node, ...]:
        """The nodes in order, as they were when the graph was read."""
        return tuple(self.graph.nodes)

    def settle(self) -> None:
        """Read now what depends on the nodes as they are, before any of them is replaced."""
        _ = self.original, self.numbers, self.uses

    @cached_property
    def numbers(self) -> dict[Node, int]:
        """The number of each node's value."""
        return {node: number for number, node in enumerate(self.nodes, self.start)}

    def node(self, value: int) -> Node:
        """Return the node that gives a value."""
        return self.nodes[value - self.start]

    def replaced(self, old: Node, new: Node) -> None:
        """Let a new node give the value that an old node gave."""
        number = self.numbers.pop(old, None)
        if number is not None:
            self.nodes[number - self.start] = new
            self.numbers[new] = number

    @cached_property
    def names(self) -> Mapping[tuple[Any, ...], list[str]]:
        """All names of each parameter, by key, in the order of the state dict."""
        names: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, tensor in self.parameters.items():
            names[key_of(tensor)].append(name)
        return names

    @cached_property
    def calls(self) -> Mapping[int, Call]:
        """All calls of operators by value, in order, whether or not something else uses their weights too."""
        return self._read_all[0]

    @cached_property
    def left(self) -> tuple[Left, ...]:
        """The skips, with the values that they are about."""
        return self._read_all[1]

    @cached_property
    def given_calls(self) -> Mapping[int, Call]:
        """The calls that need not be read, by value."""
        return self.given(self)

    @cached_property
    def _read_all(self) -> tuple[dict[int, Call], tuple[Left, ...]]:
        calls: dict[int, Call] = {}
        skips: dict[str, Skip] = {}
        values: dict[str, list[int]] = defaultdict(list)
        for number, node in enumerate(list(self.nodes), self.start):
            # a node gives a call, or skips for the weights that it reads; several nodes may give a skip of the same
            # name, which is reported once with the values of all of them
            found: Call | Skip | Iterable[Skip] = self.given_calls.get(number, ())
            if node not in self.outlined:
                found = self._read(node)
            if isinstance(found, Call):
                found = self.adapt(found, self)
            if isinstance(found, Call):
                calls[found.value] = self._placed(found)
                continue
            for skip in (found,) if isinstance(found, Skip) else found:
                skips.setdefault(skip.name, skip)
                values[skip.name].append(number)
        return calls, tuple(Left(skip, tuple(values[name])) for name, skip in skips.items())

    def _placed(self, call: Call) -> Call:
        """Return a call with what surrounds it: the loop of a recurrent layer, or a layer that does more."""
        if call.path is None or self.module is None:
            return call
        within = within_of(self.module(call.path))
        if isinstance(within, Within):
            call = replace(call, last=within.ends, surplus=within.extra)
        return replace(call, loop=self.loop(call.path))

    def _read(self, node: Node) -> Call | Iterable[Skip]:
        if node.op == "call_module":
            return self._read_module(node)
        parts = read_call(node)
        if isinstance(parts, CallParts):
            return self._read_parts(node, parts)
        if isinstance(parts, Refusal):
            return self._skips_of(node, parts.reason) or (Skip(node.name, function_name(node), parts.reason),)
        reason = refuse_use(node)
        return () if reason is None else self._skips_of(node, reason)

    def _read_parts(self, node: Node, parts: CallParts) -> Call | Iterable[Skip]:
        weight = self.providers.get(parts.weight)
        if weight is None:
            return self._refuse_weight(node, parts.weight)
        operator: Operator | Refusal
        # packed projections that can be unpacked were unpacked before; the ones that are left are used in other ways
        if is_packed(weight):
            operator = Refusal("attention does not use its packed weight (in_proj_weight) in one product on one input")
        else:
            operator = self._build(parts)
        if isinstance(operator, Refusal):
            return (self._skip(weight, node, operator.reason),)
        return self._call(node, parts, operator)

    def _call(self, node: Node, parts: CallParts, operator: Operator) -> Call:
        bias = None if parts.bias is None else self.providers.get(parts.bias)
        lifted = self.lifted.get(self.providers[parts.weight])
        return Call(
            self.numbers[node],
            self.numbers[parts.input],
            operator,
            self.providers[parts.weight],
            bias,
            parts.stored,
            computed_bias=None if parts.bias is None or bias is not None else self.numbers[parts.bias],
            surplus=0 if lifted is None else lifted.surplus,
        )

    def _build(self, parts: CallParts) -> Operator | Refusal:
        """Return the operator of a call whose weight is a parameter; a bias that the graph computes is left out."""
        weight = self.parameters[self.providers[parts.weight]]
        if (reason := refuse_tensor(weight)) is not None:
            return Refusal(reason)
        # a computed bias stays a node of the graph; it becomes part of no operator
        if parts.bias is None or parts.bias not in self.providers:
            return parts.build(weight.detach(), None)
        bias = self.parameters[self.providers[parts.bias]]
        reason = refuse_tensor(bias, "bias")
        return parts.build(weight.detach(), bias.detach()) if reason is None else Refusal(reason)

    @property
    def packed_calls(self) -> list[Call]:
        """The calls that use the whole packed projection of attention (in_proj_weight)."""
        found = []
        for node in self.nodes:
            parts = read_call(node)
            if isinstance(parts, CallParts) and is_packed(self.providers.get(parts.weight, "")):
                operator = self._build(parts)
                if isinstance(operator, Operator):
                    found.append(self._call(node, parts, operator))
        return found

    def _read_module(self, node: Node) -> Call | Iterable[Skip]:
        assert self.module is not None  # only graphs with modules have such nodes
        path = str(node.target)
        module = self.module(path)
        # a module's operator comes from the module, since its call node has no arguments but the input
        operator = _operator_of(module)
        if isinstance(operator, Refusal):
            return (Skip(path, type(module).__name__, operator.reason, count(module)),)
        source = node.args[0] if node.args else node.kwargs.get("input")
        if operator is None or not isinstance(source, Node):
            return ()
        bias = None if operator.bias is None else f"{path}.bias"
        weight, stored = f"{path}.{weight_path(module)}", stored_as(type(module))
        return Call(self.numbers[node], self.numbers[source], operator, weight, bias, stored, path)

    def _refuse_weight(self, node: Node, weight: Node) -> Iterable[Skip]:
        """Return the skips for an operator whose weight is not a parameter; a product of activations has none."""
        name = function_name(node)
        if weight in self.refused:
            reason = self.refused[weight]
            return self._skips_of(node, reason) or (Skip(node.name, name, reason),)
        if weight in self.buffers:
            return (Skip(node.name, name, "its weight is a buffer or a constant, not a parameter"),)
        # a product of two activations, as in attention, is not worth a skip; a convolution or a linear layer is
        if "conv" in name or "linear" in name:
            reason = "its weight is computed by the graph from its inputs, or from buffers (quantization)"
            return (Skip(node.name, name, reason),)
        return self._skips_of(node, refuse_use(node) or "it is used, but not as the weight of a layer")

    def _skips_of(self, node: Node, reason: str) -> Sequence[Skip]:
        """Return a skip for each weight matrix that a node reads."""
        return [self._skip(name, node, reason) for name in self._weights_of(node)]

    def _weights_of(self, node: Node) -> list[str]:
        """Return the names of the parameters with two axes or more that a node or its own graph reads, even in part."""
        found = [self.providers[n] for n in map(looked_through, node.all_input_nodes) if n in self.providers]
        names = [*found, *(self._own_weights(node) if is_region(node) else ())]
        return [
            name for name in dict.fromkeys(names) if is_lazy(self.parameters[name]) or self.parameters[name].dim() > 1
        ]

    def _own_weights(self, region: Node) -> list[str]:
        """Return the names of the parameters that the graphs inside a region hold."""
        graphs = [f"{node.target}." for node in region.all_input_nodes if node.op == "get_attr"]
        return [name for name in self.parameters if name.startswith(tuple(graphs))]

    def _skip(self, weight: str, node: Node, reason: str) -> Skip:
        return Skip(site_name(weight), function_name(node), reason, count([self.parameters[weight]]))

    @cached_property
    def uses(self) -> Mapping[tuple[Any, ...], frozenset[Node]]:
        """The nodes that use each parameter, by key; the users of a transposed weight count as users of the weight."""
        uses: dict[tuple[Any, ...], set[Node]] = defaultdict(set)
        for node, name in self.providers.items():
            for user in node.users:
                # linear(x, w.t()) has a node between the weight and the call that reads it
                seen = user.users if transposed_source(user) is node else [user]
                uses[key_of(self.parameters[name])].update(seen)
        for node in self.graph.nodes:
            # modules and regions read their parameters without a node in this graph
            for parameter in self._held_by(node):
                uses[key_of(parameter)].add(node)
        return {key: frozenset(nodes) for key, nodes in uses.items()}

    def _held_by(self, node: Node) -> Iterable[Tensor]:
        """Return the parameters that a node uses by itself, without a node that provides them."""
        if is_region(node):
            return [self.parameters[name] for name in self._own_weights(node)]
        if node.op != "call_module" or self.module is None:
            return ()
        module = self.module(str(node.target))
        return () if is_outlined(module) else module.parameters()

    @cached_property
    def tensors(self) -> Tensors:
        """The parameters as plain values."""
        return Tensors(
            {name: key_of(tensor) for name, tensor in self.parameters.items()},
            {name: count([tensor]) for name, tensor in self.parameters.items()},
            {key: frozenset(self.numbers[node] for node in nodes) for key, nodes in self.uses.items()},
            frozenset(self.lifted),
            sum(lifted.surplus for lifted in self.lifted.values()),
        )


def _operator_of(module: nn.Module) -> Operator | Refusal | None:
    """Return the operator of a module, or why it is not an operator; None for modules without weight matrices."""
    lazy = [parameter for parameter in module.parameters() if is_lazy(parameter)]
    if lazy:
        return Refusal(str(refuse_tensor(lazy[0])))
    if is_operator_module(module):
        return _refuse_tensors(module) or read_module(module)
    reason = refuse_module(module)
    return None if reason is None else Refusal(reason)


def _refuse_tensors(module: nn.Module) -> Refusal | None:
    for what in ("weight", "bias"):
        tensor = module._parameters.get(what)
        reason = None if tensor is None else refuse_tensor(tensor, what)
        if reason is not None:
            return Refusal(reason)
    return None
