"""The packed projections of attention in ONNX graphs: unpacked when a graph is opened, packed again at the end.

    Add(MatMul(x, in_proj_weight), b)    <->    Add(Concat(MatMul(x, q), MatMul(x, k), MatMul(x, v)), b)

Its rows become the initializers in_proj_q.weight, in_proj_k.weight and in_proj_v.weight, so that each is a site. What
no edit has changed gets its own nodes and initializer back. Other nodes are written anew, where all three parts are
whole; the last node keeps what the ones before were called, and the record says which weight was packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from surgery.algebra import Linear
from surgery.kinds.layers.attention import PROJECTIONS
from surgery.kinds.layers.unpacking import is_packed, part_weights
from surgery.kinds.onnx.chain import ChainWriter
from surgery.kinds.onnx.graph import EditedGraph, producer_of
from surgery.kinds.onnx.origin import Origin
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.weights import View, is_plain
from surgery.sites import Call

__all__ = ["Unpacked", "pack", "unpack"]

_ANY_AXIS = 11  # the first opset in which Concat counts axes from the end, and in which Gemm needs no bias
_VIEWS = ("Transpose", "Cast")


@dataclass(frozen=True)
class Unpacked:
    """What a graph had before: a weight and its nodes with what they read; and the products in their place.

    ``source`` and ``bias`` are among what the nodes read.
    """

    weight: ir.Value
    nodes: tuple[ir.Node, ...]
    reads: tuple[tuple[ir.Value | None, ...], ...]
    source: ir.Value
    bias: ir.Value | None
    products: tuple[ir.Node, ...]


def unpack(graph: EditedGraph) -> dict[str, Unpacked]:
    """Unpack each packed projection whose weight only one node uses; return what there was, by the weight's name."""
    if not any(map(is_packed, graph.reader.roots)):
        return {}
    calls = [each for each in graph.reader.elements if isinstance(each, Call) and is_packed(each.weight)]
    return {call.weight: _unpack_call(graph, call) for call in calls if _is_alone(graph, call)}


def _is_alone(graph: EditedGraph, call: Call) -> bool:
    root = graph.parameter(call.weight)
    free = all(graph.new_name(name) == name for name in part_weights(call.weight))
    # parts of a weight that something else reads would come apart
    alone = graph.reader.uses[call.weight] == {call.user} and root.is_initializer() and not root.is_graph_output()
    plain = isinstance(call.operator, Linear) and call.computed_bias is None and graph.opset >= _ANY_AXIS
    views = all(node.op_type in _VIEWS for node in _passing(graph.user(call)))
    return free and alone and plain and views and len(call.operator.weight) % len(PROJECTIONS) == 0


def _unpack_call(graph: EditedGraph, call: Call) -> Unpacked:
    old, source = graph.value(call.value), graph.value(call.source)
    weight = graph.parameter(call.weight)
    read = graph.reader.weight(graph.user(call).inputs[1])
    assert read is not None  # it is the weight of a call
    bias = None if call.bias is None else graph.parameter(call.bias)
    nodes = (*_passing(graph.user(call)), *dict.fromkeys(producer_of(graph.value(value)) for value in call.values))
    reads = tuple(tuple(node.inputs) for node in nodes)
    origin = Origin.of(nodes, weight)
    graph.move_to(weight)
    writer = ChainWriter(graph, turned=call.stored == "in_out")
    writer.start(source, producer_of(old))
    start, rows = writer.value, []
    # rows [0, E) are q, [E, 2E) are k and [2E, 3E) are v
    for name, numbers in zip(part_weights(call.weight), call.operator.weight.chunk(len(PROJECTIONS)), strict=True):
        writer.value, part = start, Linear(numbers)
        writer.named[id(part.weight)] = (name, part.weight)
        writer.views[name] = _resized(read.views, numbers.mT.shape if writer.turned else numbers.shape)
        writer.operator(part, gemm=graph.user(call).op_type == "Gemm", bias=None)
        rows.append(writer.value)
    [writer.value] = writer.add("Concat", *rows, axis=-1)
    if bias is not None:
        # the bias stays whole and is added to the concatenation, as it was added to the product
        writer.read("Add", bias)
    stand_in = writer.finish()
    graph.stand_in(old, stand_in, nodes[-len(call.values) :])
    graph.drop_unused(weight)
    origin.keep(writer.inserted[-1])
    graph.record = graph.record.with_packed(call.weight, PROJECTIONS)
    return Unpacked(weight, nodes, reads, source, bias, tuple(writer.inserted[: len(PROJECTIONS)]))


def _passing(node: ir.Node) -> list[ir.Node]:
    """Return the nodes that pass a weight on to the node that reads it, in order."""
    found: list[ir.Node] = []
    value = node.inputs[1]
    while value is not None and (before := value.producer()) is not None:
        found.insert(0, before)
        value = before.inputs[0]
    return found


