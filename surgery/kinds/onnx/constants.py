"""Weights that Constant nodes hold: initializers where edits have made them, and nodes again at the end.

    w = Constant "n"    y = MatMul(x, w)    <->    y = MatMul(MatMul(x, w.0.weight), w.1.weight)

The record keeps what is said of the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from surgery.kinds.onnx.graph import EditedGraph
from surgery.kinds.onnx.left import inside
from surgery.kinds.onnx.tensors import shape_of
from surgery.kinds.onnx.weights import held

__all__ = ["first_user", "hold_again", "note_constants"]


def note_constants(graph: EditedGraph) -> dict[str, Any]:
    """Return what is said of each node that holds a weight, by the weight's name, as JSON values."""
    nodes = {name: value.producer() for name, value in graph.reader.roots.items()}
    return {name: _described(node) for name, node in nodes.items() if node is not None}


def hold_again(graph: EditedGraph, noted: Mapping[str, Any]) -> None:
    """Let nodes hold the weights that they held when the graph was opened, or before; the record keeps the others."""
    known = {**graph.record.constants, **noted}
    if not known:
        return
    graphs = (graph.graph, *graph.graph.subgraphs())
    given = {output.name for inner in graphs for node in inner for output in node.outputs}
    known = {name: said for name, said in known.items() if name not in given}
    for name, said in list(known.items()):
        # while a recurrent layer is open as a loop, a weight of another shape may have the name
        found = (inner.initializers[name] for inner in graphs if name in inner.initializers)
        weight = next((each for each in found if _is_whole(each, said)), None)
        if weight is not None:
            _hold(graph, weight, said)
            del known[name]
    graph.record = replace(graph.record, constants=known)


def _described(node: ir.Node) -> dict[str, Any]:
    tensor = held(node.outputs[0])
    assert tensor is not None  # the node holds a weight
    said = {
        "name": node.name,
        "doc": node.doc_string,
        "metadata": dict(node.metadata_props),
        "list": "value_ints" in node.attributes,  # of sizes or axes
        "typed": node.outputs[0].type is not None,
    }
    return {"shape": list(shape_of(tensor)), **{key: value for key, value in said.items() if value}}


def _is_whole(weight: ir.Value, said: Any) -> bool:
    """Whether an initializer is a weight as a Constant node held it, by what is said of that."""
    tensor = weight.const_value
    alike = isinstance(said, dict) and tensor is not None and said.get("shape") == list(shape_of(tensor))
    return alike and bool(weight.uses()) and not weight.is_graph_output()


def _hold(graph: EditedGraph, weight: ir.Value, said: Mapping[str, Any]) -> None:
    """Let a Constant node in front of its first user hold the numbers of an initializer."""
    home, tensor, name = weight.graph, weight.const_value, weight.name or ""
    assert isinstance(home, ir.Graph)  # it is one of its initializers
    assert tensor is not None
    listed = said.get("list") is True and tensor.dtype == ir.DataType.INT64 and len(tensor.shape) == 1
    numbers = ir.AttrInt64s("value_ints", tensor.numpy().tolist()) if listed else ir.AttrTensor("value", tensor)
    metadata = said.get("metadata")
    node = ir.Node(
        "",
        "Constant",
        [],
        [numbers],
        num_outputs=1,
        name=str(said.get("name", "")),
        doc_string=str(said["doc"]) if "doc" in said else None,
        metadata_props={str(key): str(text) for key, text in metadata.items()} if isinstance(metadata, dict) else {},
    )
    value = node.outputs[0]
    if said.get("typed") is True:
        value.type, value.shape = weight.type, weight.shape
    home.insert_before(first_user(home, [use.node for use in weight.uses()]), [node])
    ir.convenience.replace_all_uses_with(weight, value)
    graph.drop_unused(weight)
    value.name = graph.note_name(name)


def first_user(home: ir.Graph, users: list[ir.Node]) -> ir.Node:
    """Return the first node of a graph that is one of these, or has one in a body."""
    wanted = set(users)
    return next(node for node in home if node in wanted or not wanted.isdisjoint(inside(node)))
