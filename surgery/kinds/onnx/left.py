"""What is left alone in an ONNX graph: nodes that multiply by weights, but are not sites, with reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from surgery.errors import Refusal
from surgery.kinds.onnx.tensors import FLOATS, numbers_of
from surgery.sites import Left, Skip, site_name

if TYPE_CHECKING:
    from surgery.kinds.onnx.read import Reader

__all__ = ["DENSE", "inside", "is_plain", "left_of"]

_RECURRENT = ("LSTM", "GRU", "RNN")
_QUANTIZED = (
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "DynamicQuantizeLSTM"),
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QEmbedLayerNormalization"),
)
_FUSED = (
    *("FusedConv", "FusedMatMul", "FusedGemm", "FusedMatMulActivation", "BiasGelu", "Attention", "NhwcFusedConv"),
    *("MultiHeadAttention", "EmbedLayerNormalization", "SkipLayerNormalization"),
)
DENSE = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0, "Einsum": 1}  # where the weight stands


def is_plain(node: ir.Node) -> bool:
    """Whether a node is of ONNX's own operators."""
    return node.domain in ("", "ai.onnx")


def inside(node: ir.Node) -> Iterator[ir.Node]:
    """Yield all nodes in the bodies of a node, also in the bodies inside of these."""
    for attribute in node.attributes.values():
        graphs = {ir.AttributeType.GRAPH: lambda a: [a.value], ir.AttributeType.GRAPHS: lambda a: list(a.value)}
        for graph in graphs[attribute.type](attribute) if attribute.type in graphs else ():
            for inner in graph:
                yield inner
                yield from inside(inner)


def left_of(reader: Reader) -> tuple[Left, ...]:
    """What reads weights, but is not the call of an operator, with reasons."""
    found = []
    for node in reader.nodes:
        for inner in (node, *inside(node)):
            reason = _reason(reader, inner) if inner is node else _reason_inside(reader, inner, node)
            if reason is not None:
                found.append(Left(_skip(reader, inner, reason), (reader.number(node),)))
    return tuple(found)


def _skip(reader: Reader, node: ir.Node, reason: str) -> Skip:
    weights = [found for value in node.inputs if (found := reader.weight(value)) is not None]
    known = [found for found in weights if found.name in reader.parameters and len(found.shape) > 1]
    name = site_name(known[0].name) if known else node.name or node.outputs[0].name or node.op_type
    return Skip(name, node.op_type, reason, sum(numbers_of(found.tensor) for found in known))


def _reason(reader: Reader, node: ir.Node) -> str | None:
    """Return why a node that multiplies by a weight is left alone; None if it is a call, or no such node."""
    if node.op_type in _QUANTIZED:
        return f"it is quantized ({node.op_type}); decompose before you quantize"
    if node.op_type in _FUSED and not is_plain(node):
        return f"{node.op_type} is an operator of onnxruntime's optimizer; give the file from before"
    if not is_plain(node):
        return None
    if node.op_type in _RECURRENT:
        return f"the weights of {node.op_type} are left whole in ONNX files"
    call = reader.call(node)
    if isinstance(call, Refusal):
        return call.reason
    if call is None and node.op_type in DENSE:
        return _computed(reader, node)
    return None


def _reason_inside(reader: Reader, node: ir.Node, around: ir.Node) -> str | None:
    if node.op_type in _RECURRENT or node.op_type in _QUANTIZED:
        return f"it is inside of a body of {around.op_type}"
    if node.op_type not in DENSE or not is_plain(node):
        return None
    weight = reader.weight(node.inputs[DENSE[node.op_type]])
    if weight is None or len(weight.shape) < 2 or (node.op_type == "Gather" and len(weight.shape) != 2):
        return None
    return f"it is inside of a body of {around.op_type}"


def _computed(reader: Reader, node: ir.Node) -> str | None:
    """Return why a weight that is computed from constants is left alone; None for products of two activations."""
    places = (0,) if node.op_type == "Gather" else (1, 0) if node.op_type in ("MatMul", "Einsum") else (1,)
    for at in places:
        value = node.inputs[at] if at < len(node.inputs) else None
        weight = reader.weight(value)
        if weight is not None and len(weight.shape) > 1 and weight.tensor.dtype in FLOATS:
            if node.op_type == "Gather":
                return None
            return "its weight stands on the left" if node.op_type == "MatMul" else f"{node.op_type} uses it"
        producer = None if value is None else value.producer()
        if producer is not None and weight is None and _is_constant(reader, value):
            return None if node.op_type == "Gather" else f"its weight is computed by {producer.op_type}"
    return None


def _is_constant(reader: Reader, value: ir.Value | None, depth: int = 8) -> bool:
    """Whether a value is computed from constants alone, among them one with two axes."""
    waiting, large = [(value, depth)], False
    while waiting:
        one, left = waiting.pop()
        if one is None:
            continue
        weight = reader.weight(one)
        if weight is not None:
            large = large or len(weight.shape) > 1
            continue
        node = one.producer()
        if node is None or not left:
            return False
        waiting += [(each, left - 1) for each in node.inputs]
    return large
