"""Function calls in fx graphs that are operators (torch or ATen), read and written.

``read_call`` turns a call node into the parts of an operator, and ``write_call`` inserts the call of an operator. Each
call that ``write_call`` writes can be read by ``read_call``. ``read_link`` and ``write_link`` do this for reshapes.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from surgery.algebra import Conv, Embedding, Flatten, Layout, Linear, Link, Operator, Transpose, Unflatten
from surgery.errors import Refusal
from surgery.kinds.layers.steps import read_flatten, read_transpose, read_unflatten
from surgery.kinds.layers.tensors import conv_geometry

__all__ = ["CallParts", "is_aten", "read_call", "read_link", "transposed_source", "write_call", "write_link"]


aten = torch.ops.aten

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTION = (*_CONV[:6], "transposed", "output_padding", "groups")
_LINEAR = ("input", "weight", "bias")
_ADDMM = ("bias", "input", "weight")
_MATMUL = ("input", "weight")

_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_EMBEDDING_ATEN = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
_EMBEDDINGS = (F.embedding, aten.embedding.default)

# target -> (argument names, number of spatial dimensions; 0 for linear maps, None where the weight tells)
_CALLS: dict[Any, tuple[tuple[str, ...], int | None]] = {
    torch.conv1d: (_CONV, 1),
    torch.conv2d: (_CONV, 2),
    torch.conv3d: (_CONV, 3),
    torch.conv_transpose1d: (_TRANSPOSED, 1),
    torch.conv_transpose2d: (_TRANSPOSED, 2),
    torch.conv_transpose3d: (_TRANSPOSED, 3),
    aten.conv1d.default: (_CONV, 1),
    aten.conv2d.default: (_CONV, 2),
    aten.conv3d.default: (_CONV, 3),
    aten.conv1d.padding: (_CONV, 1),
    aten.conv2d.padding: (_CONV, 2),
    aten.conv3d.padding: (_CONV, 3),
    aten.conv_transpose1d.default: (_TRANSPOSED, 1),
    aten.conv_transpose2d.input: (_TRANSPOSED, 2),
    aten.conv_transpose3d.input: (_TRANSPOSED, 3),
    aten.convolution.default: (_CONVOLUTION, None),
    F.linear: (_LINEAR, 0),
    aten.linear.default: (_LINEAR, 0),
    torch.addmm: (_ADDMM, 0),
    aten.addmm.default: (_ADDMM, 0),
    torch.mm: (_MATMUL, 0),
    aten.mm.default: (_MATMUL, 0),
    torch.matmul: (_MATMUL, 0),
    python_operator.matmul: (_MATMUL, 0),
    aten.matmul.default: (_MATMUL, 0),
}
_WRITE_TORCH: dict[tuple[bool, int], Any] = {
    (False, 1): torch.conv1d,
    (False, 2): torch.conv2d,
    (False, 3): torch.conv3d,
    (True, 1): torch.conv_transpose1d,
    (True, 2): torch.conv_transpose2d,
    (True, 3): torch.conv_transpose3d,
}
_WRITE_ATEN: dict[tuple[bool, int], Any] = {
    (False, 1): aten.conv1d,
    (False, 2): aten.conv2d,
    (False, 3): aten.conv3d,
    (True, 1): aten.conv_transpose1d.default,
    (True, 2): aten.conv_transpose2d.input,
    (True, 3): aten.conv_transpose3d.input,
}
_TRANSPOSES: dict[Any, tuple[Any, ...]] = {
    torch.t: (),
    aten.t.default: (),
    aten.permute.default: ([1, 0],),
    aten.transpose.int: (0, 1),
}


@dataclass(frozen=True)
class CallParts:
    """A call taken apart: its input, the nodes of weight and bias, and a function from their tensors to the operator.

    ``stored`` is "in_out" for a linear weight that is stored as (in, out), as in GPT-2's Conv1D.
    """

    input: Node
    weight: Node
    bias: Node | None
    build: Callable[[Tensor, Tensor | None], Operator | Refusal]
    stored: Layout = "out_in"


def transposed_source(node: Node) -> Node | None:
    """Return the input of a node that transposes a matrix, or None for any other node."""
    if node.op == "call_method" and node.target == "t" and isinstance(node.args[0], Node):
        return node.args[0]
    wanted = _TRANSPOSES.get(node.target) if node.op == "call_function" else None
    if wanted is None or not isinstance(node.args[0], Node):
        return None
    return node.args[0] if tuple(node.args[1:]) == wanted and not node.kwargs else None


def _read_embedding(node: Node) -> CallParts | Refusal | None:
    """Return the parts of an embedding's call; torch and ATen have their arguments in different orders."""
    names = _EMBEDDING_ATEN if node.target is aten.embedding.default else _EMBEDDING
    values: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    source, weight, padding = values["input"], values["weight"], values.get("padding_idx")
    if not isinstance(source, Node) or not isinstance(weight, Node):
        return None
    if values.get("max_norm") is not None or values.get("scale_grad_by_freq") or values.get("sparse"):
        return Refusal("it renormalises its rows, or has gradients of its own (max_norm, scale_grad_by_freq, sparse)")
    # ATen writes -1 for an embedding without a padding index
    index = None if padding in (None, -1) else padding
    return CallParts(source, weight, None, lambda w, b: Embedding(w, padding_index=index))


