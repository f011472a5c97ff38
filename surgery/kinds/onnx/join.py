"""Put the stages of an ONNX model together again: its nodes and weights lie in the stages, the rest in a frame.

The frame is a message of the whole model without what its nodes and weights are: of each node the names of what it
gives are left, of each weight its name, type and shape. It keeps the order of all, and what the model says of inputs,
outputs, values and itself. A row of places says where each node lies: in a stage, or, if it computes a
constant, under the name of that in each stage that reads it.

    stages [a, b, k] and [k, c]     places [0, 0, "k", 1]     ->     a, b, k, c
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from surgery.errors import FileError, InputError
from surgery.kinds.onnx.layout import KEEPS_OUTSIDE, SOURCES, note_layout
from surgery.kinds.onnx.left import inside
from surgery.kinds.onnx.origin import configured
from surgery.kinds.onnx.places import memory_of
from surgery.kinds.onnx.proto import keep_sparse, read_proto, write_proto
from surgery.kinds.onnx.tensors import shape_of

__all__ = ["Place", "detached", "frame_of", "join_stages"]

Place: TypeAlias = int | str
_MOST = 1 << 28  # letters of a frame
_FIELDS = {"frame": str, "places": list, "functions": list, "outside": bool}


def frame_of(model: ir.Model, places: Sequence[Place]) -> dict[str, Any]:
    """Return the JSON values from which ``join_stages`` makes a model again, together with its stages."""
    bare = model.clone()
    note_layout(bare)
    for value in bare.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = _empty(value.const_value)
    detached(bare.graph)
    outside = bool(bare.graph.meta.get(KEEPS_OUTSIDE))
    functions = [list(key) for key in model.functions]
    bare.functions.clear()
    proto = write_proto(bare)
    for node in proto.graph.node:
        outputs = list(node.output)
        node.Clear()
        node.output.extend(outputs)
    for tensor in proto.graph.initializer:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    frame = base64.b64encode(proto.SerializeToString(deterministic=True)).decode()
    return {"frame": frame, "places": list(places), "functions": functions, "outside": outside}


def detached(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """Return nodes that are on their way out of a graph, once they and their bodies read nothing any more."""
    found = list(nodes)
    for node in found:
        for each in (node, *inside(node)):
            for at in range(len(each.inputs)):
                each.replace_input_with(at, None)
    return found


def _empty(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a tensor that says its name, type and shape; its numbers are nowhere."""
    shape = ir.Shape(shape_of(tensor))
    return ir.ExternalTensor("", 0, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or "")


def join_stages(given: Sequence[ir.Model], said: Mapping[str, Any]) -> ir.Model:
    """Return the model that was taken apart, with the nodes and the numbers that its stages have now.

    Raises:
        InputError: what is said of the whole, which may come from anywhere, is damaged, or is of other stages.
    """
    if not all(isinstance(said.get(name), kind) for name, kind in _FIELDS.items()):
        _refuse("no frame of an ONNX model")
    stages = [stage.clone() for stage in given]
    whole = _read_frame(said["frame"])
    nodes = _nodes(stages, said["places"])
    stubs = list(whole.graph)
    names = [[value.name for value in node.outputs] for node in nodes]
    if names != [[value.name for value in stub.outputs] for stub in stubs]:
        _refuse("other nodes")
    _functions(whole, stages, said["functions"])
    _initializers(whole, stages)
    with configured(nodes):
        _wire(whole, stages, nodes, stubs)
    keep_sparse(whole, stages)
    if said["outside"]:
        whole.graph.meta[KEEPS_OUTSIDE] = True
    sources = [source for stage in given for source in stage.graph.meta.get(SOURCES, ())]
    if sources:
        whole.graph.meta[SOURCES] = ("", *sources)
    return whole


def _refuse(what: str) -> NoReturn:
    raise InputError(f"the stages do not fit each other: {what}", next_step="split the model again")


def _read_frame(text: str) -> ir.Model:
    if len(text) > _MOST:
        _refuse(f"a frame of {len(text)} letters, of at most {_MOST}")
    try:
        proto = onnx.ModelProto.FromString(base64.b64decode(text, validate=True))
        graph = proto.graph
        tensors = graph.initializer
        full = any(tensor.data_location or tensor.ByteSize() > 2**16 + 9 * len(tensor.dims) for tensor in tensors)
        inner = any(node.attribute or node.input for node in graph.node)
        if proto.functions or full or inner or graph.sparse_initializer:
            _refuse("a frame with nodes or numbers of its own")
        return read_proto(proto)
    except (InputError, FileError):
        raise
    except Exception as error:  # protobuf's and onnx_ir's own errors have no base
        raise InputError("the frame of the stages is damaged", next_step="split the model again") from error


