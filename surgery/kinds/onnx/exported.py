"""Prepare what torch exports: weights keep their names and ties, and the steps of chains say what they are.

torch writes a linear layer as MatMul(x, Transpose(W)). Its optimizer folds each Transpose into a new weight with a new
name, and gives a weight that is used elsewhere as well a second copy.

A reshape of a chain becomes a Reshape to fixed sizes, and the addition of its bias an Add, as any others of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from surgery.algebra import Flatten, Shift, Transpose, Unflatten
from surgery.kinds.onnx.marks import MARK, SHIFT, words_of
from surgery.kinds.onnx.tensors import to_ir, to_torch
from surgery.kinds.onnx.weights import is_plain
from surgery.sites import Flow, Reshape
from surgery.sites.placement import Part
from surgery.sites.segments import find_segments, sites_of

__all__ = ["keep_weights", "mark_steps"]


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


def mark_steps(model: ir.Model, flow: Flow) -> None:
    """Let the nodes of an exported model say which steps of chains they are, as the program's flow knows."""
    for row in find_segments(flow):
        # whether a row is one operator is for the reader to find: to compose all rows of a model would take long
        factored = not flow.recorded or flow.recorded.intersection(sites_of(flow, row))
        if not factored or not any(isinstance(part, Reshape) for part in row):
            continue
        first = next(at for at, part in enumerate(row) if part.calls)
        names = flow.tensors.aliases(row[first].calls[0].weight)
        held = [model.graph.initializers[name] for name in names if name in model.graph.initializers]
        for node in (use.node for value in held for use in value.uses()):
            _mark_back(node, row[:first])
            _mark_on(node, row[first + 1 :])


def _mark_back(node: ir.Node, parts: Sequence[Part]) -> None:
    """Mark the nodes before the first call of a chain, as long as they are its steps."""
    for part in reversed(parts):
        value = node.inputs[0]
        before = None if value is None else value.producer()
        if before is None or not _mark(before, part):
            return
        node = before


def _mark_on(node: ir.Node, parts: Sequence[Part]) -> None:
    """Mark the nodes after the first call of a chain, as long as they are its steps."""
    for part in parts:
        uses = tuple(node.outputs[0].uses())
        if len(uses) != 1 or not _mark(uses[0].node, part):
            return
        node = uses[0].node


def _mark(node: ir.Node, part: Part) -> bool:
    """Mark a node that is a reshape of a chain; return whether it is the node of this part of the chain."""
    if not isinstance(part, Reshape):
        return any(value is not None and value.name == call.weight for call in part.calls for value in node.inputs)
    if isinstance(part.step, Shift):
        if node.op_type != "Add" or not any(value is not None and value.name == part.bias for value in node.inputs):
            return False
        node.metadata_props[MARK] = SHIFT
        return True
    if isinstance(part.step, Transpose):  # needs no mark
        return node.op_type == "Transpose"
    if not isinstance(part.step, Unflatten | Flatten) or node.op_type != "Reshape" or not _gives(part.step, node):
        return False
    node.metadata_props[MARK] = words_of(part.step)
    return True


def _gives(step: Unflatten | Flatten, node: ir.Node) -> bool:
    """Whether a Reshape gives the shape that a step gives."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return False
    shape: Any = tuple(source.shape)  # sizes that a step does not name may be symbols
    return step.out_shape(shape) == tuple(result.shape)
