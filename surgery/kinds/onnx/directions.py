"""Recurrent nodes of both directions: split when a graph is opened, so that each is a site; joined at the end.

    y = LSTM<both>(x, W, R, B)    <->    y = Concat(LSTM<forward>(x, W, R, B), LSTM<reverse>(x, W_reverse, ...))

The forward half keeps the names of the weights. The record keeps the node as it was. Halves are joined again where no
edit has changed them, or where both are whole again. What was never changed gets its own node and weights back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from surgery.kinds.onnx.graph import EditedGraph
from surgery.kinds.onnx.kept_node import first_output, made_again
from surgery.kinds.onnx.left import is_recurrent
from surgery.kinds.onnx.one_node import is_used
from surgery.kinds.onnx.parts import Apart, closed, like
from surgery.kinds.onnx.tensors import FLOATS, to_torch
from surgery.kinds.onnx.weights import is_plain
from surgery.sites import site_name
from surgery.sites.segments import is_factor_of

__all__ = ["join_directions", "split_directions"]

_WEIGHTS = (1, 2, 3, 7)  # the inputs W, R, B and P, whose first axis has the directions
_STATES = (5, 6)
_BOTH, _WAYS = "bidirectional", ("forward", "reverse")
_COUNTED_SPLIT = 18  # the first opset in which Split has to be told the number of parts
_AXIS = (1, 0, 0)  # of the directions, in each output

Pair = tuple[ir.Value, ir.Value]


# -- split ------------------------------------------------------------------------------------------------------------


def split_directions(graph: EditedGraph) -> Apart:
    """Split each node of both directions whose weights only such nodes read."""
    found = [node for node in graph.reader.nodes if _is_splittable(graph, node)]
    nodes = closed({node: [(value, node) for value in _weights(node)] for node in found})
    halves, pairs = Apart(), dict[ir.Value, Pair]()
    for value in dict.fromkeys(value for node in nodes for value in _weights(node)):
        numbers = to_torch(value.const_value)  # type: ignore[arg-type]  # it is an initializer
        pairs[value] = (like(numbers[:1], value), like(numbers[1:], value, _reversed(value.name or "")))
        halves.wholes.note(pairs[value], value)
    for node in nodes:
        halves.keep(graph, node)
        _split(graph, node, pairs)
    for whole, pair in pairs.items():
        graph.exchange([whole], pair)
    return halves


def _is_splittable(graph: EditedGraph, node: ir.Node) -> bool:
    said = {name: attribute.value for name, attribute in node.attributes.items()}
    if not is_recurrent(node) or said.get("direction") != _BOTH or said.get("layout", 0) or not first_output(node):
        return False
    if "activation_alpha" in said or "activation_beta" in said or graph.reader.around[node] is not node:
        return False
    weights = _weights(node)
    named = [value.name or "" for value in node.inputs[1:3] if value is not None]
    return (
        all(value.is_initializer() and not value.is_graph_output() for value in weights)
        and all(value.const_value is not None and value.const_value.dtype in FLOATS for value in weights)
        and all(value.const_value is not None and tuple(value.const_value.shape)[:1] == (2,) for value in weights)
        # files of an earlier version have one chain for both directions
        and not _has_factor(graph, named)
    )


def _has_factor(graph: EditedGraph, names: Iterable[str]) -> bool:
    return any(is_factor_of(site, name) for name in names for site in graph.record.sites)


def _weights(node: ir.Node) -> list[ir.Value]:
    return [value for at in _WEIGHTS if at < len(node.inputs) and (value := node.inputs[at]) is not None]


def _reversed(name: str) -> str:
    """Return the name of a weight in the other direction, as torch has it.

    >>> _reversed("gru.ih_l0.weight"), _reversed("W")
    ('gru.ih_l0_reverse.weight', 'W_reverse')
    """
    site = site_name(name)
    return f"{site}_reverse{name.removeprefix(site)}"


def _split(graph: EditedGraph, node: ir.Node, pairs: Mapping[ir.Value, Pair]) -> None:
    home = node.graph
    assert home is not None  # it is a node of the graph
    rows: list[Sequence[ir.Value | None]] = []
    for at, value in enumerate(node.inputs):
        if value is not None and at in _STATES:
            more = [] if graph.opset < _COUNTED_SPLIT else [ir.AttrInt64("num_outputs", 2)]
            split = ir.Node("", "Split", [value], [ir.AttrInt64("axis", 0), *more], num_outputs=2)
            for output, way in zip(split.outputs, _WAYS, strict=True):
                output.name = graph.note_name(graph.new_name(f"{value.name}.{way}"))
            home.insert_before(node, split)
            rows.append(split.outputs)
        else:
            rows.append(pairs.get(value, (value, value)) if value is not None else (None, None))
    halves = [_half(graph, node, side, [row[side] for row in rows]) for side in range(2)]
    home.insert_before(node, halves)
    for at, output in enumerate(node.outputs):
        if is_used(output):
            ends = [half.outputs[at] for half in halves]
            concat = ir.Node("", "Concat", ends, [ir.AttrInt64("axis", _AXIS[at])], num_outputs=1)
            home.insert_before(node, concat)
            graph.stand_in(output, concat.outputs[0], [])
    home.remove(node, safe=True)


def _half(graph: EditedGraph, node: ir.Node, side: int, inputs: Sequence[ir.Value | None]) -> ir.Node:
    attributes = _common(node) | {"direction": ir.AttrString("direction", _WAYS[side])}
    if (both := node.attributes.get("activations")) is not None:
        names, count = list(both.value), len(both.value) // 2
        attributes["activations"] = ir.AttrStrings("activations", names[count:] if side else names[:count])
    name = f"{node.name}_reverse" if side and node.name else node.name
    half = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
    for old, new in zip(node.outputs, half.outputs, strict=True):
        new.name = graph.note_name(graph.new_name(f"{old.name}.{_WAYS[side]}")) if is_used(old) else ""
    return half


def _common(node: ir.Node) -> dict[str, ir.Attr]:
    """Return the attributes that both directions share."""
    return {name: value for name, value in node.attributes.items() if name not in ("direction", "activations")}


def _values(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in _common(node).items()}


# -- join -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Join:
    """Two halves, the node that they become, and the concatenations of their outputs by place."""

    key: str
    halves: tuple[ir.Node, ir.Node]
    node: ir.Node
    ends: Mapping[int, ir.Node]


def join_directions(graph: EditedGraph, halves: Apart) -> None:
    """Join the halves of each node of the record wherever both are whole."""
    if not graph.record.layers:
        return
    graph.reread()
    given = {value.name: value for node in graph.reader.nodes for value in node.outputs if value.name}
    found = [join for key in graph.record.layers if (join := _find(graph, halves, given.get(key), key)) is not None]
    wholes: dict[Pair, ir.Value] = {}
    for join in closed({join: [(value, half) for half in join.halves for value in _weights(half)] for join in found}):
        _join(graph, halves, join, wholes)
        graph.record = graph.record.without_layer(join.key)
    for pair, whole in wholes.items():
        graph.exchange(pair, [whole])


def _find(graph: EditedGraph, halves: Apart, value: ir.Value | None, key: str) -> _Join | None:
    last = None if value is None else value.producer()
    before = () if last is None else tuple(read.producer() for read in last.inputs if read is not None)
    found = [half for half in before if half is not None and is_recurrent(half)]
    node = halves.nodes.get(key) or made_again(graph.record.layers[key])
    if node is None or len(found) != 2 or len(before) != 2 or not _fit(node, *found):
        return None
    ends = _ends(*found)
    names = [read.name or "" for half in found for read in half.inputs[1:3] if read is not None]
    if ends is None or max(ends) >= len(node.outputs) or _has_factor(graph, names):
        return None
    return _Join(key, (found[0], found[1]), node, ends)


def _fit(node: ir.Node, first: ir.Node, second: ir.Node) -> bool:
    """Whether a node of both directions has the attributes of two halves, and can read what they read."""
    ways = [half.attributes.get("direction") for half in (node, first, second)]
    said = ["forward" if way is None else way.value for way in ways]
    names = [half.attributes.get("activations") for half in (node, first, second)]
    both, *each = [[] if row is None else list(row.value) for row in names]
    reads = [(first.inputs[at : at + 1], second.inputs[at : at + 1]) for at in range(8)]
    pairs = [(next(iter(a), None), next(iter(b), None)) for a, b in reads]
    return (
        said == [_BOTH, *_WAYS]
        and first.op_type == second.op_type == node.op_type
        and _values(first) == _values(second) == _values(node)
        and both == [*each[0], *each[1]]
        and all(at < len(node.inputs) or pair == (None, None) for at, pair in enumerate(pairs))
        and all(_are_halves(at, *pair) for at, pair in enumerate(pairs))
    )


def _are_halves(at: int, first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether two values are the halves of one input: the same value, two weights, or the two parts of a split."""
    if first is None or second is None or at not in (*_WEIGHTS, *_STATES):
        return first is second
    if at in _WEIGHTS:
        shapes = [None if each.const_value is None else tuple(each.const_value.shape) for each in (first, second)]
        return first.is_initializer() and second.is_initializer() and shapes[0] == shapes[1]
    split = first.producer()
    axis = None if split is None else split.attributes.get("axis")
    along = axis is None or axis.value == 0
    plain = split is not None and split.op_type == "Split" and is_plain(split) and len(split.inputs) == 1
    return plain and along and split is not None and list(split.outputs) == [first, second]


