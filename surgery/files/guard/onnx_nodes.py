"""Check the nodes of an ONNX model against what the operators say of themselves, as onnxruntime does.

Operators that the onnx package does not know, and attributes that an operator does not, pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import onnx

from surgery.errors import FileError
from surgery.system.opening import shown_name
from surgery.text import first_line

__all__ = ["check_nodes", "nodes_of"]

_AGAIN = "export the model again"
_MESSAGES = {onnx.AttributeProto.TENSOR: "t", onnx.AttributeProto.GRAPH: "g"}  # an attribute of this type has one


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and those of their bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from nodes_of(graph.node)


def check_nodes(model: onnx.ModelProto) -> None:
    """Raise FileError if a node has another number of inputs or other attributes than its operator, or sizes disagree.

    The graphs and functions of the model were checked before.
    """
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    for node in nodes_of(model.graph.node):
        _check_node(node, opsets, inside=False)
    for function in model.functions:
        own = opsets | {opset.domain: opset.version for opset in function.opset_import}
        for node in nodes_of(function.node):
            _check_node(node, own, inside=True)
    _check_sizes(model)


def _check_node(node: onnx.NodeProto, opsets: Mapping[str, int], *, inside: bool) -> None:
    """Check one node; ``inside`` of a function an attribute may be that of its caller."""
    name = shown_name(node.op_type)
    names = [attribute.name for attribute in node.attribute]
    if len(set(names)) < len(names):
        raise FileError(f"has a {name} with an attribute twice", next_step=_AGAIN)
    schema = _schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    for attribute in node.attribute:
        refers = bool(attribute.ref_attr_name)
        field = _MESSAGES.get(attribute.type)
        known = None if schema is None else schema.attributes.get(attribute.name)
        other = known is not None and int(known.type.value) != attribute.type
        missing = field is not None and not refers and not attribute.HasField(field)
        if (refers and not inside) or missing or other:
            raise FileError(f"has a {name} whose {shown_name(attribute.name)} is none", next_step=_AGAIN)
    if schema is None:
        return
    if lost := [key for key, known in schema.attributes.items() if known.required and key not in names]:
        raise FileError(f"has a {name} without {lost[0]}", next_step=_AGAIN)
    for what, given, least, most in (
        ("inputs", node.input, schema.min_input, schema.max_input),
        ("outputs", node.output, schema.min_output, schema.max_output),
    ):
        if not least <= len(given) <= most:
            allowed = f"{least} to {most}" if most > least else str(least)
            raise FileError(f"has a {name} with {len(given)} {what}", allowed=allowed, next_step=_AGAIN)


@cache
def _schema(operator: str, version: int, domain: str) -> Any:
    try:
        return onnx.defs.get_schema(operator, version, "" if domain == "ai.onnx" else domain)
    except Exception:  # there is none, or it is no name
        return None


def _check_sizes(model: onnx.ModelProto) -> None:
    """Raise FileError if the sizes that the weights and the inputs have do not fit the nodes."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.graph.ClearField("value_info")  # what files say of values in between is often wrong, and nothing reads it
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    for sparse in bare.graph.sparse_initializer:  # which onnx does not look for
        numbers = sparse.values
        bare.graph.input.append(onnx.helper.make_tensor_value_info(numbers.name, numbers.data_type, sparse.dims))
    bare.graph.ClearField("sparse_initializer")
    try:
        onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    except Exception as error:  # onnx's exceptions share no other base
        if "external" in str(error):  # sizes that are numbers of a tensor which is elsewhere
            return
        raise FileError(f"has sizes that do not fit: {first_line(error)[:160]}", next_step=_AGAIN) from error
