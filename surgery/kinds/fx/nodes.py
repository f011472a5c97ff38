"""Small helpers for edits of function calls: they erase nodes, and find biases and where biases stand."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Graph, Node

from surgery.kinds.fx.functional import transposed_source
from surgery.sites.placement import BranchSum, Part

__all__ = [
    "added_bias",
    "biases_of",
    "erase",
    "erase_unused",
    "first_node",
    "last_place",
    "through_transpose",
]

_SUMS = (torch.add, torch.ops.aten.add.Tensor)


def erase(graph: Graph, nodes: Sequence[Node], *, keep: Node) -> None:
    """Erase nodes from last to first, so that users go before their inputs; ``keep`` is not erased."""
    for node in reversed([node for node in nodes if node is not keep]):
        graph.erase_node(node)


def first_node(graph: Graph, nodes: Collection[Node]) -> Node:
    """Return the node among ``nodes`` that comes first in the graph."""
    return next(node for node in graph.nodes if node in nodes)


def erase_unused(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase the nodes among ``nodes`` (in graph order) that nothing uses any more; inputs of the graph stay."""
    for node in reversed(nodes):
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)


def added_bias(node: Node) -> tuple[Node, Node] | None:
    """Return the addition after a chain that ends with a reshape, and the computed bias it adds; None if there is none.

    ``node`` is the last node of the chain.
    """
    users = list(node.users)
    if len(users) != 1 or users[0].target not in _SUMS or len(users[0].args) != 2 or users[0].kwargs:
        return None
    first, bias = users[0].args
    value = bias.meta.get("val") if isinstance(bias, Node) else None
    if first is not node or not isinstance(bias, Node) or (value is not None and value.dim() != 1):
        return None
    return users[0], bias


def through_transpose(user: Node, node: Node) -> list[Node]:
    """Return the users of ``user`` if it is a transpose of ``node``; otherwise ``user`` alone."""
    return list(user.users) if transposed_source(user) is node else [user]


def biases_of(part: Part) -> list[str]:
    """Return the names of all biases of a part."""
    biases = [call.bias for call in part.calls] if part.calls else [part.bias]
    return [bias for bias in biases if bias is not None]


def last_place(parts: Sequence[Part]) -> str:
    """Return the place of the last part's bias below its site, provided that the parts are all steps of the chain.

    The place is "2" for the third step, and "2.1.0" for the first call in the second row of a sum of branches there.
    """
    at, last = len(parts) - 1, parts[-1]
    return f"{at}.{len(last.rows) - 1}.{len(last.rows[-1]) - 1}" if isinstance(last, BranchSum) else str(at)
