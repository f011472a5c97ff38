"""The outline of recurrent layers in graphs of modules: their parts' calls, beside the call of the layer itself.

    lstm = call_module lstm(x)        ih_l0 = call_module lstm.ih_l0(x)    hh_l0 = call_module lstm.hh_l0(...)    ...

Nothing reads what the outline puts out, and nobody runs it for its numbers: it is there to be found and changed while a
graph is open. What takes the place of a call in it has the mark too, as metadata of the node.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, GraphModule, Node

from surgery.graphs.modules import is_outlined
from surgery.graphs.trace import trace_outline

__all__ = ["drop_outline", "in_outline", "outline"]

_MARK = "surgery_outline"


def outline(root: GraphModule) -> None:
    """Add the outline of each call of an unpacked recurrent layer, just before it."""
    for node in root.graph.find_nodes(op="call_module"):
        layer = root.get_submodule(str(node.target))
        if is_outlined(layer):
            _add(root.graph, node, layer)


def _add(graph: Graph, call: Node, layer: nn.Module) -> None:
    given = iter([call.args[0] if call.args else call.kwargs["input"], None])
    made: dict[Node, object] = {}
    with graph.inserting_before(call):
        for node in trace_outline(layer).nodes:
            if node.op == "placeholder":
                made[node] = next(given)
            elif node.op != "output":
                made[node] = new = graph.node_copy(node, lambda old: made[old])  # type: ignore[return-value,arg-type]
                new.meta[_MARK] = True
                if node.op == "call_module":
                    new.target = f"{call.target}.{node.target}"


def in_outline(node: Node) -> bool:
    """Whether a node belongs to an outline."""
    return _MARK in node.meta


def drop_outline(graph: Graph) -> None:
    """Take all outlines away."""
    for node in reversed(list(graph.nodes)):
        if in_outline(node):
            graph.erase_node(node)