def read_call(node: Node) -> CallParts | Refusal | None:
    """Return the parts of an operator's call, or why the call is not that of an operator; None for any other node."""
    if node.op == "call_function" and node.target in _EMBEDDINGS:
        return _read_embedding(node)
    if node.op != "call_function" or node.target not in _CALLS:
        return None
    names, dims = _CALLS[node.target]
    values: dict[str, Any] = dict(zip(names, node.args, strict=False))
    values.update(node.kwargs)
    if any(values.pop(scalar, 1) != 1 for scalar in ("alpha", "beta")):
        return Refusal("it scales its terms (alpha, beta)")
    source, weight, bias = values.get("input"), values.get("weight"), values.get("bias")
    if not isinstance(source, Node) or not isinstance(weight, Node) or not isinstance(bias, Node | None):
        return None
    if dims == 0:
        return _linear_parts(names, source, weight, bias)
    # aten.convolution says itself whether it is transposed; for all other functions the name does
    values.setdefault("transposed", names is _TRANSPOSED)
    return CallParts(source, weight, bias, lambda w, b: _build_conv(values, dims, w, b))


def _linear_parts(names: tuple[str, ...], source: Node, weight: Node, bias: Node | None) -> CallParts:
    stored: Layout = "out_in" if names is _LINEAR else "in_out"
    # addmm and matmul read (in, out); an explicit transpose before them turns that around once more
    origin = transposed_source(weight)
    if origin is not None:
        weight, stored = origin, "in_out" if stored == "out_in" else "out_in"

    def build(w: Tensor, b: Tensor | None) -> Operator | Refusal:
        if w.dim() != 2 or (b is not None and b.dim() != 1):
            return Refusal("its weight is not a matrix, or its bias is not a vector")
        return Linear(w.t() if stored == "in_out" else w, bias=b)

    return CallParts(source, weight, bias, build, stored)


def _build_conv(values: dict[str, Any], dims: int | None, weight: Tensor, bias: Tensor | None) -> Operator | Refusal:
    dims = weight.dim() - 2 if dims is None else dims
    geometry = conv_geometry(
        tuple(weight.shape[2:]),
        stride=values.get("stride", 1),
        padding=values.get("padding", 0),
        dilation=values.get("dilation", 1),
        output_padding=values.get("output_padding", 0),
        transposed=bool(values["transposed"]),
    )
    if isinstance(geometry, Refusal):
        return geometry
    groups = values.get("groups", 1)
    if not isinstance(groups, int) or dims not in (1, 2, 3):
        return Refusal("its groups or its number of dimensions are not fixed")
    return Conv(weight, geometry, groups, bias=bias)


def is_aten(node: Node) -> bool:
    """Whether the node calls an ATen operator."""
    return isinstance(node.target, torch._ops.OpOverload)


