"""Edits of function calls in fx graphs: they replace operators by chains, and chains by operators.

The factors of site P are named P.0.weight, P.1.weight, ...; the bias P.bias moves to the last factor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Node

from surgery.algebra import Branches, Chain, Layout, Link, Operator, Shift, Step
from surgery.kinds.fx.functional import is_aten, write_link
from surgery.kinds.fx.graph import OpenGraph
from surgery.kinds.fx.nodes import (
    added_bias,
    biases_of,
    erase,
    erase_unused,
    first_node,
    last_place,
    through_transpose,
)
from surgery.kinds.fx.recipe import keep
from surgery.kinds.fx.restore import restore_computed
from surgery.kinds.layers.tensors import key_of, stored_weight
from surgery.sites import Call, Entry, FusableChain, Fuse, Key, Part, Placement, Reshape, Site, calls_of

__all__ = ["FunctionEdits"]


# place in a chain -> the names of the weight and the bias there; a bias that the graph computes is given as its node
_Names: TypeAlias = Mapping[str, tuple[str, str | Node | None]]


class FunctionEdits(OpenGraph):
    """Base of the open graphs whose function calls are rewritten."""

    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put operators without numbers in the place of chains, and return their new placements by site name."""
        if not placements:
            return {}
        entries = {p.site.name: self.record.sites[p.site.name] for p in placements}
        names = {site: entry.weight or f"{site}.weight" for site, entry in entries.items()}
        for site, entry in entries.items():
            if entry.computed is not None:
                self.waiting[names[site]] = entry.computed
                self.record = self.record.with_site(site, replace(entry, computed=None))
        for placement in placements:
            assert placement.chain is not None  # it is the site of a chain
            self.apply(Fuse(placement.chain))
        self.reread()
        calls: dict[Key, list[Call]] = defaultdict(list)
        for call in self.reader.calls.values():
            calls[key_of(self.reader.parameters[call.weight])].append(call)
        found = {site: tuple(calls[key_of(self.reader.parameters[name])]) for site, name in names.items()}
        return {p.site.name: Placement(p.site, found[p.site.name]) for p in placements}

    def _nodes_of(self, parts: Sequence[Part]) -> list[Node]:
        return [self.node(value) for part in parts for value in part.values]

    def _source(self, parts: Sequence[Part]) -> Node:
        """Return the node of the value that a row of parts reads."""
        return self.node(parts[0].source)

    def _bias(self, call: Call) -> Node | None:
        """Return the node of a bias that the graph computes, or None."""
        return None if call.computed_bias is None else self.node(call.computed_bias)

    def replace_functions(self, site: Site, calls: Sequence[Call], chain: Chain) -> None:
        """Replace each call of a site by the calls of its chain."""
        # A bias goes to the last operator of the chain. Only a computed bias of a chain that ends with a reshape
        # cannot: the reshape would reshape it too. Such a bias is added after the chain.
        places = [place for place, _ in chain.places]
        last = places[-1]
        # the weight first, once for all calls; then each call gets the nodes of the chain, and its own bias
        self._replace_weight(site, calls, chain)
        moved: dict[tuple[Any, ...], str] = {}
        for call in calls:
            computed, old = self._bias(call), self.node(call.value)
            added = computed if _ends_with_link(chain) else None
            bias: str | Node | None = None
            if added is None:
                bias = computed or self._move_bias(call, site, calls, (last, chain.bias), moved)
            names: _Names = {
                place: (f"{site.name}.{place}.weight", bias if place == last else None) for place in places
            }
            node = self.node(call.source)
            for i, step in enumerate(chain.steps):
                # only the last factor keeps the layout of the original weight, so that recompose finds it
                stored = call.stored if step is chain.steps[-1] else "out_in"
                node = self._write_step(step, node, str(i), names, like=old, stored=stored)
            if added is not None:
                node = self.write_sum(node, added, like=old)
            self.replace(old, node)
        if (lifted := self.reader.lifted.get(calls[0].weight)) is not None:
            erase_unused(self.graph, lifted.own)
        self.sweep()

    def _replace_weight(self, site: Site, calls: Sequence[Call], chain: Chain) -> None:
        """Drop the weight, add the weights of the factors, and record the name of the weight."""
        sites = (site.name, *site.aliases)
        first = calls[0]
        added = [call.computed_bias is not None and _ends_with_link(chain) for call in calls]
        old, lifted = self.reader.parameters[first.weight], self.reader.lifted.get(first.weight)
        # a chain that is cut again was made of a computed weight earlier: then its record waits since reopen
        kept = self.waiting.pop(first.weight, None) if lifted is None else keep(lifted)
        entry = Entry(stored=first.stored, added=tuple(added) if any(added) else (), computed=kept)
        names = self.reader.names[key_of(old)]
        for alias, name in zip(sites, names, strict=True):
            self.note(alias, chain, replace(entry, weight=name))
        for name in names if lifted is None else [name for row in lifted.names.values() for name in row]:
            self.drop_parameter(name)
        for place, part in chain.places:
            if isinstance(part, Operator):
                tensor = stored_weight(part, first.stored if part is chain.steps[-1] else "out_in")
                new = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
                # joint sites share factors: the same tensor becomes the same parameter under all names
                parameter = self.shared.setdefault(id(part.weight), (part.weight, new))[1]
                self.add_parameter([f"{alias}.{place}.weight" for alias in sites], parameter)

    def _move_bias(
        self,
        call: Call,
        site: Site,
        calls: Sequence[Call],
        last: tuple[str, Tensor | None],
        moved: dict[tuple[Any, ...], str],
    ) -> str | None:
        """Rename P.bias to P.<place>.bias, with the numbers of the chain's bias, and return the new name.

        ``last`` has the place of the chain's last operator and the chain's bias. A bias that something else uses as
        well stays as it is. A bias whose name does not end with .bias keeps its name. ``moved`` has the biases that
        were moved for earlier calls.
        """
        if call.bias is None:
            return None
        place, own = last
        tensor = self.reader.parameters[call.bias]
        key = key_of(tensor)
        names = self.reader.names[key]
        if self._has_strangers(tensor, calls):
            return call.bias
        if key not in moved:
            self._retire(call.bias, calls)
            # a bias of one call may be tied to that of another site; then all its names are renamed alike
            if all(name.endswith(".bias") for name in names):
                names = [f"{name.removesuffix('.bias')}.{place}.bias" for name in names]
            numbers = _moved_by(tensor, site.operator.bias, own)
            self.add_parameter(names, nn.Parameter(numbers, requires_grad=tensor.requires_grad))
            moved[key] = names[0]
        return moved[key]

    def fuse_functions(self, chain: FusableChain) -> None:
        """Replace each row of a chain by one call."""
        entries = [self.record.sites.get(site, Entry()) for site in chain.sites]
        for site in chain.sites:
            self.record = self.record.without_site(site)
        every = [part for row in chain.rows for part in row]
        # The rows share one weight, so it is made once. Each row keeps its bias or gets the composed bias, and its
        # nodes are replaced by one call; a computed bias that was added after the chain goes into that call again.
        kept = {row[-1].bias for row in chain.rows if self._keeps_bias(row, every, chain.sites[0])}
        stored = entries[0].stored or calls_of(every)[-1].stored
        weight = self._fused_weight(chain, entries, stored, kept)
        moved: dict[tuple[Any, ...], str] = {}
        known = len(entries[0].added) == len(chain.rows)
        added = entries[0].added if known else (False,) * len(chain.rows)
        for row, operator, adds_bias in zip(chain.rows, chain.operators, added, strict=True):
            own = row[-1].bias
            bias: str | Node | None = own if own in kept else self._add_bias(row, operator, chain.sites[0], moved)
            like = self.node(row[-1].value)
            if adds_bias and (found := added_bias(like)) is not None:
                like, bias = found
            elif row[-1].calls:
                bias = bias or self._bias(row[-1].calls[-1])
            node = self.insert(operator, self._source(row), (weight, bias), like=like, stored=stored)
            inside = self._nodes_of(row)
            self.replace(like, node)
            erase(self.graph, inside, keep=like)
        self.sweep()

    def _fused_weight(
        self, chain: FusableChain, entries: Sequence[Entry], stored: Layout, kept: Collection[str | None]
    ) -> str | Node:
        """Drop the parameters of a chain, except those in ``kept``; return the name or the node of its one weight."""
        every = [part for row in chain.rows for part in row]
        calls = calls_of(every)
        trains = self.reader.parameters[calls[0].weight].requires_grad
        biases = {bias for part in every for bias in biases_of(part)} - set(kept)
        for name in [call.weight for call in calls] + sorted(biases):
            self._retire(name, every)
        numbers = stored_weight(chain.operators[0], stored).detach()
        if (computed := entries[0].computed) is not None:
            first = first_node(self.graph, self._nodes_of(every))
            weight, self.notes[chain.sites[0]] = restore_computed(self, computed, numbers, like=first)
            if weight is not None:
                return weight
        pairs = zip(chain.sites, entries, strict=True)
        names = [entry.weight or f"{site}.weight" for site, entry in pairs]
        self.add_parameter(names, nn.Parameter(numbers, requires_grad=trains))
        return names[0]

    def _retire(self, name: str, parts: Sequence[Part]) -> None:
        """Drop a parameter under all its names, except names by which something besides these parts still uses it."""
        tensor = self.reader.parameters[name]
        names = self.reader.names[key_of(tensor)]
        kept = self._names_of_strangers(names, parts) if self._has_strangers(tensor, parts) else set()
        for alias in names:
            if alias not in kept:
                self.drop_parameter(alias)

    def _names_of_strangers(self, names: Sequence[str], parts: Sequence[Part]) -> set[str]:
        """Return the names of a parameter by which the graph, as it is now, uses it outside of these parts."""
        own = set(self._nodes_of(parts))
        found = set()
        for node, name in self.look().providers.items():
            users = {user for direct in node.users for user in through_transpose(direct, node)}
            if name in names and users - own:
                found.add(name)
        return found

    def _keeps_bias(self, row: Sequence[Part], every: Sequence[Part], site: str) -> bool:
        """Whether the bias of a row's last part keeps its name: something else uses it, or decompose never moved it."""
        own = row[-1].bias
        if own is None or any(biases_of(part) for part in row[:-1]) or len(biases_of(row[-1])) > 1:
            return False
        factored = calls_of(row)[0].weight.startswith(f"{site}.")
        strangers = self._has_strangers(self.reader.parameters[own], every)
        return strangers or (factored and not own.endswith(f".{last_place(row)}.bias"))

    def _add_bias(
        self, row: Sequence[Part], operator: Operator, site: str, moved: dict[tuple[Any, ...], str]
    ) -> str | None:
        """Add the composed bias of a row as P.bias, once for all rows that share it, and return its name."""
        if operator.bias is None:
            return None
        tensors = [self.reader.parameters[bias] for part in row for bias in biases_of(part)]
        key = tuple(key_of(tensor) for tensor in tensors)
        if key not in moved:
            suffix = f".{last_place(row)}.bias"
            # a bias that decompose moved to P.<place>.bias gets its original names again; any other bias is named after
            # the site
            names = [name for name in self.reader.names[key[-1]] if len(key) == 1 and name.endswith(suffix)]
            new = [f"{name.removesuffix(suffix)}.bias" for name in names] or [f"{site}.bias"]
            self.add_parameter(new, nn.Parameter(operator.bias.detach(), requires_grad=tensors[-1].requires_grad))
            moved[key] = new[0]
        return moved[key]

    def _has_strangers(self, tensor: Tensor, parts: Sequence[Part]) -> bool:
        """Whether something other than these parts uses a parameter."""
        # nodes as they were read: parts may have their numbers from an earlier reading than the uses
        own = {call.user for call in calls_of(parts)} | {part.value for part in parts if isinstance(part, Reshape)}
        return bool(self.reader.uses.get(key_of(tensor), frozenset()) - {self.original(value) for value in own})

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
            assert isinstance(bias, str)  # a chain has a shift only for a bias that is a parameter
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


def _ends_with_link(chain: Chain) -> bool:
    return isinstance(chain.steps[-1], Link) and not isinstance(chain.steps[-1], Branches)


def _moved_by(bias: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """Return the new bias of a call: it changes by as much as the operator's bias does from ``before`` to ``after``.

    Calls of one site may have biases of their own; the operator has the bias of the first call.
    """
    bias = bias.detach()
    if before is None or after is None or before.is_meta or after.is_meta:  # a chain that is cut has no numbers yet
        return bias
    before, after = before.detach(), after.detach()
    return after.to(bias) if torch.equal(bias, before) else bias + (after - before).to(bias)
