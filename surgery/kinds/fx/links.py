"""Reshapes in fx graphs: the function calls that are steps of a chain without a weight matrix, read and written.

What ``write_link`` makes, ``read_link`` reads. It also reads a view or reshape of others whose sizes say that it
splits or joins axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from surgery.algebra.steps import Flatten, Link, Transpose, Unflatten
from surgery.kinds.layers.links import read_flatten, read_transpose, read_unflatten

__all__ = ["read_link", "write_link"]

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
    except TypeError:  # arguments that none of ours has
        return None


def _read_view(node: Node, source: Node) -> Link | None:
    """Return how a view splits or joins axes, by the shapes around it; None if it does both or neither."""
    if "val" not in node.meta or "val" not in source.meta:
        return None
    before, after = list(source.meta["val"].shape), list(node.meta["val"].shape)
    tail = _common(before[::-1], after[::-1])
    head = min(_common(before, after), min(len(before), len(after)) - tail)
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    if len(old) == 1 and len(new) > 1:
        return read_unflatten(-1 - tail, new)
    return read_flatten(-tail - len(old), -1 - tail) if len(new) == 1 and len(old) > 1 else None


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading sizes are the same; symbolic ones if their expressions are."""
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if str(a) != str(b):
            return count
    return min(len(first), len(second))


def write_link(graph: Graph, step: Link, source: Node, *, is_aten: bool) -> Node:
    """Insert the function call of a reshape or transpose at the graph's insertion point, torch's or ATen's."""
    if isinstance(step, Unflatten):
        return graph.call_function(_UNFLATTEN[is_aten], (source, step.dim, list(step.sizes)))
    if isinstance(step, Flatten):
        return graph.call_function(_FLATTEN[is_aten], (source, step.start, step.end))
    if isinstance(step, Transpose):
        return graph.call_function(_TRANSPOSE[is_aten], (source, step.first, step.second))
    raise TypeError(f"{type(step).__name__} is no reshape")