def write_call(
    graph: Graph, operator: Operator, *, source: Node, weight: Node, bias: Node | None, style: Node, stored: Layout
) -> Node:
    """Insert the call of an operator at the graph's insertion point, in the style (torch or ATen) of another call."""
    aten_style = is_aten(style)
    if isinstance(operator, Conv):
        return _write_conv(graph, operator, source, weight, bias, is_aten=aten_style)
    if isinstance(operator, Embedding):
        index = operator.padding_index
        if aten_style:
            return graph.call_function(aten.embedding.default, (weight, source, -1 if index is None else index))
        return graph.call_function(F.embedding, (source, weight, index))
    if stored == "out_in":
        return graph.call_function(aten.linear.default if aten_style else F.linear, (source, weight, bias))
    if bias is not None:
        return graph.call_function(aten.addmm.default if aten_style else torch.addmm, (bias, source, weight))
    return graph.call_function(aten.matmul.default if aten_style else torch.matmul, (source, weight))


def _write_conv(graph: Graph, conv: Conv, source: Node, weight: Node, bias: Node | None, *, is_aten: bool) -> Node:
    # the order of arguments differs: transposed ones have output_padding before groups, and dilation last
    g = conv.geometry
    key = (g.transposed, g.dims)
    if g.transposed:
        padding = [before for before, _ in g.padding]
        target = (_WRITE_ATEN if is_aten else _WRITE_TORCH)[key]
        rest = (list(g.stride), padding, list(g.output_padding), conv.groups, list(g.dilation))
        return graph.call_function(target, (source, weight, bias, *rest))
    symmetric = g.symmetric
    # torch can express a padding that differs between two sides only as "same"
    said = [before for before, _ in g.padding] if symmetric else "same"
    target = _WRITE_TORCH[key]
    if is_aten:
        target = _WRITE_ATEN[key].default if symmetric else _WRITE_ATEN[key].padding
    return graph.call_function(target, (source, weight, bias, list(g.stride), said, list(g.dilation), conv.groups))


aten = torch.ops.aten

_UNFLATTEN = (torch.unflatten, aten.unflatten.int)
_FLATTEN = (torch.flatten, aten.flatten.using_ints)
_TRANSPOSE = (torch.transpose, aten.transpose.int)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_MAKE: dict[Any, Callable[..., Link | None]] = {
    **dict.fromkeys(_UNFLATTEN, lambda dim, sizes: read_unflatten(dim, sizes)),
    **dict.fromkeys(_FLATTEN, lambda start=0, end=-1: read_flatten(start, end)),
    **dict.fromkeys(_TRANSPOSE, lambda first, second: read_transpose(first, second)),
}


def read_link(node: Node) -> Link | None:
    """Return the reshape or transpose that a function call is, or None for any other node."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target in _VIEWS:
        return _read_view(node, node.args[0])
    make = _MAKE.get(node.target)
    try:
        return None if make is None else make(*node.args[1:], **node.kwargs)
    except TypeError:  # the call has arguments that no step of a chain has
        return None


def _read_view(node: Node, source: Node) -> Link | None:
    """Return how a view splits or joins axes, from the shapes before and after it; None if it does both or neither."""
    if "val" not in node.meta or "val" not in source.meta:
        return None
    # What lies between the common head and tail of the two shapes has changed: (2, 6, 5) -> (2, 3, 2, 5) splits the 6,
    # and (2, 3, 2, 5) -> (2, 6, 5) joins 3 and 2. Axes are counted from the end, since chains do not know their number.
    before, after = list(source.meta["val"].shape), list(node.meta["val"].shape)
    tail = _common(before[::-1], after[::-1])
    head = min(_common(before, after), min(len(before), len(after)) - tail)
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    if len(old) == 1 and len(new) > 1:
        return read_unflatten(-1 - tail, new)
    return read_flatten(-tail - len(old), -1 - tail) if len(new) == 1 and len(old) > 1 else None


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading sizes are the same; symbolic sizes are the same if their expressions are."""
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if str(a) != str(b):
            return count
    return min(len(first), len(second))


def write_link(graph: Graph, step: Link, source: Node, *, is_aten: bool) -> Node:
    """Insert the function call (torch or ATen) of a reshape or transpose at the graph's insertion point.

    Raises:
        TypeError: the step is neither of these.
    """
    if isinstance(step, Unflatten):
        return graph.call_function(_UNFLATTEN[is_aten], (source, step.dim, list(step.sizes)))
    if isinstance(step, Flatten):
        return graph.call_function(_FLATTEN[is_aten], (source, step.start, step.end))
    if isinstance(step, Transpose):
        return graph.call_function(_TRANSPOSE[is_aten], (source, step.first, step.second))
    raise TypeError(f"{type(step).__name__} is not a reshape")