def _ends(first: ir.Node, second: ir.Node) -> dict[int, ir.Node] | None:
    """Return the concatenations of the outputs of two halves; None if anything else reads an output."""
    ends: dict[int, ir.Node] = {}
    for at, outputs in enumerate(zip(first.outputs, second.outputs, strict=False)):
        if not any(map(is_used, outputs)):
            continue
        users = {use.node for output in outputs for use in output.uses()}
        user = users.pop() if len(users) == 1 else None
        axis = None if user is None else user.attributes.get("axis")
        if user is None or user.op_type != "Concat" or not is_plain(user) or axis is None or axis.value != _AXIS[at]:
            return None
        if list(user.inputs) != list(outputs) or any(output.is_graph_output() for output in outputs):
            return None
        ends[at] = user
    return ends or None


def _join(graph: EditedGraph, halves: Apart, join: _Join, wholes: dict[Pair, ir.Value]) -> None:
    node, (first, second) = join.node, join.halves
    home, splits = second.graph, []
    assert home is not None  # they are nodes of the graph
    # behind the halves, as everything that they read is there
    home.insert_before(min(join.ends.values(), key=list(home).index), node)
    for at, (one, other) in enumerate(zip(first.inputs, second.inputs, strict=False)):
        if one is not None and other is not None and at in _WEIGHTS:
            if (one, other) not in wholes:
                wholes[one, other] = halves.wholes.of((one, other)) or _whole(one, other)
            node.replace_input_with(at, wholes[one, other])
        elif one is not None and at in _STATES:
            split = one.producer()
            assert split is not None  # the halves of a state are the outputs of a Split
            splits.append(split)
            node.replace_input_with(at, split.inputs[0])
        else:
            node.replace_input_with(at, one)
    for output in (each for at, each in enumerate(node.outputs) if at not in join.ends and each.name):
        if join.key not in halves.nodes:
            output.name = "" if output.name in graph.names else graph.note_name(output.name)  # type: ignore[arg-type]
    for at, concat in join.ends.items():
        graph.stand_in(concat.outputs[0], node.outputs[at], [concat])
    home.remove([first, second], safe=True)
    for split in splits:
        if not any(output.uses() for output in split.outputs) and split.graph is home:
            home.remove(split, safe=True)


def _whole(one: ir.Value, other: ir.Value) -> ir.Value:
    return like(torch.cat([to_torch(value.const_value) for value in (one, other)]), one)  # type: ignore[arg-type]
