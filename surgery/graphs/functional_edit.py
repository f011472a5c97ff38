"""Edits of function calls in an fx graph, for all graph kinds that have them.

A kind says how a parameter is added, given to a node, and dropped; the rest is the same for get_attr and placeholder
graphs. The factors of site P are named P.0.weight, P.1.weight, ...; the bias P.bias moves along to the last of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from surgery.chain import Chain
from surgery.graphs.functional import Parts, read_call, stored_weight, transposed_source, write_call
from surgery.graphs.kind import GraphKind, Run
from surgery.graphs.view import Call, Spot, identity
from surgery.operators import Operator

__all__ = ["FunctionalKind", "current_source", "read_record", "write_record"]


def read_record(module: GraphModule) -> dict[str, Any]:
    """Return a copy of the record: for each factored site, what its weight was called."""
    record = module.meta.get("surgery", {})
    return dict(record.get("sites", {})) if isinstance(record, dict) else {}


def write_record(module: GraphModule, sites: dict[str, Any]) -> None:
    """Store the record where ``surgery.save`` finds it; an empty one is no record."""
    module.meta.pop("surgery", None)
    if sites:
        module.meta["surgery"] = {"version": 1, "sites": sites}


def current_source(call: Call) -> Node:
    """Return the input of a call as the graph has it now, after earlier edits."""
    if call.path is not None:
        source = call.node.args[0] if call.node.args else call.node.kwargs["input"]
        assert isinstance(source, Node)  # the view has seen it
        return source
    parts = read_call(call.node)
    assert isinstance(parts, Parts)  # likewise
    return parts.input


class FunctionalKind(GraphKind):
    """Base of the kinds whose function calls are rewritten."""

    graph: Graph
    record: dict[str, Any]

    @property
    def recorded(self) -> frozenset[str]:
        """The sites that decompose has factored, by the record."""
        return frozenset(self.record)

    @abstractmethod
    def add_parameter(self, names: Sequence[str], tensor: Tensor, *, trains: bool) -> None:
        """Add one parameter under all its names."""

    @abstractmethod
    def parameter_node(self, name: str, user: Node) -> Node:
        """Return a node that provides a parameter, placed so that it comes before ``user``."""

    @abstractmethod
    def drop_parameter(self, name: str) -> None:
        """Forget a parameter; the nodes that provided it are swept when nothing uses them."""

    def stamp(self, node: Node, like: Node) -> None:
        """Give a new node the metadata of the one that it stands for."""
        node.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "example_value")}

    def splice_functions(self, spot: Spot, chain: Chain) -> None:
        """Replace each call of a site by the calls of its chain."""
        weights = self._replace_weight(spot, chain)
        moved: dict[tuple[Any, ...], str] = {}
        last = len(chain.operators) - 1
        for call in spot.calls:
            bias = self._move_bias(call, spot.calls, last, moved)
            node = current_source(call)
            for i, (operator, weight) in enumerate(zip(chain.operators, weights, strict=True)):
                stored = call.stored if i == last else "out_in"
                node = self._insert(
                    operator, node, (weight, bias if i == last else None), like=call.node, stored=stored
                )
            self.replace(call.node, node)
        self._sweep()

    def _replace_weight(self, spot: Spot, chain: Chain) -> list[str]:
        """Drop the weight, add those of the factors, and record what the weight was called."""
        sites = (spot.site.name, *spot.site.aliases)
        first, last = spot.calls[0], len(chain.operators) - 1
        old = self.view.parameters[first.weight]
        for site, name in zip(sites, self.view.names[identity(old)], strict=True):
            self.record[site] = {"weight": name}
            self.drop_parameter(name)
        for i, operator in enumerate(chain.operators):
            tensor = stored_weight(operator, first.stored if i == last else "out_in")
            self.add_parameter([f"{site}.{i}.weight" for site in sites], tensor, trains=old.requires_grad)
        return [f"{sites[0]}.{i}.weight" for i in range(last + 1)]

    def _move_bias(
        self, call: Call, calls: Sequence[Call], index: int, moved: dict[tuple[Any, ...], str]
    ) -> str | None:
        """Rename P.bias to P.<index>.bias, unless something else uses it as well."""
        if call.bias is None:
            return None
        tensor = self.view.parameters[call.bias]
        key = identity(tensor)
        names = self.view.names[key]
        if self._has_strangers(tensor, calls) or not all(name.endswith(".bias") for name in names):
            return call.bias
        if key not in moved:
            self._retire(call.bias, calls)
            new = [f"{name.removesuffix('.bias')}.{index}.bias" for name in names]
            self.add_parameter(new, tensor, trains=tensor.requires_grad)
            moved[key] = new[0]
        return moved[key]

    def put_back_functions(self, run: Run) -> None:
        """Replace the calls of a run, and of its twins, by one call each."""
        recorded = [self.record.pop(site, {}) for site in run.sites]
        weights = [entry.get("weight") or f"{site}.weight" for site, entry in zip(run.sites, recorded, strict=True)]
        every = [call for calls in run.calls for call in calls]
        kept = {calls[-1].bias for calls in run.calls if self._keeps_bias(calls, every, run.sites[0])}
        for call in every:
            self._retire(call.weight, every)
            if call.bias is not None and call.bias not in kept:
                self._retire(call.bias, every)
        stored, trains = every[-1].stored, self.view.parameters[every[0].weight].requires_grad
        self.add_parameter(weights, stored_weight(run.operators[0], stored), trains=trains)
        moved: dict[tuple[Any, ...], str] = {}
        for calls, operator in zip(run.calls, run.operators, strict=True):
            own = calls[-1].bias
            bias = own if own in kept else self._add_bias(calls, operator, run.sites[0], moved)
            like = calls[-1].node
            node = self._insert(operator, current_source(calls[0]), (weights[0], bias), like=like, stored=stored)
            self.replace(like, node)
            for call in reversed(calls[:-1]):
                self.graph.erase_node(call.node)
        self._sweep()

    def _retire(self, name: str, calls: Sequence[Call]) -> None:
        """Drop a parameter under all its names, unless others than these calls use it."""
        tensor = self.view.parameters[name]
        if not self._has_strangers(tensor, calls):
            for alias in self.view.names[identity(tensor)]:
                self.drop_parameter(alias)

    def _keeps_bias(self, calls: Sequence[Call], every: Sequence[Call], site: str) -> bool:
        """Whether the last call's bias goes on under its own name: others use it, or decompose never moved it."""
        own = calls[-1].bias
        if own is None or any(call.bias is not None for call in calls[:-1]):
            return False
        factored = f"{site}.0.weight" in self.view.parameters
        return self._has_strangers(self.view.parameters[own], every) or (
            factored and not own.endswith(f".{len(calls) - 1}.bias")
        )

    def _add_bias(
        self, calls: Sequence[Call], operator: Operator, site: str, moved: dict[tuple[Any, ...], str]
    ) -> str | None:
        """Add the composed bias as P.bias, once for calls that share it."""
        if operator.bias is None:
            return None
        tensors = [self.view.parameters[call.bias] for call in calls if call.bias is not None]
        key = tuple(identity(tensor) for tensor in tensors)
        if key not in moved:
            suffix = f".{len(calls) - 1}.bias"
            names = [name for name in self.view.names[key[-1]] if len(key) == 1 and name.endswith(suffix)]
            new = [f"{name.removesuffix(suffix)}.bias" for name in names] or [f"{site}.bias"]
            self.add_parameter(new, operator.bias, trains=tensors[-1].requires_grad)
            moved[key] = new[0]
        return moved[key]

    def _has_strangers(self, tensor: Tensor, calls: Sequence[Call]) -> bool:
        return bool(self.view.uses[identity(tensor)] - {call.user for call in calls})

    def _insert(
        self, operator: Operator, source: Node, names: tuple[str, str | None], *, like: Node, stored: str
    ) -> Node:
        weight, bias = (None if name is None else self.parameter_node(name, like) for name in names)
        assert weight is not None  # names[0] is a str
        with self.graph.inserting_before(like):
            node = write_call(self.graph, operator, source=source, weight=weight, bias=bias, style=like, stored=stored)
        self.stamp(node, like)
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let a new node take the place of an old one."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _sweep(self) -> None:
        """Erase the nodes that provide dropped parameters, and their transposes."""
        for node in reversed(list(self.graph.nodes)):
            origin = transposed_source(node) or node
            if not node.users and self.is_dropped(origin):
                self.graph.erase_node(node)

    @abstractmethod
    def is_dropped(self, node: Node) -> bool:
        """Whether the node provides a parameter that has been dropped."""
