"""Close loops: a Scan that is a recurrent layer with whole weights becomes the node that it was, or a new one.

Closed are the loops that were opened for an edit, also in an earlier session, as the record knows; and those in which
an edit has put a whole weight in the place of a chain, as in a file that torch's exporter wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from surgery.kinds.onnx.graph import EditedGraph, producer_of
from surgery.kinds.onnx.kept_node import made_again
from surgery.kinds.onnx.loops import AXES, one_axis, writer
from surgery.kinds.onnx.modes import GATES, OP_TYPES, attributes_of_mode, is_backwards, mode_of, to_onnx
from surgery.kinds.onnx.one_node import captured_by, is_used
from surgery.kinds.onnx.parts import Apart, Parts, closed, like
from surgery.kinds.onnx.steps import Layer, Write, biases_before
from surgery.kinds.onnx.tensors import shape_of, to_torch
from surgery.kinds.onnx.weights import held, is_plain
from surgery.sites import Call

__all__ = ["close_loops"]

_STARTS = ("Squeeze", "ConstantOfShape", "Concat", "Gather", "Shape")  # what makes the states of a loop


@dataclass(frozen=True, eq=False)
class _Loop:
    """A loop with whole weights: the products by them, the biases, the additions of these, and its ends.

    ``flip`` is the node that puts the steps in another order before the loop, if any. ``ends`` are the nodes that give
    an output the axis of the directions, by the place of the output.
    """

    layer: Layer
    first: Call
    step: Call
    biases: Parts
    additions: tuple[ir.Node, ...]
    flip: ir.Node | None
    ends: Mapping[int, ir.Node]

    def reads(self, graph: EditedGraph) -> list[tuple[ir.Value, ir.Node]]:
        """Return the weights, each with a node that reads it; those of both products first."""
        products = [(graph.parameter(call.weight), graph.user(call)) for call in (self.first, self.step)]
        return [*products, *((v, use.node) for v in self.biases for use in v.uses() if self._has(use.node))]

    def _has(self, node: ir.Node) -> bool:
        return node in self.additions or node.graph is self.layer.body


def close_loops(graph: EditedGraph, loops: Apart) -> None:
    """Write nodes in the places of all loops that can be closed."""
    if not graph.record.layers and not graph.fused:
        return
    graph.reread()
    graph.move_to_top()
    found = [loop for layer in graph.reader.layers.values() if (loop := _whole(graph, layer)) is not None]
    wholes: dict[Parts, ir.Value] = {}
    for loop in closed({loop: loop.reads(graph) for loop in found}):
        names = [end.outputs[0].name or "" for end in loop.ends.values()]
        key = next((name for name in names if name in graph.record.layers), None)
        if key is not None or graph.fused & {graph.user(loop.first), graph.user(loop.step)}:
            _close(graph, loops, loop, key, wholes)
            graph.record = graph.record if key is None else graph.record.without_layer(key)
    for parts, whole in wholes.items():
        graph.exchange(parts, [whole])


# -- find -------------------------------------------------------------------------------------------------------------


def _whole(graph: EditedGraph, layer: Layer) -> _Loop | None:
    """Return a loop whose weights are single matrices that only it reads; None for any other."""
    reader = graph.reader
    calls = {each.value: each for each in reader.elements if isinstance(each, Call)}
    additions = tuple(biases_before(layer.part))
    flip = _flip(layer.part)
    value = _summed(additions[0]) if additions else layer.part if flip is None else flip.inputs[0]
    if value is None:
        return None
    first, step = calls.get(reader.numbers.get(value, -1)), calls.get(reader.numbers[layer.product])
    if first is None or step is None or step.source != reader.numbers[layer.hidden]:
        return None
    biases = (*map(_shift, additions), *(() if layer.bias is None else (layer.bias,)))
    loop = _Loop(layer, first, step, biases, additions, flip, _ends(layer))
    return loop if _is_plain(graph, loop) and _is_apart(graph, loop, value) else None


def _is_plain(graph: EditedGraph, loop: _Loop) -> bool:
    """Whether the weights and the biases of a loop have the form of those of a node."""
    first, step, mode = loop.first, loop.step, loop.layer.mode
    rows = GATES[mode] * step.operator.weight.shape[1]
    parameters = [*loop.biases, *(graph.parameter(call.weight) for call in (first, step))]
    # a GRU adds one bias outside of its loop and one inside
    counts = (len(loop.additions), len(loop.biases)) in ((0, 0), (1 if mode == "GRU" else 2, 2))
    return (
        counts
        and not first.view
        and not step.view
        and [first.operator.bias, step.operator.bias, first.computed_bias, step.computed_bias] == [None] * 4
        and len(step.operator.weight) == len(first.operator.weight) == rows
        and all(shape_of(value.const_value) == (rows,) for value in loop.biases if value.const_value is not None)
        and all(value.is_initializer() and not value.is_graph_output() for value in parameters)
    )


def _is_apart(graph: EditedGraph, loop: _Loop, product: ir.Value) -> bool:
    """Whether nothing else reads what stands between the product by the input weight and the loop."""
    layer, passing = loop.layer, (*loop.additions, *([] if loop.flip is None else [loop.flip]))
    between = [product, *(node.outputs[0] for node in passing)]
    own = {layer.scan, *passing, *_starts(layer)}
    nodes = (*passing, producer_of(product))
    return (
        between[-1] is layer.part
        and all(node.graph is layer.scan.graph for node in nodes)
        and not any(value.is_graph_output() for value in between)
        and all(use.node in own for value in between for use in value.uses())
    )


def _starts(layer: Layer) -> set[ir.Node]:
    """Return the nodes that make the states of a loop and nothing else."""
    found: set[ir.Node] = set()
    waiting = list(layer.states)
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in found or node.op_type not in _STARTS or not is_plain(node):
            continue
        if all(use.node in {layer.scan, *found} for output in node.outputs for use in output.uses()):
            found.add(node)
            waiting += [value for value in node.inputs if value is not None]
    return found


def _flip(part: ir.Value) -> ir.Node | None:
    """Return the Slice of steps that gives a value; None if no such node does."""
    node = part.producer()
    if node is None or node.op_type != "Slice" or not is_plain(node) or len(node.inputs) < 4:
        return None
    axes = held(node.inputs[3])
    return node if axes is not None and axes.numpy().tolist() == [0] else None


def _shift(addition: ir.Node) -> ir.Value:
    return next(value for value in addition.inputs if value is not None and _is_vector(value))


def _summed(addition: ir.Node) -> ir.Value:
    return next(value for value in addition.inputs if value is not None and not _is_vector(value))


def _is_vector(value: ir.Value) -> bool:
    numbers = held(value)
    return numbers is not None and len(numbers.shape) == 1


def _outputs(layer: Layer) -> list[ir.Value]:
    """Return the outputs of a loop in the order of those of a node: all steps, then the last states."""
    *states, rows = layer.scan.outputs
    return [rows, *states]


def _ends(layer: Layer) -> dict[int, ir.Node]:
    ends: dict[int, ir.Node] = {}
    for at, value in enumerate(_outputs(layer)):
        users = [use.node for use in value.uses()]
        if len(users) == 1 and not value.is_graph_output() and _axes(users[0], "Unsqueeze") == [AXES[at]]:
            ends[at] = users[0]
    return ends


def _axes(node: ir.Node | None, op_type: str) -> list[int] | None:
    if node is None or node.op_type != op_type or not is_plain(node):
        return None
    said = held(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.attributes["axes"].value if "axes" in node.attributes else None if said is None else said.numpy()
    return None if axes is None else [int(axis) for axis in axes]


# -- close ------------------------------------------------------------------------------------------------------------


def _close(graph: EditedGraph, loops: Apart, loop: _Loop, key: str | None, wholes: dict[Parts, ir.Value]) -> None:
    layer, home = loop.layer, loop.layer.scan.graph
    assert home is not None  # it is a node of the graph
    node = _node(graph, loops, loop, key)
    home.insert_before(layer.scan, node)
    reads = loop.reads(graph)
    groups: list[Parts] = [(reads[0][0],), (reads[1][0],), loop.biases]
    for parts in groups:
        if parts and parts not in wholes:
            wholes[parts] = loops.wholes.of(parts) or _joined(layer.mode, loop, parts)
    write = writer(graph, node.name or "state", lambda made: home.insert_before(node, made))
    states = [_start(graph, write, value) for value in layer.states]
    source = graph.value(loop.first.source)
    if loop.flip is not None:  # it may as well stand before the product
        [source] = write("Slice", source, *[value for value in loop.flip.inputs[1:] if value is not None])
    given = [source, *(wholes.get(parts) for parts in groups), None, *states]
    while given[-1] is None:
        given.pop()
    if len(given) > len(node.inputs):
        node.resize_inputs(len(given))
    for at in range(len(node.inputs)):
        node.replace_input_with(at, given[at] if at < len(given) else None)
    others = {value for end in loop.ends.values() for value in end.inputs[1:]}.union(captured_by(layer.scan))
    others -= {value for value, _ in reads}
    write = writer(graph, node.name or "loop", lambda made: home.insert_before(layer.scan, made))
    for at, value in enumerate(_outputs(layer)):
        if at in loop.ends:
            graph.stand_in(loop.ends[at].outputs[0], node.outputs[at], [loop.ends[at]])
        elif is_used(value):
            node.outputs[at].name = graph.note_name(graph.new_name(f"{value.name}.node"))
            graph.stand_in(value, one_axis(graph, write, "Squeeze", node.outputs[at], AXES[at]), [])
    _remove(graph, loop, [*layer.states, *sorted(filter(None, others), key=lambda value: value.name or "")])


def _node(graph: EditedGraph, loops: Apart, loop: _Loop, key: str | None) -> ir.Node:
    """Return the node that a loop was, if that still computes the same, or else a new one."""
    layer, hidden = loop.layer, loop.step.operator.weight.shape[1]
    if key is not None and (own := loops.nodes.get(key)) is not None:
        return own
    known = None if key is None else made_again(graph.record.layers[key])
    used = max(at for at, value in enumerate(_outputs(layer)) if at in loop.ends or is_used(value))
    if known is not None and mode_of(known) == layer.mode and is_backwards(known) == layer.backwards:
        size = known.attributes.get("hidden_size")
        if len(known.outputs) > used and (size is None or size.value == hidden):
            for at, output in enumerate(known.outputs):
                if at in loop.ends or output.name in graph.names:
                    output.name = ""
            graph.names.update(output.name for output in known.outputs if output.name)
            return known
    attributes = attributes_of_mode(layer.mode, hidden, backwards=layer.backwards)
    made = ir.node(OP_TYPES[layer.mode], [None], attributes, num_outputs=used + 1, name=layer.scan.name)
    for output in made.outputs:
        output.name = ""
    return made


def _joined(mode: str, loop: _Loop, parts: Parts) -> ir.Value:
    """Return W or R of one direction from the matrix of a product, or B from two biases."""
    if parts == loop.biases:
        numbers = [to_onnx(mode, to_torch(part.const_value)) for part in parts]  # type: ignore[arg-type]
        return like(torch.cat(numbers)[None], parts[0])
    call = next(call for call in (loop.first, loop.step) if call.weight == parts[0].name)
    weight: Tensor = call.operator.weight
    return like(to_onnx(mode, weight)[None], parts[0])


def _start(graph: EditedGraph, write: Write, state: ir.Value) -> ir.Value | None:
    """Return the states (1, N, H) that a loop starts from; None for zeros, which need not be given."""
    node = state.producer()
    if node is not None and _axes(node, "Squeeze") == [0]:
        return node.inputs[0]
    if node is not None and node.op_type == "ConstantOfShape" and is_plain(node):
        value = node.attributes.get("value")
        if value is None or not value.value.numpy().any():
            return None
    numbers = held(state)
    if numbers is not None and not numbers.numpy().any():
        return None
    return one_axis(graph, write, "Unsqueeze", state, 0)


def _remove(graph: EditedGraph, loop: _Loop, reads: Sequence[ir.Value | None]) -> None:
    """Remove the nodes of a loop, and what makes the values that it read, if nothing else reads these."""
    scan = loop.layer.scan
    for node in loop.layer.body:
        for at in range(len(node.inputs)):
            node.replace_input_with(at, None)
    rest = [*([] if loop.flip is None else [loop.flip]), *loop.additions, graph.user(loop.first)]
    scan.graph.remove(scan, safe=True)  # type: ignore[union-attr]
    for value in dict.fromkeys(reads):
        if value is not None:
            _sweep(graph, value)
    rest[0].graph.remove(rest, safe=True)  # type: ignore[union-attr]


def _sweep(graph: EditedGraph, value: ir.Value) -> None:
    """Remove what makes the states of a loop, from the last node on, as long as nothing reads it."""
    node = value.producer()
    if value.uses() or value.is_graph_output():
        return
    if node is None:
        graph.drop_unused(value)
    if node is None or node.op_type not in _STARTS or not is_plain(node):
        return
    read = [each for each in node.inputs if each is not None]
    assert node.graph is not None  # it is a node of the graph
    node.graph.remove(node, safe=True)
    for each in read:
        _sweep(graph, each)
