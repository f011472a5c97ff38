"""Recurrent nodes as loops while a graph is open, so that both of their weights are sites; closed again at the end.

    y = LSTM(x, W, R, B)    <->    y = Scan(x W + b_ih + b_hh), with h R in each step

It is the form in which surgery exports a layer with a factored recurrent weight, which stays a loop; all others become
nodes again, also those of such an export. The record keeps the node as it was. What was never changed gets its own node
and weights back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from surgery.errors import Refusal
from surgery.kinds.onnx.graph import EditedGraph
from surgery.kinds.onnx.kept_node import first_output
from surgery.kinds.onnx.left import is_recurrent
from surgery.kinds.onnx.modes import GATES, is_backwards, mode_of, to_torch_order
from surgery.kinds.onnx.one_node import is_used
from surgery.kinds.onnx.parts import Apart, Parts, closed, like
from surgery.kinds.onnx.steps import Write, write_step
from surgery.kinds.onnx.tensors import FLOATS, shape_of, to_ir, to_torch
from surgery.sites.segments import is_factor_of

__all__ = ["AXES", "one_axis", "open_loops", "writer"]

_LEAST_OPSET = 9  # the first in which Scan has this form
_AXES_AS_INPUT = 13  # the first opset in which Unsqueeze and Squeeze read their axes
_WEIGHTS = (1, 2, 3)  # the inputs W, R and B
_STATES = (5, 6)
AXES = (1, 0, 0)  # of the one direction in each output


def open_loops(graph: EditedGraph) -> Apart:
    """Open each recurrent node of one direction that torch's layer computes, if only such nodes read its weights."""
    found = {node: mode for node in graph.reader.nodes if (mode := _mode(graph, node)) is not None}
    places: dict[ir.Value, set[tuple[int, str]]] = {}
    for node, mode in found.items():
        for at, value in _weights(node):
            places.setdefault(value, set()).add((at, mode))
    # a weight that is read in two ways would come apart in two ways
    reads = {
        node: [(value, node) for _, value in _weights(node)]
        for node in found
        if all(len(places[value]) == 1 for _, value in _weights(node))
    }
    loops, parts = Apart(), dict[ir.Value, Parts]()
    graph.move_to_top()
    for node in closed(reads):
        for at, value in _weights(node):
            if value not in parts:
                parts[value] = _apart(found[node], at, value)
                loops.wholes.note(parts[value], value)
        loops.keep(graph, node)
        _open(graph, node, found[node], parts)
    for whole, made in parts.items():
        graph.exchange([whole], made)
    return loops


def _mode(graph: EditedGraph, node: ir.Node) -> str | None:
    """Return the mode of torch's layer that a node can be opened as; None if it has to stay."""
    if not is_recurrent(node) or graph.reader.around[node] is not node or graph.opset < _LEAST_OPSET:
        return None
    mode = mode_of(node)
    weights = _weights(node)
    if isinstance(mode, Refusal) or not first_output(node) or node.inputs[0] not in graph.reader.numbers:
        return None
    if {at for at, _ in weights} - {3} != {1, 2} or len({value for _, value in weights}) < len(weights):
        return None
    for at, value in weights:
        tensor = value.const_value
        if not value.is_initializer() or value.is_graph_output() or tensor is None or tensor.dtype not in FLOATS:
            return None
        shape = shape_of(tensor)
        if len(shape) != (2 if at == 3 else 3) or shape[0] != 1 or shape[1] % GATES[mode]:
            return None
    named = [weight for value in node.inputs[1:3] if (weight := graph.reader.weight(value)) is not None]
    open_before = not any(_was_node(graph, weight.name) for weight in named)
    return mode if open_before and all(map(graph.reader.is_named, named)) else None


def _was_node(graph: EditedGraph, name: str) -> bool:
    """Whether a weight is a factor of one that a node read: behind a view, or in a file of an earlier version."""
    # a loop reads matrices that are stored as (in, out)
    return any(is_factor_of(site, name) and entry.stored == "out_in" for site, entry in graph.record.sites.items())


def _weights(node: ir.Node) -> list[tuple[int, ir.Value]]:
    return [(at, value) for at in _WEIGHTS if at < len(node.inputs) and (value := node.inputs[at]) is not None]


def _apart(mode: str, at: int, value: ir.Value) -> Parts:
    """Return W or R as a matrix to multiply by, or the two biases of B."""
    [numbers] = to_torch(value.const_value)  # type: ignore[arg-type]  # it is an initializer
    if at != 3:
        return (like(to_torch_order(mode, numbers).mT, value),)
    first, second = (to_torch_order(mode, half) for half in numbers.chunk(2))
    return like(first, value), like(second, value, f"{value.name}.hh")