def _resized(views: Sequence[View], shape: Sequence[int]) -> tuple[View, ...]:
    """Return the views through which a matrix of another shape is read in just the same way, without names."""
    found: list[View] = []
    for view in reversed(views):
        shape = tuple(view.undo(torch.empty(tuple(shape), device="meta")).shape)
        found.insert(0, replace(view.form, shape=shape))
    return tuple(found)


def pack(graph: EditedGraph, unpacked: Mapping[str, Unpacked]) -> None:
    """Pack the projections again wherever all three parts are single products."""
    if not graph.record.packed:
        return
    graph.reread()
    reader = graph.reader
    calls = {reader.node(each.value): each for each in reader.elements if isinstance(each, Call)}
    for node in [node for node in reader.nodes if node.op_type == "Concat" and is_plain(node)]:
        rows = [calls.get(value.producer()) for value in node.inputs if value is not None]  # type: ignore[arg-type]
        found = [call for call in rows if call is not None]
        packed = _packed(graph, node, found) if len(found) == len(rows) == len(node.inputs) else None
        if packed is None:
            continue
        before = unpacked.get(packed)
        products = tuple(reader.node(call.value) for call in found)
        last, bias = _with_bias(reader, node, sum(len(call.operator.weight) for call in found))
        old = (*([] if last is node else [last]), node, *products)
        graph.move_to(graph.parameter(found[0].weight))
        if before is not None and before.products == products and (before.bias is None) == (bias is None):
            _put_back(graph, before, found[0], last, bias, old)
        else:
            _write(graph, packed, found, last, bias, old)
        for call in found:
            graph.drop_unused(graph.parameter(call.weight))
        graph.record = graph.record.without_packed(packed)


def _packed(graph: EditedGraph, node: ir.Node, calls: Sequence[Call]) -> str | None:
    """Return the name of the packed weight whose parts a concatenation joins; None for any other."""
    names = [call.weight for call in calls]
    packed = next((name for name in graph.record.packed if is_packed(name) and part_weights(name) == names), None)
    if packed is None or graph.new_name(packed) != packed:
        return None
    # three products of one value that only this concatenation reads, under the names that unpack gave their weights
    values = [graph.value(call.value) for call in calls]
    alone = all(len(value.uses()) == 1 and not value.is_graph_output() for value in values)
    plain = all(isinstance(call.operator, Linear) for call in calls)
    plain = plain and all(call.bias is None and call.computed_bias is None for call in calls)
    same = len({(call.source, call.stored, call.operator.weight.shape[1]) for call in calls}) == 1
    own = all(graph.reader.uses[call.weight] == {call.user} for call in calls)
    last = "axis" in node.attributes and node.attributes["axis"].value == -1
    return packed if alone and plain and same and own and last else None


def _with_bias(reader: Reader, node: ir.Node, width: int) -> tuple[ir.Node, ir.Value | None]:
    """Return the addition of the packed bias to a concatenation, and the bias; ``(node, None)`` if there is none."""
    added = reader.added(node, width)
    return (node, None) if added is None else (producer_of(added[0]), added[1].root)


def _put_back(
    graph: EditedGraph,
    before: Unpacked,
    first: Call,
    last: ir.Node,
    bias: ir.Value | None,
    old: Sequence[ir.Node],
) -> None:
    """Let the nodes of a packed weight stand where they stood, on what now stands for what they read."""
    now: dict[ir.Value | None, ir.Value | None] = {before.source: graph.value(first.source), before.bias: bias}
    graph.put_back(before.weight, beside=graph.parameter(first.weight))
    last.graph.insert_before(last, before.nodes)  # type: ignore[union-attr]
    for node, reads in zip(before.nodes, before.reads, strict=True):
        for at, read in enumerate(reads):
            node.replace_input_with(at, now.get(read, read))
    graph.stand_in(last.outputs[0], before.nodes[-1].outputs[0], old)


def _write(
    graph: EditedGraph,
    packed: str,
    calls: Sequence[Call],
    last: ir.Node,
    bias: ir.Value | None,
    old: Sequence[ir.Node],
) -> None:
    """Write one product in the place of three."""
    operator = Linear(torch.cat([call.operator.weight for call in calls]))
    read = graph.reader.weight(old[-1].inputs[1])
    assert read is not None  # it is the weight of a call
    writer = ChainWriter(graph, turned=calls[0].stored == "in_out")
    writer.named[id(operator.weight)] = (packed, operator.weight)
    writer.views[packed] = _resized(read.views, operator.weight.mT.shape if writer.turned else operator.weight.shape)
    writer.start(graph.value(calls[0].source), last)
    writer.operator(operator, gemm=all(node.op_type == "Gemm" for node in old[-len(calls) :]), bias=bias)
    origin = Origin.read(last)
    graph.stand_in(last.outputs[0], writer.finish(), old)
    origin.restore_nodes([*_passing(writer.inserted[0]), *writer.inserted], graph.names)
    origin.restore_weight(graph.home.initializers[packed])
