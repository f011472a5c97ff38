"""Weights of an ONNX graph: the numbers of initializers and Constant nodes, as other nodes read them.

A weight may lie behind nodes that only move or convert its numbers. Each of these is a ``View``, which can be undone:

    V = Transpose(W)    K = Cast(V)    y = MatMul(x, K)    ->    Weight(root=W, views=(Transpose, Cast))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from surgery.kinds.onnx.tensors import DTYPES, FLOATS, shape_of, to_torch

__all__ = ["View", "Weight", "find_weight", "held", "is_plain", "is_view", "views_from_json", "views_to_json"]

_VIEWS = {  # the attribute that says what the node does, and the input that says it in other versions of ONNX
    "Identity": (None, None),
    "Transpose": ("perm", None),
    "Reshape": ("shape", 1),
    "Squeeze": ("axes", 1),
    "Unsqueeze": ("axes", 1),
    "Cast": ("to", None),
}
_QUANTIZED = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4})
_MOST = 8  # views of one weight, and axes


@dataclass(frozen=True)
class View:
    """What one node does to a weight.

    ``said`` are the order of axes, the sizes or the axes of the node, or the type that it casts to. ``shape`` and
    ``dtype`` are those of its input. ``name`` is the name of the node, and ``output`` that of its value. ``as_input``
    is the name of its second input, if that has what was said.
    """

    op_type: str
    said: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    name: str = ""
    output: str = ""
    as_input: str | None = None

    @property
    def attribute(self) -> ir.Attr | None:
        """The attribute that says what the node does; None if the second input does, or nothing has to be said."""
        name = None if self.as_input is not None or not self.said else _VIEWS[self.op_type][0]
        if name is None:
            return None
        return ir.AttrInt64(name, self.said[0]) if self.op_type == "Cast" else ir.AttrInt64s(name, self.said)

    @property
    def form(self) -> View:
        """The view without its names."""
        return replace(self, name="", output="", as_input=None)

    def apply(self, tensor: Tensor) -> Tensor:
        """Return what the node computes."""
        if self.op_type == "Transpose":
            return tensor.permute(self.said or tuple(reversed(range(tensor.dim()))))
        if self.op_type == "Cast":
            return tensor.to(DTYPES[ir.DataType(self.said[0])])
        return tensor if self.op_type == "Identity" else tensor.reshape(self._sizes)

    def undo(self, tensor: Tensor) -> Tensor:
        """Return what the node would have to read to compute a tensor; rounded if the node casts."""
        if self.op_type == "Transpose":
            order = self.said or tuple(reversed(range(tensor.dim())))
            # The inverse order: 2 0 1 is undone by 1 2 0.
            return tensor.permute(tuple(np.argsort(order)))
        if self.op_type == "Cast":
            return tensor.to(DTYPES[self.dtype])
        return tensor.reshape(self.shape)

    @property
    def _sizes(self) -> tuple[int, ...]:
        sizes = list(self.shape)
        if self.op_type == "Reshape":
            return tuple(sizes[at] if size == 0 else size for at, size in enumerate(self.said))
        if self.op_type == "Unsqueeze":
            axes = len(sizes) + len(self.said)
            new = {axis % axes for axis in self.said}
            rest = iter(sizes)
            return tuple(1 if at in new else next(rest) for at in range(axes))
        gone = {axis % len(sizes) for axis in self.said} if self.said else {at for at, n in enumerate(sizes) if n == 1}
        return tuple(size for at, size in enumerate(sizes) if at not in gone)


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight: the value that holds its numbers, these numbers, and the views through which they are read."""

    root: ir.Value
    tensor: ir.TensorProtocol
    views: tuple[View, ...] = ()

    @property
    def name(self) -> str:
        """The name of the value."""
        return self.root.name or ""

    @property
    def is_float(self) -> bool:
        """Whether the numbers are held as floats."""
        return self.tensor.dtype in FLOATS

    @property
    def is_quantized(self) -> bool:
        """Whether the numbers are held as whole numbers of at most eight bits."""
        return self.tensor.dtype in _QUANTIZED

    @property
    def form(self) -> tuple[View, ...]:
        """The views without names; reads of one root with equal forms get the same numbers."""
        return tuple(view.form for view in self.views if view.op_type != "Identity")

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers, as they are read."""
        tensor = torch.empty(shape_of(self.tensor), device="meta")
        return tuple(_through(self.views, tensor).shape)

    @cached_property
    def numbers(self) -> Tensor:
        """The numbers, as they are read; they must not be changed."""
        return _through(self.views, to_torch(self.tensor))


def _through(views: Sequence[View], tensor: Tensor) -> Tensor:
    for view in views:
        tensor = view.apply(tensor)
    return tensor


def is_plain(node: ir.Node) -> bool:
    """Whether a node is of ONNX's own operators."""
    return node.domain in ("", "ai.onnx")


def is_view(node: ir.Node) -> bool:
    """Whether a node may move or convert the numbers of a weight without computing others."""
    return node.op_type in _VIEWS and is_plain(node)


