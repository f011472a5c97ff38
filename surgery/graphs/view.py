"""A read-only view of an fx graph: which nodes call operators, on which parameters, and in which runs.

All graph kinds are analysed through it. Parameters are told apart by the memory that they stand on, so that tied
weights are seen as one whatever their names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from surgery.errors import Refusal
from surgery.graphs.functional import Parts, read_call, transposed_source
from surgery.graphs.modules import is_operator_module, is_outlined, read_module, refuse_module, stored_as
from surgery.operators import Conv, Operator, Shape
from surgery.sites import Site, Skip, describe

__all__ = ["Call", "Spot", "View", "identity", "site_name"]

aten = torch.ops.aten

_KERNEL = (
    "a kernel reads all weights of the recurrent layer; they are not taken apart where others read them too, or where "
    "the program is of that layer alone"
)
_SCAN = "a loop over the steps of a recurrent layer uses it; change the module that the program was exported from"

# functions with weight matrices that are no site, and why
_OTHER_FUNCTIONS: dict[Any, str] = {
    aten.embedding_bag.padding_idx: "bags of embeddings are not handled",
    aten.lstm.input: _KERNEL,
    aten.gru.input: _KERNEL,
    aten.rnn_tanh.input: _KERNEL,
    aten.rnn_relu.input: _KERNEL,
    torch.ops.higher_order.scan: _SCAN,
    aten.bilinear.default: "bilinear maps are not handled yet",
    aten.einsum.default: "einsum on a weight is not handled yet",
    aten.bmm.default: "a batch of weight matrices is not handled yet",
    torch.einsum: "einsum on a weight is not handled yet",
    torch.bmm: "a batch of weight matrices is not handled yet",
}


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common exactly if they are the same memory, seen the same way."""
    pointer = 0 if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()
    if pointer == 0:
        return ("object", id(tensor))
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def site_name(parameter: str) -> str:
    """Return the name of the site of a weight: its path without a final ``.weight``."""
    return parameter.removesuffix(".weight")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator: a module's (``path`` set) or a function's (weight and bias nodes set).

    Where the call is wider than the node that uses the weight, ``inner`` is that node, and ``within`` has it and all
    others before ``node``.
    """

    node: Node
    source: Node
    operator: Operator
    weight: str
    bias: str | None
    stored: str
    path: str | None = None
    weight_node: Node | None = None
    bias_node: Node | None = None
    inner: Node | None = None
    within: tuple[Node, ...] = ()

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
    What the nodes in ``outlined`` compute has an outline, and is not looked at itself.
    """

    graph: Graph
    parameters: Mapping[str, Tensor]
    providers: Mapping[Node, str]
    buffers: frozenset[Node] = frozenset()
    module: Callable[[str], nn.Module] | None = None
    adapt: Callable[[Call], Call | Skip] = lambda call: call
    owner: Callable[[Node], str | None] = lambda node: None
    outlined: frozenset[Node] = frozenset()
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
            found = None if node in self.outlined else self._read(node)
            if isinstance(found, Call):
                found = self.adapt(found)
            if isinstance(found, Call):
                calls.append(found)
            elif isinstance(found, Skip):
                self._skips.setdefault(found.name, found)
        return calls

    def _read(self, node: Node) -> Call | Skip | None:
        if node.op == "call_module":
            return self._read_module(node)
        parts = read_call(node)
        if parts is None:
            return self._read_other(node)
        if isinstance(parts, Refusal):
            return Skip(node.name, str(node.target), parts.reason)
        weight, bias = self.providers.get(parts.weight), None
        if weight is None:
            return self._refuse_weight(node, parts.weight)
        if weight.endswith("in_proj_weight"):
            reason = "attention uses its packed weight (in_proj_weight) in another way than on one input"
            return self._skip(site_name(weight), "Linear", reason, self.parameters[weight])
        if parts.bias is not None:
            bias = self.providers.get(parts.bias)
            if bias is None:
                return self._skip(site_name(weight), str(node.target), "its bias is no parameter", None)
        tensor = None if bias is None else self.parameters[bias].detach()
        operator = parts.build(self.parameters[weight].detach(), tensor)
        if isinstance(operator, Refusal):
            return self._skip(site_name(weight), str(node.target), operator.reason, self.parameters[weight])
        return Call(node, parts.input, operator, weight, bias, parts.stored, None, parts.weight, parts.bias)

    @property
    def packed_calls(self) -> list[Call]:
        """The calls on whole packed projections of attention (in_proj_weight)."""
        found = []
        for node in self.graph.nodes:
            parts = read_call(node)
            weight = self.providers.get(parts.weight) if isinstance(parts, Parts) else None
            if isinstance(parts, Parts) and weight is not None and weight.endswith("in_proj_weight"):
                bias = None if parts.bias is None else self.providers.get(parts.bias)
                operator = parts.build(self.parameters[weight].detach(), None)
                if isinstance(operator, Operator) and (bias is None) == (parts.bias is None):
                    row = (weight, bias, parts.stored, None, parts.weight, parts.bias)
                    found.append(Call(node, parts.input, operator, *row))
        return found

    def _read_module(self, node: Node) -> Call | Skip | None:
        assert self.module is not None  # only graphs with modules have such nodes
        path = str(node.target)
        module = self.module(path)
        if not is_operator_module(module):
            reason = refuse_module(module)
            count = sum(p.numel() for p in module.parameters())
            return None if reason is None else Skip(path, type(module).__name__, reason, count)
        operator = read_module(module)
        if isinstance(operator, Refusal):
            count = sum(p.numel() for p in module.parameters())
            return Skip(path, type(module).__name__, operator.reason, count)
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, Node):
            return None
        bias = None if operator.bias is None else f"{path}.bias"
        return Call(node, source, operator, f"{path}.weight", bias, stored_as(module), path)

    def _read_other(self, node: Node) -> Skip | None:
        reason = _OTHER_FUNCTIONS.get(node.target) if node.op == "call_function" else None
        if reason is None:
            return None
        names = [self.providers[n] for n in node.all_input_nodes if n in self.providers]
        weight = next((name for name in names if self.parameters[name].dim() > 1), None)
        if weight is None:
            return None
        return self._skip(site_name(weight), getattr(node.target, "__name__", str(node.target)), reason, weight)

    def _refuse_weight(self, node: Node, weight: Node) -> Skip | None:
        name = getattr(node.target, "__name__", str(node.target))
        if weight in self.buffers:
            return Skip(node.name, name, "its weight is a buffer or a constant, not a parameter")
        if "conv" in name or "linear" in name:
            return Skip(node.name, name, "its weight is computed by the graph (weight norm, quantization, an adapter)")
        return None  # a product of activations

    def _skip(self, name: str, operator: str, reason: str, weight: str | Tensor | None) -> Skip:
        tensor = self.parameters[weight] if isinstance(weight, str) else weight
        return Skip(name, operator.removeprefix("aten."), reason, 0 if tensor is None else tensor.numel())

    @cached_property
    def uses(self) -> Mapping[tuple[Any, ...], set[Node]]:
        """The nodes that use each parameter, by identity; transposes of a weight are looked through."""
        uses: dict[tuple[Any, ...], set[Node]] = defaultdict(set)
        for node, name in self.providers.items():
            for user in node.users:
                seen = user.users if transposed_source(user) is node else [user]
                uses[identity(self.parameters[name])].update(seen)
        for node in self.graph.nodes:
            if node.op == "call_module" and self.module is not None:
                module = self.module(str(node.target))
                for parameter in () if is_outlined(module) else module.parameters():
                    uses[identity(parameter)].add(node)
        return uses

    def spots(self, shape: Callable[[Node], Shape]) -> tuple[list[Spot], list[Skip]]:
        """Return all sites with their calls, and what was considered and left alone."""
        groups: dict[tuple[Any, ...], list[Call]] = defaultdict(list)
        for call in self.calls:
            groups[identity(self.parameters[call.weight])].append(call)
        skips, spots = list(self._skips.values()), []
        for key, calls in groups.items():
            names = [site_name(name) for name in self.names[key]]
            shapes = tuple(shape(call.source) for call in calls)
            refusal = self._refuse_group(key, calls, shapes)
            operator = calls[0].operator
            if refusal is not None:
                macs = sum(c.operator.macs(s) for c, s in zip(calls, shapes, strict=True))
                name = site_name(calls[0].weight)
                skips.append(Skip(name, describe(operator), refusal.reason, operator.parameters, macs))
            else:
                spots.append(Spot(Site(names[0], operator, shapes, tuple(names[1:])), tuple(calls)))
        return spots, skips

    def _refuse_group(self, key: tuple[Any, ...], calls: list[Call], shapes: Iterable[Shape]) -> Refusal | None:
        first = calls[0]
        strangers = self.uses[key] - {call.user for call in calls}
        if strangers:
            names = ", ".join(sorted(node.name for node in strangers))
            return Refusal(f"its weight is also used by {names}")
        if any(_form(call) != _form(first) for call in calls):
            return Refusal("its weight is shared by calls that differ in more than the bias")
        if not first.operator.weight.dtype.is_floating_point:
            return Refusal(f"its weight is {first.operator.weight.dtype}")
        if any(0 in s for s in shapes):
            return Refusal("it is called on an empty input")
        return None


def _form(call: Call) -> tuple[Any, ...]:
    """Everything but the tensors: what calls must have in common to share one chain."""
    operator = call.operator
    conv = (operator.geometry, operator.groups) if isinstance(operator, Conv) else ()
    return (type(operator), *conv, call.stored, call.path is None, operator.bias is None)
