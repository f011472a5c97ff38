"""Prepare what torch exports: weights keep their names and ties, and the steps of chains say what they are.

torch writes a linear layer as MatMul(x, Transpose(W)), gives a tied weight the last of its names, and computes some
weights: that of weight norm from its parts, that of an LSTM from gates in another order. In the file, each weight of a
layer is one initializer, in the layout in which nodes read it, under the name that the program's flow has for it:

    Transpose(W)                                   -> W
    Mul(original1, Div(original0, ...))            -> 0.weight
    Unsqueeze(Concat(Slice(weight_ih_l0), ...))    -> ih_l0.weight

While the model is simplified, weights and biases are inputs, so that no constant is folded into them, and none of them
is merged with another that has the same numbers.

A reshape of a chain becomes a Reshape to fixed sizes, and the addition of its bias an Add, as any others of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from surgery.algebra import Flatten, Shift, Transpose, Unflatten
from surgery.kinds.onnx.left import DENSE, RECURRENT
from surgery.kinds.onnx.marks import MARK, SHIFT, words_of
from surgery.kinds.onnx.simplify import fold_all, simplify
from surgery.kinds.onnx.tensors import to_ir, to_torch
from surgery.kinds.onnx.weights import Weight, find_weight, is_plain
from surgery.sites import Flow, Reshape, Tensors, site_name
from surgery.sites.placement import Part
from surgery.sites.segments import find_segments, sites_of

__all__ = ["mark_steps", "simplify_export"]


def simplify_export(model: ir.Model, flow: Flow) -> None:
    """Simplify an exported model in its place; weights have the names that the program's flow has for them."""
    factors = (name for chain in flow.chains for name in chain.weights)
    called = {name for call in flow.calls for name in flow.tensors.aliases(call.weight)}.union(factors)

    def fold_weights() -> None:
        fold_all(model, {node for _, value in _weights(model.graph) for node in _computing(value)})
        _drop_zeros(model.graph, held)

    _tie(model.graph, flow.tensors)
    _name_computed(model.graph, called)
    _turn_weights(model.graph)
    held = [value for value in _protected(model.graph, called) if value not in model.graph.inputs]
    model.graph.inputs.extend(held)
    simplify(model, fold_weights)
    for value in held:
        model.graph.inputs.remove(value)
    for value in [value for value in held if not value.uses() and not value.is_graph_output()]:
        del model.graph.initializers[value.name or ""]


def _weights(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield the nodes that multiply by weights or read rows of them, each with what it reads as its weight."""
    for node in graph.all_nodes():
        if node.op_type in DENSE and is_plain(node):
            first = DENSE[node.op_type]
            for value in node.inputs[first : first + 1 + (node.op_type in RECURRENT)]:
                if value is not None:
                    yield node, value


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from (*graph.inputs, *graph.initializers.values())
    for node in graph.all_nodes():
        yield from node.outputs


def _tie(graph: ir.Graph, tensors: Tensors) -> None:
    """Give each weight the first of its names; torch gives it the last."""
    for first, *others in tensors.names.values():
        for value in [graph.initializers[name] for name in others if name in graph.initializers]:
            if first not in graph.initializers:
                _rename(graph, value, first)
                continue
            ir.convenience.replace_all_uses_with(value, graph.initializers[first], replace_graph_outputs=True)
            del graph.initializers[value.name or ""]


def _name_computed(graph: ir.Graph, called: set[str]) -> None:
    """Give each weight that nodes compute from parameters the name of the layer that has these."""
    taken = {value.name for value in _values(graph)}
    for value in dict.fromkeys(value for _, value in _weights(graph)):
        for leaf in [] if _held(value, called) is not None else _leaves(value):
            free = called - (taken - {leaf.name})
            name = next((name for name in _layer_names(leaf.name or "") if name in free), None)
            if name is not None:
                if name == leaf.name:  # this parameter is folded into the weight, and gives it its name
                    _rename(graph, leaf, f"{name}.folded")
                value.name = name
                taken.add(name)
                break


def _held(value: ir.Value, called: set[str]) -> Weight | None:
    """Return the weight that a value is; None if it is computed, also if only from a parameter of another name.

    Example: the weight of a layer of one direction is Unsqueeze(weight_ih_l0), which the program's flow calls ih_l0.
    """
    weight = find_weight(value)
    own = weight is None or weight.name in called
    return weight if own or weight is None or not called.intersection(_layer_names(weight.name)) else None


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[value.name or ""]
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.initializers[name] = value


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.size


def _layer_names(parameter: str) -> tuple[str, str]:
    """Return the names that the weight of a parameter's layer may have in a flow.

    >>> _layer_names("0.parametrizations.weight.original1")[0], _layer_names("lstm.weight_ih_l0")[1]
    ('0.weight', 'lstm.ih_l0.weight')
    """
    path, dot, name = parameter.rpartition(".")
    return f"{site_name(parameter)}.weight", f"{path}{dot}{name.removeprefix('weight_')}.weight"


def _computing(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that compute a weight from constants, and from sizes; none if one reads anything else."""
    waiting, nodes = [value], dict[ir.Node, None]()
    while waiting:
        node = (one := waiting.pop()).producer()
        if node is None and not one.is_initializer():
            return []
        if node is not None and node not in nodes:
            nodes[node] = None
            waiting += [read for read in node.inputs if read is not None and node.op_type != "Shape"]
    return list(nodes)


def _leaves(value: ir.Value) -> list[ir.Value]:
    """Return the initializers from which nodes compute a weight, the largest first."""
    reads = {read for node in _computing(value) for read in node.inputs if read is not None}
    found = [read for read in value.graph.initializers.values() if read in reads] if value.graph is not None else []
    return sorted(found, key=_size, reverse=True)


def _protected(graph: ir.Graph, called: set[str]) -> list[ir.Value]:
    """Return the weights and biases of layers; torch reads rows of other tables as well, which may be folded."""
    found: dict[ir.Value, None] = {}
    for node, value in _weights(graph):
        weight = _held(value, called)
        if weight is not None and (node.op_type != "Gather" or weight.name in called):
            found[weight.root] = None
        found |= dict.fromkeys(read for read in node.inputs[2:3] if read is not None and node.op_type not in RECURRENT)
        for use in node.outputs[0].uses() if node.op_type == "MatMul" else ():
            found |= dict.fromkeys(read for read in use.node.inputs if read is not None and use.node.op_type == "Add")
    return [value for value in found if value.is_initializer()]


def _drop_zeros(graph: ir.Graph, held: Sequence[ir.Value]) -> None:
    """Drop biases of zeros that the model does not have; torch gives them to some convolutions."""
    for node in graph.all_nodes():
        bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) > 2 else None
        numbers = None if bias is None or bias in held else ir.convenience.get_const_tensor(bias)
        if numbers is not None and not numbers.numpy().any():
            node.resize_inputs(2)


def _turn_weights(graph: ir.Graph) -> None:
    """Hold the transpose of each weight that is read through nothing but transposes."""
    for value in list(graph.initializers.values()):
        uses = [use.node for use in value.uses()]
        if uses and not value.is_graph_output() and all(_turns(node, value) for node in uses):
            _turn(value, uses)


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