def _open(graph: EditedGraph, node: ir.Node, mode: str, parts: Mapping[ir.Value, Parts]) -> None:
    home = node.graph
    assert home is not None  # it is a node of the graph
    stem = node.name or first_output(node)
    write = writer(graph, stem, lambda made: home.insert_before(node, made))
    x, weights = node.inputs[0], dict(_weights(node))
    assert x is not None  # the graph has a number for it
    recurrent, biases = weights[2], parts[weights[3]] if 3 in weights else ()
    [value] = write("MatMul", x, *parts[weights[1]])
    # a GRU multiplies the second bias by its reset gate
    outside, inside = (biases[:1], biases[1:]) if mode == "GRU" else (biases, ())
    for each in outside:
        [value] = write("Add", value, each)
    like_states = to_torch(recurrent.const_value)[0, :1]  # type: ignore[arg-type]  # it is an initializer
    given = [node.inputs[at] if at < len(node.inputs) else None for at in _STATES[: 1 + (mode == "LSTM")]]
    states = [
        _zeros(graph, write, value, like_states) if state is None else one_axis(graph, write, "Squeeze", state, 0)
        for state in given
    ]
    body = _body(graph, mode, stem, recurrent, parts[recurrent][0], inside)
    ways = {f"scan_{end}_directions": [1] for end in ("input", "output")} if is_backwards(node) else {}
    *ends, rows = write("Scan", *states, value, outputs=len(states) + 1, body=body, num_scan_inputs=1, **ways)
    for at, (output, end) in enumerate(zip(node.outputs, (rows, *ends), strict=False)):
        if is_used(output):
            graph.stand_in(output, one_axis(graph, write, "Unsqueeze", end, AXES[at]), [])
    home.remove(node, safe=True)


def writer(graph: EditedGraph, stem: str, put: Callable[[ir.Node], None]) -> Write:
    """Return a function that makes a node, ``put``s it in its place, and returns its outputs."""

    def write(op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> list[ir.Value]:
        made = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        for output in made.outputs:
            output.name = graph.note_name(graph.new_name(f"{stem}.{op_type.lower()}"))
        put(made)
        return list(made.outputs)

    return write


def one_axis(graph: EditedGraph, write: Write, op_type: str, value: ir.Value, axis: int) -> ir.Value:
    """Return a value with one more axis of size 1 (Unsqueeze), or without one (Squeeze)."""
    if graph.opset < _AXES_AS_INPUT:
        return write(op_type, value, axes=[axis])[0]
    return write(op_type, value, graph.sizes(f"surgery.axis_{axis}", [axis]))[0]


def _zeros(graph: EditedGraph, write: Write, part: ir.Value, row: torch.Tensor) -> ir.Value:
    """Return states of zeros (N, H) for a part (T, N, G H), of the type of a row (1, H)."""
    [shape] = write("Shape", part)
    [batch] = write("Gather", shape, graph.sizes("surgery.axis_1", [1]), axis=0)
    [sizes] = write("Concat", batch, graph.sizes(f"surgery.size_{row.shape[1]}", [row.shape[1]]), axis=0)
    return write("ConstantOfShape", sizes, value=to_ir(row.new_zeros(1), ""))[0]


def _body(
    graph: EditedGraph, mode: str, stem: str, recurrent: ir.Value, weight: ir.Value, biases: Sequence[ir.Value]
) -> ir.Graph:
    """Return the graph of one step, which reads the recurrent weight and a bias from outside."""
    tensor = recurrent.const_value
    assert tensor is not None  # it is an initializer
    kind, width = ir.TensorType(tensor.dtype), shape_of(tensor)[2]
    nodes: list[ir.Node] = []
    write = writer(graph, f"{stem}.step", nodes.append)
    sizes = [width] * (1 + (mode == "LSTM")) + [GATES[mode] * width]
    names = [graph.note_name(graph.new_name(f"{stem}.step.{name}")) for name in ("h", "c", "part")]
    names = names if mode == "LSTM" else [names[0], names[2]]
    inputs = [ir.Value(name=name, type=kind, shape=ir.Shape([None, n])) for name, n in zip(names, sizes, strict=True)]
    [product] = write("MatMul", inputs[0], weight)
    for bias in biases:
        [product] = write("Add", product, bias)
    after = write_step(mode, write, inputs, product, graph.opset)
    # no value may be an output twice
    outputs = [*after, *write("Identity", after[0])]
    for output in outputs:
        output.type, output.shape = kind, ir.Shape([None, width])
    return ir.Graph(inputs, outputs, nodes=nodes, name=f"{stem}.step")
