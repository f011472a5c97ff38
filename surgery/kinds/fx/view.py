"""A read-only view of an fx graph: which nodes call operators, on which parameters, and in which runs.

All graph kinds are analysed through it. Parameters are told apart by the memory that they stand on, so that tied
weights are seen as one whatever their names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy

from surgery.algebra.operators import Conv, Layout, Operator, Shape
from surgery.errors import Refusal
from surgery.kinds.fx.functional import Parts, read_call, transposed_source
from surgery.kinds.fx.lifted import Lifted
from surgery.kinds.fx.unhandled import function_name, is_region, looked_through, refuse_use
from surgery.kinds.layers.modules import (
    is_operator_module,
    is_outlined,
    read_module,
    refuse_module,
    stored_as,
    weight_path,
)
from surgery.kinds.layers.tensors import count, memory, refuse_tensor
from surgery.sites.site import Site, Skip, describe

__all__ = ["Call", "Spot", "View", "identity", "site_name"]


# what the parameter with a weight's numbers is called: as such, and by torch's weight norm and parametrizations
_PARAMETRIZED = (".parametrizations.weight.original", ".parametrizations.weight.original1")
_WEIGHTS = (".weight", ".weight_v", ".weight_orig", *_PARAMETRIZED)


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common exactly if they are the same memory, seen the same way."""
    pointer = memory(tensor)
    if pointer == 0:
        return ("object", id(tensor))
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def site_name(parameter: str) -> str:
    """Return the name of the site of a weight: its path without a final ``.weight``, or what torch computes it from."""
    for suffix in _WEIGHTS:
        if parameter.endswith(suffix):
            return parameter.removesuffix(suffix)
    return parameter


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator: a module's (``path`` set) or a function's (weight and bias nodes set).

    Where the graph computes the bias, ``bias_node`` alone is set, and the operator is one without a bias.
    Where the call is wider than the node that uses the weight, ``inner`` is that node, and ``within`` has it and all
    others before ``node``.
    """

    node: Node
    source: Node
    operator: Operator
    weight: str
    bias: str | None
    stored: Layout
    path: str | None = None
    weight_node: Node | None = None
    bias_node: Node | None = None
    inner: Node | None = None
    within: tuple[Node, ...] = ()

    @property
    def computed_bias(self) -> Node | None:
        """The node of a bias that the graph computes; None where the bias is a parameter, or there is none."""
        return self.bias_node if self.bias is None else None

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the call as an item of a run."""
        return (*self.within, self.node)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Itself: what an item of a run has of calls."""
        return (self,)

    @property
    def step(self) -> Operator:
        """The operator as a step of a chain."""
        return self.operator

    @property
    def user(self) -> Node:
        """The node that uses the weight."""
        return self.inner or self.node


@dataclass(frozen=True, eq=False)
class Spot:
    """A site with its calls in the graph."""

    site: Site
    calls: tuple[Call, ...]

    @property
    def first(self) -> Node:
        """The first node with its weight."""
        return self.calls[0].node


@dataclass(frozen=True, eq=False)
class View:
    """An fx graph with what its nodes stand for.

    ``parameters`` has every name, aliases of tied weights included; ``providers`` maps nodes to parameter names;
    ``buffers`` are nodes that provide buffers or constants; ``module`` resolves call_module nodes; ``adapt`` may
    turn a call into another or refuse it; ``owner`` has the path of the module that a link's function call stands for.
    What the nodes in ``outlined`` compute has an outline, and is not looked at itself. ``lifted`` are the weights that
    the graph computes and that stand among the parameters, by name; ``refused`` says why others do not, by node. The
    calls in ``given`` are known already, by their last nodes; ``skipped`` has the nodes of each skip.
    """

    graph: Graph
    parameters: Mapping[str, Tensor]
    providers: Mapping[Node, str]
    buffers: frozenset[Node] = frozenset()
    module: Callable[[str], nn.Module] | None = None
    adapt: Callable[[Call], Call | Skip] = lambda call: call
    owner: Callable[[Node], str | None] = lambda node: None
    outlined: frozenset[Node] = frozenset()
    lifted: Mapping[str, Lifted] = field(default_factory=dict)
    refused: Mapping[Node, str] = field(default_factory=dict)
    given: Mapping[Node, Call] = field(default_factory=dict)
    skipped: dict[str, list[Node]] = field(default_factory=lambda: defaultdict(list))
    _skips: dict[str, Skip] = field(default_factory=dict)

    @cached_property
    def names(self) -> Mapping[tuple[Any, ...], list[str]]:
        """All names of each parameter, by identity, in the order of the state dict."""
        names: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, tensor in self.parameters.items():
            names[identity(tensor)].append(name)
        return names

    @cached_property
    def calls(self) -> list[Call]:
        """All operator calls in graph order, before weights are looked at for other uses."""
        calls = []
        for node in self.graph.nodes:
            found: Call | Skip | Iterable[Skip] = self.given.get(node, ())
            if node not in self.outlined:
                found = self._read(node)
            if isinstance(found, Call):
                found = self.adapt(found)
            if isinstance(found, Call):
                calls.append(found)
                continue
            for skip in (found,) if isinstance(found, Skip) else found:
                self._skips.setdefault(skip.name, skip)
                self.skipped[skip.name].append(node)
        return calls

    def _read(self, node: Node) -> Call | Iterable[Skip]:
        if node.op == "call_module":
            return self._read_module(node)
        parts = read_call(node)
        if isinstance(parts, Parts):
            return self._read_parts(node, parts)
        if isinstance(parts, Refusal):
            return self._skips_of(node, parts.reason) or (Skip(node.name, function_name(node), parts.reason),)
        reason = refuse_use(node)
        return () if reason is None else self._skips_of(node, reason)

    def _read_parts(self, node: Node, parts: Parts) -> Call | Iterable[Skip]:
        weight = self.providers.get(parts.weight)
        if weight is None:
            return self._refuse_weight(node, parts.weight)
        operator: Operator | Refusal
        if weight.endswith("in_proj_weight"):
            operator = Refusal("attention uses its packed weight (in_proj_weight) in another way than on one input")
        else:
            operator = self._build(parts)
        if isinstance(operator, Refusal):
            return (self._skip(weight, node, operator.reason),)
        return self._call(node, parts, operator)

    def _call(self, node: Node, parts: Parts, operator: Operator) -> Call:
        bias = None if parts.bias is None else self.providers.get(parts.bias)
        row = (self.providers[parts.weight], bias, parts.stored, None, parts.weight, parts.bias)
        return Call(node, parts.input, operator, *row)

    def _build(self, parts: Parts) -> Operator | Refusal:
        """Return the operator of a call whose weight is a parameter; without a bias that the graph computes."""
        weight = self.parameters[self.providers[parts.weight]]
        if (reason := refuse_tensor(weight)) is not None:
            return Refusal(reason)
        if parts.bias is None:
            return parts.build(weight.detach(), None)
        if parts.bias not in self.providers:
            return parts.build(weight.detach(), None)
        bias = self.parameters[self.providers[parts.bias]]
        reason = refuse_tensor(bias, "bias")
        return parts.build(weight.detach(), bias.detach()) if reason is None else Refusal(reason)

    @property
    def packed_calls(self) -> list[Call]:
        """The calls on whole packed projections of attention (in_proj_weight)."""
        found = []
        for node in self.graph.nodes:
            parts = read_call(node)
            if isinstance(parts, Parts) and self.providers.get(parts.weight, "").endswith("in_proj_weight"):
                operator = self._build(parts)
                if isinstance(operator, Operator):
                    found.append(self._call(node, parts, operator))
        return found

    def _read_module(self, node: Node) -> Call | Iterable[Skip]:
        assert self.module is not None  # only graphs with modules have such nodes
        path = str(node.target)
        module = self.module(path)
        operator = _operator_of(module)
        if isinstance(operator, Refusal):
            return (Skip(path, type(module).__name__, operator.reason, count(module)),)
        source = node.args[0] if node.args else node.kwargs.get("input")
        if operator is None or not isinstance(source, Node):
            return ()
        bias = None if operator.bias is None else f"{path}.bias"
        return Call(node, source, operator, f"{path}.{weight_path(module)}", bias, stored_as(type(module)), path)

    def _refuse_weight(self, node: Node, weight: Node) -> Iterable[Skip]:
        """Return the skips of an operator whose weight is no parameter; none of a product of activations."""
        name = function_name(node)
        if weight in self.refused:
            reason = self.refused[weight]
            return self._skips_of(node, reason) or (Skip(node.name, name, reason),)
        if weight in self.buffers:
            return (Skip(node.name, name, "its weight is a buffer or a constant, not a parameter"),)
        if "conv" in name or "linear" in name:
            reason = "its weight is computed by the graph from its inputs, or from buffers (quantization)"
            return (Skip(node.name, name, reason),)
        return self._skips_of(node, refuse_use(node) or "it is looked up in another way than by a layer")

    def _skips_of(self, node: Node, reason: str) -> Sequence[Skip]:
        """Return a skip for each weight matrix that a node is given."""
        return [self._skip(name, node, reason) for name in self._weights_of(node)]

    def _weights_of(self, node: Node) -> list[str]:
        """Name the parameters with two axes or more that reach a node, whole or in part, or that its own graph has."""
        found = [self.providers[n] for n in map(looked_through, node.all_input_nodes) if n in self.providers]
        names = [*found, *(self._own_weights(node) if is_region(node) else ())]
        return [
            name for name in dict.fromkeys(names) if is_lazy(self.parameters[name]) or self.parameters[name].dim() > 1
        ]

    def _own_weights(self, region: Node) -> list[str]:
        """Name the parameters of the graphs that a region runs, where these hold some."""
        graphs = [f"{node.target}." for node in region.all_input_nodes if node.op == "get_attr"]
        return [name for name in self.parameters if name.startswith(tuple(graphs))]

    def _skip(self, weight: str, node: Node, reason: str) -> Skip:
        return Skip(site_name(weight), function_name(node), reason, count([self.parameters[weight]]))

    @cached_property
    def uses(self) -> Mapping[tuple[Any, ...], set[Node]]:
        """The nodes that use each parameter, by identity; transposes of a weight are looked through."""
        uses: dict[tuple[Any, ...], set[Node]] = defaultdict(set)
        for node, name in self.providers.items():
            for user in node.users:
                seen = user.users if transposed_source(user) is node else [user]
                uses[identity(self.parameters[name])].update(seen)
        for node in self.graph.nodes:
            for parameter in self._held_by(node):
                uses[identity(parameter)].add(node)
        return uses

    def _held_by(self, node: Node) -> Iterable[Tensor]:
        """Return the parameters that a node uses without a node that provides them."""
        if is_region(node):
            return [self.parameters[name] for name in self._own_weights(node)]
        if node.op != "call_module" or self.module is None:
            return ()
        module = self.module(str(node.target))
        return () if is_outlined(module) else module.parameters()

    def spots(self, shape: Callable[[Node], Shape]) -> tuple[list[Spot], list[Skip]]:
        """Return all sites with their calls, and what was considered and left alone."""
        groups: dict[tuple[Any, ...], list[Call]] = defaultdict(list)
        for call in self.calls:
            groups[identity(self.parameters[call.weight])].append(call)
        listed = {site_name(name) for key in groups for name in self.names[key]}
        skips, spots = [skip for skip in self._skips.values() if skip.name not in listed], []
        for key, calls in groups.items():
            names = [site_name(name) for name in self.names[key]]
            shapes = tuple(shape(call.source) for call in calls)
            refusal = self._refuse_group(key, calls, shapes) or _refuse_biases(calls, shape)
            operator = calls[0].operator
            if refusal is not None:
                macs = sum(c.operator.macs(s) for c, s in zip(calls, shapes, strict=True))
                name = site_name(calls[0].weight)
                skips.append(Skip(name, describe(operator), refusal.reason, operator.parameters, macs))
            else:
                surplus = self.lifted[calls[0].weight].surplus if calls[0].weight in self.lifted else 0
                site = Site(names[0], operator, shapes, tuple(names[1:]), surplus=surplus)
                spots.append(Spot(site, tuple(calls)))
        return spots, skips

    def _refuse_group(self, key: tuple[Any, ...], calls: list[Call], shapes: Iterable[Shape]) -> Refusal | None:
        first = calls[0]
        strangers = self.uses[key] - {call.user for call in calls} - {node for call in calls for node in call.within}
        if strangers:
            names = ", ".join(sorted(node.name for node in strangers))
            return Refusal(f"its weight is also used by {names}")
        if any(_form(call) != _form(first) for call in calls):
            return Refusal("its weight is shared by calls that differ in more than the bias")
        if any(0 in s for s in shapes):
            return Refusal("it is called on an empty input")
        return None


def _refuse_biases(calls: Iterable[Call], shape: Callable[[Node], Shape]) -> Refusal | None:
    """Refuse a computed bias that is another thing than one number for each output."""
    for call in calls:
        node = call.computed_bias
        if node is not None and (found := shape(node)) != (call.operator.out_channels,):
            says = ",".join(map(str, found))
            return Refusal(f"its bias is computed by the graph, of shape ({says}), not one number for each output")
    return None


def _operator_of(module: nn.Module) -> Operator | Refusal | None:
    """Return the operator that a module is, or why it is none; None for modules without weight matrices."""
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


def _form(call: Call) -> tuple[Any, ...]:
    """Everything but the tensors: what calls must have in common to share one chain."""
    operator = call.operator
    conv = (operator.geometry, operator.groups) if isinstance(operator, Conv) else ()
    return (type(operator), *conv, call.stored, call.path is None, operator.bias is None)
