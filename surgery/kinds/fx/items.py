"""The items of a run: calls of operators, reshapes and shifts between them, and sums of branches, as values.

A run is a row of items in which each value is used by the next item alone.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from surgery.algebra.compose import add, compose_steps
from surgery.algebra.steps import Branches, Link, Shift, Step
from surgery.errors import Refusal
from surgery.kinds.fx.links import read_link, read_link_module
from surgery.kinds.fx.view import Call, View, identity
from surgery.kinds.layers import steps as layers

__all__ = ["Item", "LinkCall", "SumCall", "aliases", "all_calls", "container", "find_items", "find_runs"]

_ADDITIONS = (torch.add, python_operator.add, torch.ops.aten.add.Tensor)


@dataclass(frozen=True, eq=False)
class LinkCall:
    """One reshape, transpose or shift; ``path`` is that of its module, ``bias`` the name of a shift's parameter."""

    node: Node
    source: Node
    step: Link
    path: str | None = None
    bias: str | None = None

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the item, in order."""
        return (self.node,)

    @property
    def calls(self) -> tuple[Call, ...]:
        """None: it has no weight."""
        return ()


@dataclass(frozen=True, eq=False)
class SumCall:
    """A sum of rows of calls on one source; ``additions`` are the nodes that add them up, in order."""

    rows: tuple[tuple[Call, ...], ...]
    additions: tuple[Node, ...]

    @property
    def node(self) -> Node:
        """The last addition."""
        return self.additions[-1]

    @property
    def source(self) -> Node:
        """The input of all rows."""
        return self.rows[0][0].source

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the item; users come after what they use."""
        return (*(call.node for call in self.calls), *self.additions)

    @property
    def calls(self) -> tuple[Call, ...]:
        """All calls, row by row."""
        return tuple(call for row in self.rows for call in row)

    @property
    def step(self) -> Step:
        """The sum as a step of a chain."""
        return Branches(tuple(tuple(call.operator for call in row) for row in self.rows))

    @property
    def bias(self) -> str | None:
        """The name of the last call's bias."""
        return self.rows[-1][-1].bias

    @property
    def path(self) -> str | None:
        """The path of the module that adds, if the calls are modules in its rows."""
        last = self.rows[-1][-1].path
        return None if last is None else last.rpartition(".")[0].rpartition(".")[0]


Item = Call | LinkCall | SumCall


def all_calls(items: Sequence[Item]) -> list[Call]:
    """Return the calls of all items, in order."""
    return [call for item in items for call in item.calls]


def find_runs(view: View, recorded: Collection[str] = ()) -> Iterator[list[Item]]:
    """Yield each maximal run with two calls or more; ``recorded`` are the sites that are known to be factored."""
    items = find_items(view, recorded)
    follower: dict[Node, Item] = {}
    ends = {item.node for item in items if item.calls and item.calls[-1].computed_bias is not None}
    for item in items:
        if item.source not in ends and set(item.source.users) <= set(item.nodes):
            follower[item.source] = item
    inner = {follower[item.node].node for item in items if item.node in follower}
    for item in items:
        run = [item]
        while run[-1].node in follower:
            run.append(follower[run[-1].node])
        if item.node not in inner and len(all_calls(run)) > 1:
            yield run


def find_items(view: View, recorded: Collection[str] = ()) -> list[Item]:
    """Return all items in graph order; the calls in a sum are part of it. Calls on computed weights are none.

    The branches of a sum are of one site that is known to be factored, or have the names that factors have: what a
    model adds up itself, as two heads, is not one chain.
    """
    calls = {call.node: call for call in view.calls if call.weight not in view.lifted}
    items: dict[Node, Item] = dict(calls)
    taken = {node for call in view.calls for node in call.nodes}
    for node in view.graph.nodes:
        link = None if node in taken else _read_link(node, view)
        found = link or _read_sum(node, calls, view, recorded)
        if found is not None:
            items[node] = found
    within = {call.node for item in items.values() if isinstance(item, SumCall) for call in item.calls}
    parts = {n for item in items.values() if isinstance(item, SumCall) for n in item.additions[:-1]}
    return [items[n] for n in view.graph.nodes if n in items and n not in within and n not in parts]


