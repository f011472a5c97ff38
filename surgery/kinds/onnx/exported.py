"""Prepare what torch exports: weights of linear layers keep their names, and tied weights stay tied.

torch writes a linear layer as MatMul(x, Transpose(W)). Its optimizer folds each Transpose into a new weight with a new
name, and gives a weight that is used elsewhere as well a second copy.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from surgery.kinds.onnx.tensors import to_ir, to_torch
from surgery.kinds.onnx.weights import is_plain

__all__ = ["keep_weights"]


def keep_weights(model: ir.Model, optimize: Callable[[], ir.Model]) -> ir.Model:
    """Optimize an exported model by ``optimize``; weights keep their names and their ties."""
    # The copy that the optimizer will make of a weight, by the name of the Transpose's value, and the weight itself.
    tied: dict[str, str] = {}
    for name, value in list(model.graph.initializers.items()):
        uses = [use.node for use in value.uses()]
        turned = [node for node in uses if _turns(node, value)]
        if turned and len(turned) == len(uses) and not value.is_graph_output():
            _turn(value, turned)
        else:
            tied |= {node.outputs[0].name or "": name for node in turned}
    model = optimize()
    graph = model.graph
    for copy, name in tied.items():
        if copy not in graph.initializers or name not in graph.initializers:
            continue
        value, original = graph.initializers[copy], graph.initializers[name]
        node = ir.Node("", "Transpose", [original], [ir.AttrInt64s("perm", (1, 0))])
        graph.insert_before(graph[0], node)
        ir.convenience.replace_all_uses_with(value, node.outputs[0], replace_graph_outputs=True)
        del graph.initializers[copy]
        value.name, node.outputs[0].name = None, copy
    return model


def _turns(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node exchanges the two axes of a weight."""
    two = value.const_value is not None and len(value.const_value.shape) == 2
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and is_plain(node) and two and (perm is None or list(perm.value) == [1, 0])


def _turn(value: ir.Value, nodes: list[ir.Node]) -> None:
    """Hold the transpose of a weight in its place, and remove the nodes that exchange its axes."""
    assert value.const_value is not None
    turned = to_torch(value.const_value).mT
    value.const_value, value.shape = to_ir(turned, value.name or ""), ir.Shape(turned.shape)
    for node in nodes:
        ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