def find_weight(value: ir.Value) -> Weight | None:
    """Return the weight that a value is; None if it is none, or if nodes compute other numbers from it."""
    nodes: list[ir.Node] = []
    while (node := value.producer()) is not None and is_view(node) and len(nodes) < _MOST:
        if node.inputs[0] is None:
            return None
        nodes.insert(0, node)
        value = node.inputs[0]
    tensor = held(value)
    if tensor is None:
        return None
    views, shape, dtype = [], shape_of(tensor), tensor.dtype
    for node in nodes:
        view = _view(node, shape, dtype)
        if view is None:
            return None
        views.append(view)
        shape = tuple(view.apply(torch.empty(shape, device="meta")).shape)
        dtype = ir.DataType(view.said[0]) if view.op_type == "Cast" else dtype
    return Weight(value, tensor, tuple(views))


def held(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the numbers that the graph holds for a value: those of an initializer, or of a Constant node."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Constant" and is_plain(node) and "value" in node.attributes:
        found: ir.TensorProtocol = node.attributes["value"].value
        return found
    if node is not None and node.op_type == "Constant" and is_plain(node) and "value_ints" in node.attributes:
        return ir.tensor(list(node.attributes["value_ints"].value or ()), dtype=ir.DataType.INT64)  # sizes or axes
    return value.const_value if value.is_initializer() else None


def _view(node: ir.Node, shape: tuple[int, ...], dtype: ir.DataType) -> View | None:
    attribute, at = _VIEWS[node.op_type]
    said: tuple[int, ...] = ()
    as_input = None
    if attribute is not None and attribute in node.attributes:
        value = node.attributes[attribute].value
        said = tuple(map(int, value)) if isinstance(value, list | tuple) else (int(value),)
    elif at is not None and len(node.inputs) > at:
        tensor = held(node.inputs[at])
        if tensor is None or len(tensor.shape) != 1:
            return None
        said = tuple(map(int, tensor.numpy()))
        as_input = node.inputs[at].name  # type: ignore[union-attr]
    if node.op_type == "Reshape" and "allowzero" in node.attributes and 0 in said:
        return None
    view = View(node.op_type, said, shape, dtype, node.name or "", node.outputs[0].name or "", as_input)
    return view if _fits(view) else None


def _fits(view: View) -> bool:
    """Whether a view can be applied to a tensor of its shape, and undone."""
    if view.op_type == "Cast" and (len(view.said) != 1 or view.said[0] not in FLOATS or view.dtype not in DTYPES):
        return False
    if len(view.shape) > _MOST or len(view.said) > _MOST:
        return False
    try:
        tensor = torch.empty(view.shape, device="meta")
        return view.undo(view.apply(tensor)).shape == tensor.shape
    except (RuntimeError, IndexError, ZeroDivisionError, StopIteration):  # axes or sizes that the tensor has not
        return False


def views_to_json(views: Sequence[View]) -> Any:
    """Return what a record keeps of views, as JSON values; None for none.

    >>> views_to_json([View("Transpose", (1, 0), (3, 2), ir.DataType.FLOAT, "node", "W_T")])
    [{'op_type': 'Transpose', 'said': [1, 0], 'shape': [3, 2], 'dtype': 'FLOAT', 'name': 'node', 'output': 'W_T'}]
    """
    rows = []
    for view in views:
        numbers = {"op_type": view.op_type, "said": list(view.said), "shape": list(view.shape)}
        names = {"dtype": view.dtype.name, "name": view.name, "output": view.output, "as_input": view.as_input}
        rows.append(numbers | {key: value for key, value in names.items() if value is not None})
    return rows or None


def views_from_json(value: Any, shape: Sequence[int]) -> tuple[View, ...]:
    """Return the views that JSON values describe, if a weight of this shape can be read through them; else none."""
    if not isinstance(value, list) or len(value) > _MOST:
        return ()
    found = [_from_json(row) for row in value]
    views = tuple(view for view in found if view is not None and _fits(view))
    after = [*(view.shape for view in views[1:]), tuple(shape)]
    makes = [tuple(view.apply(torch.empty(view.shape, device="meta")).shape) for view in views]
    return views if len(views) == len(found) and makes == after else ()


def _from_json(value: Any) -> View | None:
    row: Mapping[str, Any] = value if isinstance(value, dict) else {}
    said, shape = _whole(row.get("said")), _whole(row.get("shape"))
    names = [row.get(key) for key in ("op_type", "dtype", "name", "output")]
    if said is None or shape is None or min(shape, default=0) < 0 or not all(isinstance(name, str) for name in names):
        return None
    op_type, dtype, name, output = map(str, names)
    if op_type not in _VIEWS or dtype not in ir.DataType.__members__:
        return None
    as_input = row.get("as_input")
    return View(op_type, said, shape, ir.DataType[dtype], name, output, as_input if isinstance(as_input, str) else None)


def _whole(value: Any) -> tuple[int, ...] | None:
    fits = isinstance(value, list) and all(type(each) is int and abs(each) < 2**40 for each in value)
    return tuple(value) if fits else None
