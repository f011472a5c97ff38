"""Run one node of an ONNX graph by onnxruntime, as a model of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from surgery.kinds.onnx.session import open_session
from surgery.kinds.onnx.tensors import to_ir

__all__ = ["OneNode", "arrays_back", "bodies_of", "captured_by", "is_used"]


def bodies_of(node: ir.Node) -> list[ir.Graph]:
    """Return the bodies of a node: the graphs among its attributes."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def captured_by(node: ir.Node) -> list[ir.Value]:
    """Return the values outside of a node that its bodies read."""
    return list(dict.fromkeys(value for body in bodies_of(node) for value in _free(body)))


def _free(body: ir.Graph) -> Iterator[ir.Value]:
    own = {*body.inputs, *body.initializers.values(), *(value for node in body for value in node.outputs)}
    for node in body:
        yield from (value for value in (*node.inputs, *captured_by(node)) if value is not None and value not in own)
    yield from (value for value in body.outputs if value not in own)


class OneNode:
    """One node as a model; ``constants`` are values that do not change, which become its initializers."""

    def __init__(
        self, node: ir.Node, opsets: Mapping[str, int], ir_version: int, constants: Mapping[ir.Value, Any]
    ) -> None:
        self._node, self._opsets, self._ir_version = node, opsets, ir_version
        given = (*(value for value in node.inputs if value is not None), *captured_by(node))
        self._reads = list(dict.fromkeys(given))
        fixed = self._reads if node.op_type != "BatchNormalization" else []  # its statistics may be corrected
        known = {value: constants[value] for value in fixed if constants.get(value) is not None}
        self._fixed = {value: found for value, found in known.items() if not isinstance(found, list)}
        self._sessions: dict[tuple[Any, ...], Any] = {}  # by the types of what it reads

    def run(self, known: Mapping[ir.Value, Any]) -> tuple[Any, ...]:
        """Return the outputs, without gradients; None in the place of an output that nothing reads."""
        wanted = [value.name for value in self._node.outputs if is_used(value)]
        if not wanted:
            return (None,) * len(self._node.outputs)
        free = [value for value in self._reads if value not in self._fixed]
        feeds = {value.name or "": _as_array(known[value]) for value in free if known[value] is not None}
        kinds = tuple(_kind(array) for array in feeds.values())
        if kinds not in self._sessions:
            self._sessions[kinds] = open_session(self._model(feeds), threads=1)
        found = dict(zip(wanted, self._sessions[kinds].run(wanted, feeds), strict=True))
        return tuple(arrays_back(found.get(value.name)) for value in self._node.outputs)

    def _model(self, feeds: Mapping[str, Any]) -> bytes:
        node: Any = ir.to_proto(self._node)
        fixed = [_tensor_proto(value, numbers) for value, numbers in self._fixed.items()]
        inputs = [_declared(name, array) for name, array in feeds.items()]
        outputs = [onnx.helper.make_empty_tensor_value_info(v.name or "") for v in self._node.outputs if is_used(v)]
        graph = onnx.helper.make_graph([node], "one_node", inputs, outputs, fixed)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version)
        found: bytes = model.SerializeToString()
        return found


def is_used(value: ir.Value) -> bool:
    """Whether a node or the outputs of a graph read a value."""
    return bool(value.name) and (bool(value.uses()) or value.is_graph_output())


def _as_array(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_array(each) for each in value]
    return value.detach().contiguous().numpy() if isinstance(value, Tensor) else value


def arrays_back(value: Any) -> Any:
    """Return arrays as tensors, also those in a list; texts stay as they are."""
    if isinstance(value, list):
        return [arrays_back(each) for each in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype != object else value


def _kind(array: Any) -> Any:
    if isinstance(array, list):
        return ("list", *map(_kind, array[:1]))
    return str(array.dtype), *_sizes(array)


def _declared(name: str, array: Any) -> onnx.ValueInfoProto:
    # an input of any shape but the type that came: a later batch may be smaller
    if isinstance(array, list):
        kind = onnx.helper.np_dtype_to_tensor_dtype(array[0].dtype) if array else onnx.TensorProto.FLOAT
        return onnx.helper.make_tensor_sequence_value_info(name, kind, None)
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, _sizes(array))


def _sizes(array: Any) -> list[int | None]:
    """Return the sizes that an input declares: of few whole numbers, which may be a shape, how many there are."""
    return [array.size] if array.ndim == 1 and array.dtype.kind == "i" and array.size < 8 else [None] * array.ndim


def _tensor_proto(value: ir.Value, numbers: Any) -> onnx.TensorProto:
    name = value.name or ""
    if isinstance(numbers, np.ndarray):
        return onnx.numpy_helper.from_array(numbers, name)
    made: Any = ir.to_proto(to_ir(numbers, name) if isinstance(numbers, Tensor) else numbers)
    made.name = name
    found: onnx.TensorProto = made
    return found
