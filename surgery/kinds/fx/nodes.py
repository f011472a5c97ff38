"""Small readings of nodes and items that edits of function calls need: sources, biases, places and origins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from surgery.kinds.fx.chains import Origin
from surgery.kinds.fx.functional import Parts, read_call, transposed_source
from surgery.kinds.fx.items import Item, SumCall
from surgery.kinds.fx.view import Call

__all__ = [
    "added_bias",
    "biases_of",
    "current_bias",
    "current_source",
    "erase",
    "erase_unused",
    "first_node",
    "first_source",
    "last_place",
    "read_origin",
    "through_transpose",
]

_SUMS = (torch.add, torch.ops.aten.add.Tensor)


def current_source(call: Call) -> Node:
    """Return the input of a call as the graph has it now, after earlier edits."""
    if call.path is not None:
        source = call.node.args[0] if call.node.args else call.node.kwargs["input"]
        assert isinstance(source, Node)  # the view has seen it
        return source
    parts = read_call(call.node)
    assert isinstance(parts, Parts)  # likewise
    return parts.input


def first_source(items: Sequence[Item]) -> Node:
    """Return the input of a row of items as the graph has it now."""
    first = items[0]
    return current_source(first.calls[0]) if first.calls else first.node.all_input_nodes[0]


def erase(graph: Graph, items: Sequence[Item], *, keep: Node) -> None:
    """Erase the nodes of items, users before what they use; ``keep`` is gone already."""
    for node in reversed([node for item in items for node in item.nodes if node is not keep]):
        graph.erase_node(node)


def first_node(graph: Graph, items: Sequence[Item]) -> Node:
    """Return the node of some items that comes first in the graph as it is now."""
    own = {node for item in items for node in item.nodes}
    return next(node for node in graph.nodes if node in own)


def erase_unused(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase those of some nodes, in graph order, that nothing uses any more; inputs of the graph stay."""
    for node in reversed(nodes):
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)


def current_bias(call: Call) -> Node | None:
    """Return the node of a bias that the graph computes, as the graph has it now; None where there is no such bias."""
    if call.computed_bias is None:
        return None
    parts = read_call(call.node)
    assert isinstance(parts, Parts)  # the view has seen it
    return parts.bias


def added_bias(node: Node) -> tuple[Node, Node] | None:
    """Return the addition behind a chain that ends with a reshape, and the computed bias that it adds; None if it has
    none.
    """
    users = list(node.users)
    if len(users) != 1 or users[0].target not in _SUMS or len(users[0].args) != 2 or users[0].kwargs:
        return None
    first, bias = users[0].args
    value = bias.meta.get("val") if isinstance(bias, Node) else None
    if first is not node or not isinstance(bias, Node) or (value is not None and value.dim() != 1):
        return None
    return users[0], bias


def read_origin(entry: Any) -> Origin | None:
    """Return what a record says of a chain's making; files may say anything there."""
    name, rank = (entry.get("factorization"), entry.get("rank")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(rank, list):
        return None
    return (name, tuple(rank)) if all(isinstance(r, int) and r > 0 for r in rank) else None


def through_transpose(user: Node, node: Node) -> list[Node]:
    """Return the users of a transpose of a node; of another user, itself."""
    return list(user.users) if transposed_source(user) is node else [user]


def biases_of(item: Item) -> list[str]:
    """Return the names of all biases of an item."""
    biases = [call.bias for call in item.calls] if item.calls else [item.bias]
    return [bias for bias in biases if bias is not None]


def last_place(items: Sequence[Item]) -> str:
    """Return where the last item's bias stands below its site, if the items are all steps of its chain."""
    at, last = len(items) - 1, items[-1]
    return f"{at}.{len(last.rows) - 1}.{len(last.rows[-1]) - 1}" if isinstance(last, SumCall) else str(at)
