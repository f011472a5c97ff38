"""Weights of recurrent nodes that other nodes hold, move or convert: initializers while a graph is open.

    V = Unsqueeze(W)    y = LSTM(x, V, R, B)    <->    y = LSTM(x, W, R, B), with the numbers of V in W

A node whose weights are initializers can be split, and opened as a loop. The record keeps the views of each weight,
through which its node reads it again at the end. What was never changed gets its own nodes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from surgery.kinds.onnx.constants import first_user
from surgery.kinds.onnx.graph import EditedGraph, parameter_of
from surgery.kinds.onnx.left import is_recurrent
from surgery.kinds.onnx.origin import describe
from surgery.kinds.onnx.tensors import shape_of, to_torch
from surgery.kinds.onnx.weights import View, Weight, views_from_json, views_to_json
from surgery.sites.segments import is_factor_of

__all__ = ["Lifted", "lift", "lower"]

_WEIGHTS = (1, 2, 3, 7)  # the inputs W, R, B and P


@dataclass(frozen=True, eq=False)
class Lifted:
    """A weight with what it was: what held its numbers, the nodes with what they read, and the value of the last.

    ``order`` are all nodes of their graph, as they stood.
    """

    weight: ir.Value
    numbers: ir.TensorProtocol | None
    root: ir.Value
    nodes: tuple[ir.Node, ...]
    reads: tuple[tuple[ir.Value | None, ...], ...]
    last: ir.Value
    order: tuple[ir.Node, ...]


def lift(graph: EditedGraph) -> dict[str, Lifted]:
    """Let initializers stand in the places of weights that only recurrent nodes read; return what there was."""
    nodes = [node for node in graph.reader.nodes if is_recurrent(node) and graph.reader.around[node] is node]
    read = [value for node in nodes for value in _weights(node) if not value.is_initializer()]
    found = {value: weight for value in read if (weight := graph.reader.weight(value)) is not None}
    alone = {value: weight for value, weight in found.items() if _is_alone(graph, value, weight)}
    orders = {home: tuple(home) for value in alone if isinstance(home := _line(value)[0].graph, ir.Graph)}
    return {weight.name: _lift(graph, value, weight, orders) for value, weight in alone.items()}


def _weights(node: ir.Node) -> list[ir.Value]:
    return [value for at in _WEIGHTS if at < len(node.inputs) and (value := node.inputs[at]) is not None]


def _is_read(value: ir.Value) -> bool:
    """Whether recurrent nodes read a value as their weight, and nothing else does."""
    uses = list(value.uses())
    return bool(uses) and all(is_recurrent(use.node) and use.idx in _WEIGHTS for use in uses)


def _line(value: ir.Value) -> list[ir.Node]:
    """Return the nodes through which a weight is read, and the Constant node that holds it, in order."""
    found: list[ir.Node] = []
    each: ir.Value | None = value
    while each is not None and (node := each.producer()) is not None:
        found.insert(0, node)
        each = node.inputs[0] if node.inputs else None
    return found


def _is_alone(graph: EditedGraph, value: ir.Value, weight: Weight) -> bool:
    nodes = _line(value)
    passed = [weight.root, *(node.outputs[0] for node in nodes)]
    homes = {node.graph for node in nodes} | ({weight.root.graph} if weight.root.is_initializer() else set())
    return (
        weight.is_float
        and graph.reader.is_named(weight)
        and len(homes) == 1
        and not any(each.is_graph_output() for each in passed)
        and all(len(each.uses()) == 1 for each in passed if each is not value)
        and _is_read(value)
        # in files of an earlier version nodes read factors through views
        and not any(is_factor_of(site, weight.name) for site in graph.record.sites)
    )


def _lift(
    graph: EditedGraph, value: ir.Value, weight: Weight, orders: Mapping[ir.Graph, tuple[ir.Node, ...]]
) -> Lifted:
    nodes = _line(value)
    home = nodes[0].graph
    assert isinstance(home, ir.Graph)  # they are nodes of the graph
    new = parameter_of(weight.name, weight.numbers)
    describe(new, weight.root)
    describe(new.const_value, weight.tensor)  # type: ignore[arg-type]  # it was made with numbers
    reads = tuple(tuple(node.inputs) for node in nodes)
    found = Lifted(new, new.const_value, weight.root, tuple(nodes), reads, value, orders[home])
    ir.convenience.replace_all_uses_with(value, new)
    if views := nodes[len(nodes) - len(weight.views) :] if weight.views else []:
        home.remove(views, safe=True)
    graph.exchange([weight.root], [new])
    if weight.views:
        graph.record = graph.record.with_layer(weight.name, {"views": views_to_json(weight.views)})
    return found


def lower(graph: EditedGraph, lifted: Mapping[str, Lifted]) -> None:
    """Let recurrent nodes read their weights again as they did, wherever these are whole."""
    said = {key: value["views"] for key, value in graph.record.layers.items() if _has_views(value)}
    rows = dict.fromkeys(lifted) | said
    graphs = (graph.graph, *graph.graph.subgraphs()) if rows else ()
    found = [inner.initializers[key] for key in rows for inner in graphs if key in inner.initializers]
    for weight in filter(_is_read, found):
        name, own = weight.name or "", lifted.get(weight.name or "")
        if own is not None and own.weight is weight and own.numbers is weight.const_value:
            _put_back(graph, own)
        # the views of both directions are not those of one
        elif views := views_from_json(rows[name], shape_of(weight.const_value)):  # type: ignore[arg-type]
            _view(graph, weight, views, own)
        else:
            continue
        graph.record = graph.record.without_layer(name)
    for one in lifted.values():
        # the sizes and axes that the nodes read
        for value in dict.fromkeys(value for row in one.reads for value in row[1:] if value is not None):
            graph.drop_unused(value)


def _has_views(value: object) -> bool:
    return isinstance(value, dict) and "views" in value


def _put_back(graph: EditedGraph, own: Lifted) -> None:
    """Let the nodes of a weight stand where they stood."""
    home = own.weight.graph
    assert isinstance(home, ir.Graph)  # the weight is one of its initializers
    ir.convenience.replace_all_uses_with(own.weight, own.last)
    for node, reads in zip(own.nodes, own.reads, strict=True):
        for at, value in enumerate(reads):
            node.replace_input_with(at, value)
    for node in reversed(own.nodes):
        behind = own.order[own.order.index(node) + 1 :]
        home.insert_before(first_user(home, [*_users(node.outputs[0]), *behind]), [node])
    if own.root.producer() is None:
        graph.exchange([own.weight], [own.root])
    else:
        graph.drop_unused(own.weight)
        graph.note_name(own.root.name or "")


def _users(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def _view(graph: EditedGraph, weight: ir.Value, views: Sequence[View], own: Lifted | None) -> None:
    """Let the nodes that read a weight read it through views."""
    tensor, name, home = weight.const_value, weight.name or "", weight.graph
    assert tensor is not None  # it is an initializer
    assert isinstance(home, ir.Graph)
    numbers = to_torch(tensor)
    for view in reversed(views):
        numbers = view.undo(numbers)
    if own is not None:
        graph.names -= {node.outputs[0].name for node in own.nodes if node.inputs}
    graph.move_to(weight)
    graph.rename(name, graph.new_name(f"{name}.whole"))
    root = graph.add_parameter(name, numbers)
    describe(root, weight)
    describe(root.const_value, tensor)  # type: ignore[arg-type]  # it was made with numbers
    ir.convenience.replace_all_uses_with(weight, graph.add_views(views, root, first_user(home, _users(weight))))
    graph.drop_unused(weight)
