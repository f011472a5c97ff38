"""A node that was taken apart, as the record keeps it: recompose writes the same node again.

The record has it among its layers, under the name of the node's first output, which the parts give too.
"""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import onnx
import onnx_ir as ir

from surgery.kinds.onnx.left import RECURRENT
from surgery.kinds.onnx.one_node import is_used
from surgery.kinds.onnx.origin import configure

__all__ = ["described", "first_output", "made_again"]

_ATTRIBUTES = (
    *("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size"),
    *("input_forget", "layout", "linear_before_reset", "output_sequence"),
)


def first_output(node: ir.Node) -> str:
    """Return the name of the first output of a node that anything reads; none if nothing does."""
    return next((value.name or "" for value in node.outputs if is_used(value)), "")


def described(node: ir.Node) -> dict[str, str]:
    """Return a recurrent node as JSON values."""
    said = ir.serde.serialize_node(node)
    return {"node": base64.b64encode(said.SerializeToString(deterministic=True)).decode()}


def made_again(value: Any) -> ir.Node | None:
    """Return the recurrent node that JSON values describe, which reads nothing yet; None if they describe none."""
    said = onnx.NodeProto()
    with contextlib.suppress(Exception):  # whatever a file says there; protobuf's errors have no base of their own
        said = onnx.NodeProto.FromString(base64.b64decode(value["node"], validate=True))
    known = all(each.name in _ATTRIBUTES and not each.ref_attr_name for each in said.attribute)
    if said.op_type not in RECURRENT or said.domain not in ("", "ai.onnx") or not known:
        return None
    if not 3 <= len(said.input) <= 8 or not 1 <= len(said.output) <= 3:
        return None
    node = ir.Node(
        said.domain,
        said.op_type,
        [None] * len(said.input),
        [ir.from_proto(each) for each in said.attribute],
        num_outputs=len(said.output),
        name=said.name,
        doc_string=said.doc_string or None,
        metadata_props={each.key: each.value for each in said.metadata_props},
    )
    for output, name in zip(node.outputs, said.output, strict=True):
        output.name = name
    configure(node, said)
    return node
