"""What is left alone in an ONNX graph: nodes that multiply by weights, but are not sites, with reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from surgery.errors import Refusal
from surgery.kinds.onnx.modes import mode_of
from surgery.kinds.onnx.tensors import numbers_of
from surgery.kinds.onnx.weights import Weight, is_plain, is_view
from surgery.sites import Call, Left, Skip, site_name

if TYPE_CHECKING:
    from surgery.kinds.onnx.read import Reader

__all__ = ["DENSE", "EARLIER", "RECURRENT", "branches", "inside", "is_recurrent", "left_of"]

RECURRENT = ("LSTM", "GRU", "RNN")
_QUANTIZED = (
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "DynamicQuantizeLSTM"),
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QEmbedLayerNormalization"),
)
_FUSED = (
    *("FusedConv", "FusedMatMul", "FusedGemm", "FusedMatMulActivation", "BiasGelu", "Attention", "NhwcFusedConv"),
    *("MultiHeadAttention", "EmbedLayerNormalization", "SkipLayerNormalization"),
)
_BOTH = "bidirectional"
_PARTS = {1: "input weight", 2: "recurrent weight", 3: "bias"}  # the inputs of a recurrent node
_IN_LOOP = "the recurrent weight is multiplied inside of the node's loop"
EARLIER = "decompose before you quantize"
DENSE = {  # where the weight stands
    **{"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0, "Einsum": 1, "DeformConv": 1, "GatherND": 0},
    **dict.fromkeys(RECURRENT, 1),
}
_PLACES = {  # else the first two
    **{"Gather": (0,), "GatherND": (0,), "Einsum": tuple(range(9))},
    **dict.fromkeys(RECURRENT, (1, 2)),
}
_TABLES = ("Gather", "GatherND")
_INSIDE = ("LinearRegressor", "LinearClassifier")  # of ai.onnx.ml
_SIZES = ("Shape", "Size")
_NUMBERS = {"CastLike": slice(1), "Where": slice(1, None)}  # the inputs that are read for their numbers, if not all
_NO_LAYERS = (  # operators that read constants element by element, beside others, or as states
    *("Add", "Sub", "Mul", "Div", "Mod", "Pow", "PRelu", "Max", "Min", "Mean", "Sum", "Clip", "Where", "CastLike"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "BatchNormalization", "LayerNormalization"),
    *("Concat", "If", "Loop", "Scan", "SequenceConstruct", "SequenceInsert", "Optional"),
)
_MOST_READ = 10_000  # values from which a weight is computed


def is_recurrent(node: ir.Node) -> bool:
    """Whether a node is a recurrent layer with an input weight and a recurrent weight."""
    return node.op_type in RECURRENT and is_plain(node)


def branches(node: ir.Node) -> list[ir.Graph]:
    """Return the branches of an If, of which one runs once; an empty list for any other node."""
    if node.op_type != "If" or not is_plain(node):
        return []
    return [attribute.value for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]


def inside(node: ir.Node) -> Iterator[ir.Node]:
    """Yield all nodes in the bodies of a node, also in the bodies inside of these."""
    for attribute in node.attributes.values():
        graphs = {ir.AttributeType.GRAPH: lambda a: [a.value], ir.AttributeType.GRAPHS: lambda a: list(a.value)}
        for graph in graphs[attribute.type](attribute) if attribute.type in graphs else ():
            for inner in graph:
                yield inner
                yield from inside(inner)


def left_of(reader: Reader) -> tuple[Left, ...]:
    """What reads weights, but is not the call of an operator, with reasons; nodes with one weight are one skip."""
    found: dict[tuple[str, str], Left] = {}
    for node in reader.nodes:
        for skip in _skips(reader, node):
            key, value = (skip.name, skip.reason), reader.number(node)
            found[key] = Left(skip, (*(found[key].values if key in found else ()), value))
    named = {site_name(element.weight) for element in reader.elements if isinstance(element, Call)}
    named |= {name for name, _ in found}
    for node in reader.nodes:
        for inner in (node, *(each for each, _ in _hidden(reader, node))):
            for skip in _others(reader, inner):
                if skip.name not in named:
                    key = (skip.name, skip.reason)
                    found[key] = Left(skip, (*(found[key].values if key in found else ()), reader.number(node)))
    return tuple(found.values())


def _others(reader: Reader, node: ir.Node) -> Iterator[Skip]:
    """Yield the tables that a node reads beside values that vary, if it may do more than compute element by element."""
    if not is_plain(node) or is_view(node) or node.op_type in (*DENSE, *_NO_LAYERS):
        return
    tables = [value for value in node.inputs if (weight := reader.weight(value)) is not None and _is_table(weight)]
    varies = any(value is not None and not _constants(reader, value) for value in node.inputs) if tables else False
    yield from (_skip(reader, node, [value], f"{node.op_type} reads it") for value in tables if varies)


def _is_table(weight: Weight) -> bool:
    """Whether a weight has floats along more than one axis."""
    return weight.is_float and sum(size > 1 for size in weight.shape) > 1


def _skips(reader: Reader, node: ir.Node) -> Iterator[Skip]:
    reason = _reason(reader, node)
    if reason is not None:
        yield _skip(reader, node, node.inputs[1:2] if node in reader.gates else node.inputs, reason)
    if node in reader.gates:
        yield _skip(reader, node, node.inputs[2:3], _IN_LOOP + _not_opened(reader, node))
    for inner, where in _hidden(reader, node):
        if _reason(reader, inner) is not None:
            yield _skip(reader, inner, inner.inputs, f"it is inside of {where}")


def _not_opened(reader: Reader, node: ir.Node) -> str:
    """Return why a recurrent node does not become a loop, whose recurrent weight would be a site."""
    mode = mode_of(node)
    both = "direction" in node.attributes and node.attributes["direction"].value == _BOTH
    if isinstance(mode, Refusal) and not both:
        return f", which {mode.reason}"
    for at, what in _PARTS.items():
        value = node.inputs[at] if at < len(node.inputs) else None
        why = None if value is None else _not_its_own(reader, node, value, at)
        if why is not None:
            return f"; its {what} is {why}"
    return f", which {mode.reason}" if isinstance(mode, Refusal) else "; decompose the model before its export"


def _not_its_own(reader: Reader, node: ir.Node, value: ir.Value, at: int) -> str | None:
    """Return why a weight of a recurrent node cannot be taken apart; None if it can."""
    producer, weight = value.producer(), reader.weight(value)
    if weight is None:
        maker = _maker(reader, value)
        return f"computed by {maker.op_type}" if maker is not None else "an input of the model"
    if value.is_graph_output() or weight.root.is_graph_output():
        return "an output of the model, too"
    users = {(use.node, use.idx) for each in (value, weight.root) for use in each.uses()}
    others = [user for user, place in users if (user, place) != (node, at) and not (is_view(user) and place == 0)]
    if others and not all(is_recurrent(user) for user in others):
        return f"also read by {next(user.op_type for user in others if not is_recurrent(user))}"
    if producer is not None:
        return f"read through {producer.op_type} in more than one way, or from outside of a branch"
    return "read in another way, too" if any(place != at for _, place in users) else None


def _hidden(reader: Reader, node: ir.Node) -> Iterator[tuple[ir.Node, str]]:
    """Yield the nodes in the bodies of a node and in all functions that it leads to, and where each is."""
    own = [inner for inner in inside(node) if reader.around[inner] is node]  # others have numbers of their own
    yield from ((inner, f"a body of {node.op_type}") for inner in own)
    waiting, seen = [node, *own], set()
    while waiting:
        name = waiting.pop().op_identifier()
        if name in reader.functions and name not in seen:
            seen.add(name)
            nodes = list(reader.functions[name].all_nodes())
            yield from ((inner, "a function") for inner in nodes)
            waiting += nodes


def _skip(reader: Reader, node: ir.Node, values: Sequence[ir.Value | None], reason: str) -> Skip:
    weights = [found for value in values if (found := reader.weight(value)) is not None]
    large = [found for found in weights if len(found.shape) > 1]
    own = node.name or node.outputs[0].name or node.op_type
    name = site_name(large[0].name) if large and reader.is_named(large[0]) else own
    known = [found for found in large if found.name in reader.parameters]
    return Skip(name, node.op_type, reason, sum(numbers_of(found.tensor) for found in known))


def _reason(reader: Reader, node: ir.Node) -> str | None:
    """Return why a node that multiplies by a weight is left alone; None if it is a call, or no such node."""
    if node.op_type in _QUANTIZED:
        return f"it is quantized ({node.op_type}); {EARLIER}"
    if node.op_type in _FUSED and not is_plain(node):
        return f"{node.op_type} is an operator of onnxruntime's optimizer; give the file from before"
    if not is_plain(node):
        return _foreign(reader, node)
    call = reader.call(node)
    if isinstance(call, Refusal):
        return call.reason
    if node in reader.gates and node.inputs[1] in reader.inputs:
        return "its input weight is an input of the model; its numbers are not in the file"
    if call is None and node.op_type in DENSE:
        return _computed(reader, node)
    return None


def _foreign(reader: Reader, node: ir.Node) -> str | None:
    """Return why a node of another domain that reads a weight is left alone; None if it reads none."""
    if node.domain == "ai.onnx.ml" and node.op_type in _INSIDE:
        return f"its coefficients are an attribute of {node.op_type}, not a weight of the graph"
    found = [weight for value in node.inputs if (weight := reader.weight(value)) is not None]
    if not any(len(weight.shape) > 1 and weight.is_float for weight in found):
        return None
    if node.op_identifier() in reader.functions:
        return f"{node.op_type}, which reads it, is a function"
    return f"nothing is known of {node.op_type} of {node.domain}, which reads it"


def _computed(reader: Reader, node: ir.Node) -> str | None:
    """Return why a weight of a node that is not a call is left alone; None for products of two activations."""
    for at, value in enumerate(node.inputs):
        weight, producer = reader.weight(value), None if value is None else _maker(reader, value)
        if weight is not None:
            if len(weight.shape) > 1 and at in _PLACES.get(node.op_type, (0, 1)):
                return _held(node, at, weight)
            continue
        if producer is None or at not in _PLACES.get(node.op_type, (0, 1)):
            continue
        constants = _constants(reader, value)
        large = [found for found in constants if found is None or _is_large(found, table=node.op_type in _TABLES)]
        if narrow := next((found for found in large if found is not None and not found.is_float), None):
            return f"its weight is {narrow.tensor.dtype.name}, read through {producer.op_type}; {EARLIER}"
        if large:
            return f"its weight is computed by {producer.op_type}"
    return None


def _maker(reader: Reader, value: ir.Value) -> ir.Node | None:
    """Return the node that computes a value, in front of those that only move or convert it; None of an input."""
    node = value.producer()
    while node is not None and is_view(node) and (read := node.inputs[0]) is not None and reader.weight(read) is None:
        before = read.producer()
        if before is None or before.op_type == "Constant":
            break
        node = before
    return node


def _is_large(weight: Weight, *, table: bool) -> bool:
    """Whether constants of a computed weight are numbers of it: not its sizes, axes, scale or the rows of a table."""
    if weight.is_float:
        return math.prod(weight.shape) > 1
    return len(weight.shape) > 1 and (weight.is_quantized or not table)


def _held(node: ir.Node, at: int, weight: Weight) -> str | None:
    """Return why a node that reads a weight at a place is not its call; None for tables of other numbers."""
    if node.op_type == "GatherND":
        return "GatherND picks from it, not by rows" if weight.is_float else None
    if node.op_type == "Gather":
        axes = len(weight.shape)
        return f"it picks from a table of {axes} axes, or not by rows" if weight.is_float else None
    if at == 0 and node.op_type in ("MatMul", "Gemm"):
        return "its weight stands on the left"
    return f"{node.op_type} reads it"


def _constants(reader: Reader, value: ir.Value | None) -> list[Weight | None]:
    """Return the constants from which a value is computed; none if more than the sizes of anything else is read.

    None stands for numbers that the graph makes itself: random ones, and those of a sparse Constant node.
    """
    waiting, found, seen = [value], list[Weight | None](), set[ir.Value]()
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        weight = reader.weight(one)
        if weight is not None:
            found.append(weight)
            continue
        node = one.producer()
        if node is None or len(seen) > _MOST_READ:
            return []
        if node.op_type in _SIZES and is_plain(node):
            continue
        ends = [branch.outputs[one.index() or 0] for branch in branches(node)]  # whatever the condition is
        if not ends and any(True for _ in inside(node)):
            return []  # a body may read anything
        found += [] if node.inputs or ends else [None]
        waiting += ends or node.inputs[_NUMBERS.get(node.op_type, slice(None))]
    return found
