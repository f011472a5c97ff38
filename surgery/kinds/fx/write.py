"""Edits of function calls in an fx graph, for all graph kinds that have them.

A kind says how a parameter is added, given to a node, and dropped; the rest is the same for get_attr and placeholder
graphs. The factors of site P are named P.0.weight, P.1.weight, ...; the bias P.bias moves along to the last of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Layout, Operator
from surgery.algebra.steps import Branches, Link, Shift, Step
from surgery.kinds.fx.chains import ChainSpot, Origin
from surgery.kinds.fx.computed_kind import ComputedKind
from surgery.kinds.fx.functional import is_aten, stored_weight, transposed_source, write_call
from surgery.kinds.fx.items import Item, LinkCall, all_calls
from surgery.kinds.fx.lifted import keep
from surgery.kinds.fx.links import write_link
from surgery.kinds.fx.nodes import (
    added_bias,
    biases_of,
    current_bias,
    current_source,
    erase,
    erase_unused,
    first_node,
    first_source,
    last_place,
    read_origin,
    through_transpose,
)
from surgery.kinds.fx.put_back import put_back_computed
from surgery.kinds.fx.runs import Run
from surgery.kinds.fx.view import Call, Spot, View, identity
from surgery.kinds.layers.edit import Shared

__all__ = ["FunctionalKind", "current_source", "erase", "first_source", "read_record", "write_record"]


# the weight and the bias at each place of a chain, by name; a bias that the graph computes is a node
_Names: TypeAlias = Mapping[str, tuple[str, str | Node | None]]


def read_record(module: GraphModule) -> dict[str, Any]:
    """Return a copy of the record: for each factored site, what its weight was called."""
    record = module.meta.get("surgery", {})
    return dict(record.get("sites", {})) if isinstance(record, dict) else {}


def write_record(module: GraphModule, sites: dict[str, Any]) -> None:
    """Store the record where ``surgery.save`` finds it; an empty one is no record."""
    module.meta.pop("surgery", None)
    if sites:
        module.meta["surgery"] = {"version": 1, "sites": sites}


class FunctionalKind(ComputedKind):
    """Base of the kinds whose function calls are rewritten."""

    graph: Graph
    record: dict[str, Any]
    shared: Shared

    @property
    def recorded(self) -> frozenset[str]:
        """The sites that decompose has factored, by the record."""
        return frozenset(self.record)

    @property
    def origins(self) -> Mapping[str, Origin]:
        """The factorization and the ranks of each site in the record."""
        origins = {site: read_origin(entry) for site, entry in self.record.items()}
        return {site: origin for site, origin in origins.items() if origin is not None}

    def note(self, site: str, chain: Chain, **entry: Any) -> None:
        """Record that a site is factored, and what its weight was called."""
        if chain.origin is not None:
            entry |= {"factorization": chain.origin[0], "rank": list(chain.origin[1])}
        self.record[site] = entry

    def reopen(self, spots: Sequence[ChainSpot]) -> dict[str, Spot]:
        """Put an operator without numbers where each chain stands, and return the spots for splicing, by name."""
        if not spots:
            return {}
        names = {spot.site.name: self.record[spot.site.name]["weight"] for spot in spots}
        for site, name in names.items():
            entry = dict(self.record[site])
            if "computed" in entry:
                self.waiting[name] = entry.pop("computed")
            self.record[site] = entry
        for spot in spots:
            self.put_back(spot.run)
        self.view = self.look()
        calls: dict[tuple[Any, ...], list[Call]] = defaultdict(list)
        for call in self.view.calls:
            calls[identity(self.view.parameters[call.weight])].append(call)
        found = {spot.site.name: tuple(calls[identity(self.view.parameters[names[spot.site.name]])]) for spot in spots}
        return {spot.site.name: Spot(spot.site, found[spot.site.name]) for spot in spots}

    @abstractmethod
    def look(self) -> View:
        """Return a view of the graph as it is now."""

    @abstractmethod
    def add_parameter(self, names: Sequence[str], parameter: nn.Parameter) -> None:
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
        places = [place for place, _ in chain.places]
        last = places[-1]
        self._replace_weight(spot, chain)
        moved: dict[tuple[Any, ...], str] = {}
        for call in spot.calls:
            computed = current_bias(call)
            added = computed if _ends_with_link(chain) else None
            bias = (computed or self._move_bias(call, spot, (last, chain.bias), moved)) if added is None else None
            names: _Names = {
                place: (f"{spot.site.name}.{place}.weight", bias if place == last else None) for place in places
            }
            node = current_source(call)
            for i, step in enumerate(chain.steps):
                stored = call.stored if step is chain.steps[-1] else "out_in"
                node = self._write_step(step, node, str(i), names, like=call.node, stored=stored)
            if added is not None:
                node = self.write_sum(node, added, like=call.node)
            self.replace(call.node, node)
        if (lifted := self.view.lifted.get(spot.calls[0].weight)) is not None:
            erase_unused(self.graph, lifted.own)
        self.sweep()

    def _replace_weight(self, spot: Spot, chain: Chain) -> None:
        """Drop the weight, add those of the factors, and record what the weight was called."""
        sites = (spot.site.name, *spot.site.aliases)
        first = spot.calls[0]
        added = [call.computed_bias is not None and _ends_with_link(chain) for call in spot.calls]
        entry: dict[str, Any] = {"stored": first.stored} | ({"added": added} if any(added) else {})
        old, lifted = self.view.parameters[first.weight], self.view.lifted.get(first.weight)
        kept = self.waiting.pop(first.weight, None) if lifted is None else keep(lifted)
        entry |= {} if kept is None else {"computed": kept}
        names = self.view.names[identity(old)]
        for site, name in zip(sites, names, strict=True):
            self.note(site, chain, weight=name, **entry)
        for name in names if lifted is None else [name for row in lifted.names.values() for name in row]:
            self.drop_parameter(name)
        for place, part in chain.places:
            if isinstance(part, Operator):
                tensor = stored_weight(part, first.stored if part is chain.steps[-1] else "out_in")
                new = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
                parameter = self.shared.setdefault(id(part.weight), (part.weight, new))[1]
                self.add_parameter([f"{site}.{place}.weight" for site in sites], parameter)

    def _move_bias(
        self, call: Call, spot: Spot, last: tuple[str, Tensor | None], moved: dict[tuple[Any, ...], str]
    ) -> str | None:
        """Rename P.bias to P.<place>.bias, with the chain's numbers; what something else uses as well stays as it is.

        ``last`` has the place and the bias of the chain. A bias of another name than P.bias keeps its name.
        """
        if call.bias is None:
            return None
        place, own = last
        tensor = self.view.parameters[call.bias]
        key = identity(tensor)
        names = self.view.names[key]
        if self._has_strangers(tensor, spot.calls):
            return call.bias
        if key not in moved:
            self._retire(call.bias, spot.calls)
            if all(name.endswith(".bias") for name in names):
                names = [f"{name.removesuffix('.bias')}.{place}.bias" for name in names]
            numbers = _moved_by(tensor, spot.site.operator.bias, own)
            self.add_parameter(names, nn.Parameter(numbers, requires_grad=tensor.requires_grad))
            moved[key] = names[0]
        return moved[key]

    def put_back_functions(self, run: Run) -> None:
        """Replace the items of a run, and of its twins, by one call each."""
        recorded = [self.record.pop(site, {}) for site in run.sites]
        weights = [entry.get("weight") or f"{site}.weight" for site, entry in zip(run.sites, recorded, strict=True)]
        every = [item for items in run.rows for item in items]
        calls = all_calls(every)
        kept = {items[-1].bias for items in run.rows if self._keeps_bias(items, every, run.sites[0])}
        stored = recorded[0].get("stored") or calls[-1].stored
        trains = self.view.parameters[calls[0].weight].requires_grad
        biases = {bias for item in every for bias in biases_of(item)} - kept
        for name in [call.weight for call in calls] + sorted(biases):
            self._retire(name, every)
        numbers = stored_weight(run.operators[0], stored).detach()
        weight: str | Node | None = None
        if (computed := recorded[0].get("computed")) is not None:
            first = first_node(self.graph, every)
            weight, self.notes[run.sites[0]] = put_back_computed(self, computed, numbers, like=first)
        if weight is None:
            self.add_parameter(weights, nn.Parameter(numbers, requires_grad=trains))
            weight = weights[0]
        moved: dict[tuple[Any, ...], str] = {}
        added = recorded[0].get("added")
        added = added if isinstance(added, list) and len(added) == len(run.rows) else [False] * len(run.rows)
        for items, operator, behind in zip(run.rows, run.operators, added, strict=True):
            own = items[-1].bias
            bias: str | Node | None = own if own in kept else self._add_bias(items, operator, run.sites[0], moved)
            like = items[-1].node
            if behind is True and (found := added_bias(like)) is not None:
                like, bias = found
            elif items[-1].calls:
                bias = bias or current_bias(items[-1].calls[-1])
            node = self.insert(operator, first_source(items), (weight, bias), like=like, stored=stored)
            self.replace(like, node)
            erase(self.graph, items, keep=like)
        self.sweep()

    def _retire(self, name: str, items: Sequence[Item]) -> None:
        """Drop a parameter under all its names but those by which others than these items still use it."""
        tensor = self.view.parameters[name]
        names = self.view.names[identity(tensor)]
        kept = self._names_of_strangers(names, items) if self._has_strangers(tensor, items) else set()
        for alias in names:
            if alias not in kept:
                self.drop_parameter(alias)

    def _names_of_strangers(self, names: Sequence[str], items: Sequence[Item]) -> set[str]:
        """Return the names of a parameter by which the graph, as it is now, uses it elsewhere than in these items."""
        own = {node for item in items for node in item.nodes}
        found = set()
        for node, name in self.look().providers.items():
            users = {user for direct in node.users for user in through_transpose(direct, node)}
            if name in names and users - own:
                found.add(name)
        return found

    def _keeps_bias(self, items: Sequence[Item], every: Sequence[Item], site: str) -> bool:
        """Whether the last item's bias goes on under its own name: others use it, or decompose never moved it."""
        own = items[-1].bias
        if own is None or any(biases_of(item) for item in items[:-1]) or len(biases_of(items[-1])) > 1:
            return False
        factored = all_calls(items)[0].weight.startswith(f"{site}.")
        strangers = self._has_strangers(self.view.parameters[own], every)
        return strangers or (factored and not own.endswith(f".{last_place(items)}.bias"))

    def _add_bias(
        self, items: Sequence[Item], operator: Operator, site: str, moved: dict[tuple[Any, ...], str]
    ) -> str | None:
        """Add the composed bias as P.bias, once for items that share it."""
        if operator.bias is None:
            return None
        tensors = [self.view.parameters[bias] for item in items for bias in biases_of(item)]
        key = tuple(identity(tensor) for tensor in tensors)
        if key not in moved:
            suffix = f".{last_place(items)}.bias"
            names = [name for name in self.view.names[key[-1]] if len(key) == 1 and name.endswith(suffix)]
            new = [f"{name.removesuffix(suffix)}.bias" for name in names] or [f"{site}.bias"]
            self.add_parameter(new, nn.Parameter(operator.bias.detach(), requires_grad=tensors[-1].requires_grad))
            moved[key] = new[0]
        return moved[key]

    def _has_strangers(self, tensor: Tensor, items: Sequence[Item]) -> bool:
        own = {call.user for call in all_calls(items)} | {item.node for item in items if isinstance(item, LinkCall)}
        return bool(self.view.uses[identity(tensor)] - own)

    def _write_step(
        self,
        step: Step,
        source: Node,
        place: str,
        names: _Names,
        *,
        like: Node,
        stored: Layout,
    ) -> Node:
        """Insert the nodes of one step before ``like``; ``names`` has the weight and the bias at each place."""
        if isinstance(step, Operator):
            return self.insert(step, source, names[place], like=like, stored=stored)
        if isinstance(step, Branches):
            return self._write_branches(step, source, place, names, like=like)
        if isinstance(step, Shift):
            bias = names[place][1]
            assert isinstance(bias, str)  # a chain has a shift for a bias of its own alone
            return self.write_sum(source, self.parameter_node(bias, like), like=like)
        with self.graph.inserting_before(like):
            node = write_link(self.graph, step, source, is_aten=is_aten(like))
        self.stamp(node, like)
        return node

    def _write_branches(
        self,
        step: Branches,
        source: Node,
        place: str,
        names: _Names,
        *,
        like: Node,
    ) -> Node:
        total: Node | None = None
        for j, row in enumerate(step.rows):
            node = source
            for k, operator in enumerate(row):
                node = self.insert(operator, node, names[f"{place}.{j}.{k}"], like=like, stored="out_in")
            total = node if total is None else self.write_sum(total, node, like=like)
        assert total is not None  # there are rows
        return total

    def write_sum(self, first: Node, second: Node, *, like: Node) -> Node:
        """Insert an addition before ``like``, in its style."""
        with self.graph.inserting_before(like):
            target = torch.ops.aten.add.Tensor if is_aten(like) else torch.add
            node = self.graph.call_function(target, (first, second))
        self.stamp(node, like)
        return node

    def insert(
        self,
        operator: Operator,
        source: Node,
        names: tuple[str | Node, str | Node | None],
        *,
        like: Node,
        stored: Layout,
        style: Node | None = None,
    ) -> Node:
        """Insert the call of an operator before ``like``, in the style of a call.

        ``names`` are those of weight and bias; what the graph computes is given as its node.
        """
        weight, bias = (self.parameter_node(name, like) if isinstance(name, str) else name for name in names)
        assert weight is not None  # names[0] is a str
        with self.graph.inserting_before(like):
            call = style or like
            node = write_call(self.graph, operator, source=source, weight=weight, bias=bias, style=call, stored=stored)
        self.stamp(node, like)
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let a new node take the place of an old one, for what is read from recurrent layers too."""
        for layer in self.recurrences:
            layer.moved(old, new)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def sweep(self) -> None:
        """Erase the nodes that provide dropped parameters, and their transposes."""
        for node in reversed(list(self.graph.nodes)):
            origin = transposed_source(node) or node
            if not node.users and self.is_dropped(origin):
                self.graph.erase_node(node)

    @abstractmethod
    def is_dropped(self, node: Node) -> bool:
        """Whether the node provides a parameter that has been dropped."""


def _ends_with_link(chain: Chain) -> bool:
    return isinstance(chain.steps[-1], Link) and not isinstance(chain.steps[-1], Branches)


def _moved_by(bias: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """Return the bias of a call, which moves as that of the operator does from ``before`` to ``after``."""
    bias = bias.detach()
    if before is None or after is None or before.is_meta or after.is_meta:  # a chain is cut again without numbers
        return bias
    before, after = before.detach(), after.detach()
    return after.to(bias) if torch.equal(bias, before) else bias + (after - before).to(bias)
