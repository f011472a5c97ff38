"""The outline of recurrent layers in graphs: their parts' calls, beside what computes the layer itself.

    lstm = call_module lstm(x)        ih_l0 = call_module lstm.ih_l0(x)    hh_l0 = call_module lstm.hh_l0(...)    ...

Nothing reads what the outline puts out, and nobody runs it for its numbers: it is there to be found and changed while a
graph is open. What takes the place of a call in it has the mark too, as metadata of the node.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, Node

from surgery.kinds.fx.trace import trace_outline

__all__ = ["add_outline", "drop_outline", "in_outline"]

_MARK = "surgery_outline"


def add_outline(root: nn.Module, path: str, source: Any, before: Node) -> list[Node]:
    """Add the outline of the unpacked recurrent layer at a path, on the node of its input, and return its nodes."""
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
    """Take all outlines away."""
    for node in reversed(list(graph.nodes)):
        if in_outline(node):
            graph.erase_node(node)
