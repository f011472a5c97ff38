"""The outline of a recurrent layer in a graph: calls of the layer's parts, in addition to what computes the layer.

    lstm = call_module lstm(x)        ih_l0 = call_module lstm.ih_l0(x)    hh_l0 = call_module lstm.hh_l0(...)    ...

The outline exists only while a graph is open, so that the calls of the parts can be found and replaced. Nothing reads
its outputs, and it is never run for its numbers. Each node of it has a mark in its metadata, which a node that replaces
it gets too.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, Node

from surgery.kinds.fx.trace import trace_outline

__all__ = ["add_outline", "drop_outline", "in_outline"]

_MARK = "surgery_outline"


def add_outline(root: nn.Module, path: str, source: Any, before: Node) -> list[Node]:
    """Add the outline of the unpacked recurrent layer at ``path`` before a node, and return the new nodes.

    ``source`` is the node of the layer's input.
    """
    made: dict[Node, Any] = {}
    added = []
    with before.graph.inserting_before(before):
        for node in trace_outline(root.get_submodule(path)).nodes:
            if node.op == "placeholder":
                made[node] = source
            elif node.op != "output":
                made[node] = new = before.graph.node_copy(node, made.__getitem__)
                new.meta[_MARK] = True
                new.target = f"{path}.{node.target}" if node.op == "call_module" else node.target
                added.append(new)
    return added


def in_outline(node: Node) -> bool:
    """Whether a node belongs to an outline."""
    return _MARK in node.meta


def drop_outline(graph: Graph) -> None:
    """Remove all outlines from a graph."""
    for node in reversed(list(graph.nodes)):
        if in_outline(node):
            graph.erase_node(node)