def container(view: View, item: Item) -> tuple[str, ...]:
    """Return the P of each name P.<step>.weight, or P.<step>.<row>.<call>.weight in a sum; none for other names."""
    found = {tuple(_parent(name, isinstance(item, SumCall)) for name in aliases(view, call)) for call in item.calls}
    return found.pop() if len(found) == 1 and all(all(names) for names in found) else ()


def _parent(name: str, in_sum: bool) -> str:
    *parents, leaf = name.split(".")
    depth = 3 if in_sum else 1
    numbers = parents[-depth:]
    fits = leaf == "weight" and len(parents) > depth and all(number.isdecimal() for number in numbers)
    return ".".join(parents[:-depth]) if fits else ""


def aliases(view: View, call: Call) -> list[str]:
    """Return all names of the weight of a call."""
    return view.names[identity(view.parameters[call.weight])]


def _read_link(node: Node, view: View) -> LinkCall | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.op == "call_module" and view.module is not None:
        path = str(node.target)
        module = view.module(path)
        if type(module) is layers.Shift:
            return LinkCall(node, source, Shift(module.bias.detach()), path, f"{path}.bias")
        step = read_link_module(module)
        return None if step is None else LinkCall(node, source, step, path)
    return _read_shift(node, source, view) if node.target in _ADDITIONS else _of_function(node, source, view)


def _of_function(node: Node, source: Node, view: View) -> LinkCall | None:
    step = read_link(node)
    return None if step is None else LinkCall(node, source, step, view.owner(node))


def _read_shift(node: Node, source: Node, view: View) -> LinkCall | None:
    """Return the addition of a parameter with one axis to an activation; None for any other addition."""
    other = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    name = view.providers.get(other) if isinstance(other, Node) else None
    if name is None or view.parameters[name].dim() != 1 or source in view.providers:
        return None
    return LinkCall(node, source, Shift(view.parameters[name].detach()), view.owner(node), name)


def _owners(view: View, call: Call, recorded: Collection[str]) -> frozenset[str]:
    """Return the factored sites of which a call may be a factor, by the names of its weight."""
    names = aliases(view, call)
    return frozenset(site for site in recorded if any(name.startswith(f"{site}.") for name in names))


def _of_one_site(view: View, found: SumCall, recorded: Collection[str]) -> bool:
    """Whether branches are those of one factored site: of a known one, or else by their names."""
    owners = [_owners(view, call, recorded) for call in found.calls]
    return bool(frozenset.intersection(*owners)) or (not any(owners) and bool(container(view, found)))


def _read_sum(node: Node, calls: dict[Node, Call], view: View, recorded: Collection[str]) -> SumCall | None:
    """Return the sum of branches that ends at a node and is one operator; None for any other node."""
    if not _adds(node):
        return None
    leaves, additions = _leaves(node)
    rows = [_row(leaf, calls) for leaf in leaves] if len(set(leaves)) == len(leaves) else [[]]
    if any(not row or row[0].source is not rows[0][0].source for row in rows):
        return None
    found = SumCall(tuple(map(tuple, rows)), tuple(additions))
    if any(call.computed_bias is not None for call in found.calls[:-1]):
        return None
    if not _of_one_site(view, found, recorded):
        return None
    composed = add([compose_steps([call.operator for call in row]) for row in rows])
    return None if isinstance(composed, Refusal) else found


def _adds(node: Node) -> bool:
    plain = node.op == "call_function" and node.target in _ADDITIONS
    return plain and len(node.args) == 2 and not node.kwargs and all(isinstance(arg, Node) for arg in node.args)


def _leaves(node: Node) -> tuple[list[Node], list[Node]]:
    """Return what a tree of additions adds up, from the left, and its additions; an inner value has no other use."""
    leaves: list[Node] = []
    additions: list[Node] = []
    for arg in node.args:
        assert isinstance(arg, Node)  # _adds has seen to it
        found = _leaves(arg) if _adds(arg) and len(arg.users) == 1 else ([arg], [])
        leaves += found[0]
        additions += found[1]
    return leaves, [*additions, node]


def _row(leaf: Node, calls: dict[Node, Call]) -> list[Call]:
    """Return the calls that end at a leaf of a sum and whose values have no other use."""
    row: list[Call] = []
    node = leaf
    while node in calls and len(node.users) == 1:
        row.insert(0, calls[node])
        node = calls[node].source
    return row