def _nodes(stages: Sequence[ir.Model], places: Sequence[Any]) -> list[ir.Node]:
    """Return the nodes of the whole in order; of the copies of a constant the first, once they are compared."""
    # Invariant: ``heads`` has of each stage the first node that is not placed yet. A name takes it from each stage
    # whose head gives that constant, a number from that stage. At the end, none is left.
    waiting: list[Iterator[ir.Node]] = [iter(list(stage.graph)) for stage in stages]
    heads: list[ir.Node | None] = [next(row, None) for row in waiting]
    found: list[ir.Node] = []
    for place in places:
        if isinstance(place, str):
            at = [number for number, head in enumerate(heads) if head is not None and _gives(head, place)]
        else:
            at = [place] if type(place) is int and 0 <= place < len(stages) else []
        copies = [head for number in at if (head := heads[number]) is not None]
        if not copies or len(copies) != len(at):
            _refuse("a node is missing")
        first, *others = copies
        if others and any(ir.to_proto(each) != ir.to_proto(first) for each in others):
            _refuse(f"{place} has other numbers in another stage")
        for number in at:
            heads[number] = next(waiting[number], None)
        found.append(first)
    if any(head is not None for head in heads):
        _refuse("a node too many")
    return found


def _gives(node: ir.Node, name: str) -> bool:
    return bool(node.outputs) and node.outputs[0].name == name


def _functions(whole: ir.Model, stages: Sequence[ir.Model], said: Sequence[Any]) -> None:
    """Give the whole the functions of its stages, in its order."""
    found = {key: function for stage in reversed(stages) for key, function in stage.functions.items()}
    order = [tuple(key) if isinstance(key, list) else key for key in said]
    if len(set(map(repr, order))) != len(order) or set(map(repr, order)) != set(map(repr, found)):
        _refuse("other functions")
    for key in order:
        whole.functions[key] = found[key]


def _initializers(whole: ir.Model, stages: Sequence[ir.Model]) -> None:
    """Give the initializers of the whole the numbers that they have in the stages."""
    found: dict[str, ir.TensorProtocol] = {}
    for stage in stages:
        for name, value in stage.graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            if not _same(found.setdefault(name, tensor), tensor):
                _refuse(f"{name} has other numbers in another stage")
    if found.keys() != whole.graph.initializers.keys():
        _refuse("other weights")
    for name, tensor in found.items():
        value = whole.graph.initializers[name]
        held = value.const_value
        if held is None or held.dtype != tensor.dtype or shape_of(held) != shape_of(tensor):
            _refuse(f"{name} has another type or shape")
        value.const_value = tensor


def _same(first: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    if first is other:
        return True
    if first.dtype != other.dtype or shape_of(first) != shape_of(other):
        return False
    if first.dtype is ir.DataType.STRING:
        return bool(np.array_equal(first.numpy(), other.numpy()))
    return memory_of(first) == memory_of(other)


def _wire(whole: ir.Model, stages: Sequence[ir.Model], nodes: Sequence[ir.Node], stubs: Sequence[ir.Node]) -> None:
    """Put nodes in the places of their stubs; each value is described as the frame does."""
    graph = whole.graph
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    for node, stub in zip(nodes, stubs, strict=True):
        for value, described in zip(node.outputs, stub.outputs, strict=True):
            _describe(value, described)
            if value.name:
                values[value.name] = value
    outputs = [values[value.name] for value in graph.outputs]
    graph.outputs.clear()
    graph.remove(stubs)
    chosen = set(nodes)
    for stage in stages:
        stage.graph.outputs.clear()
        copies = [value for node in stage.graph if node not in chosen for value in node.outputs]
        for value in (*stage.graph.inputs, *stage.graph.initializers.values(), *copies):
            if value.uses() and value.name not in values:
                _refuse(f"nothing gives {value.name}")
            if value.uses():
                value.replace_all_uses_with(values[value.name])
        detached(node for node in stage.graph if node not in chosen)
        stage.graph.remove(list(stage.graph))
    graph.extend(nodes)
    graph.outputs.extend(outputs)


def _describe(value: ir.Value, described: ir.Value) -> None:
    value.type, value.shape, value.doc_string = described.type, described.shape, described.doc_string
    for now, then in ((value.metadata_props, described.metadata_props), (value.meta, described.meta)):
        now.clear()
        now.update(then)
