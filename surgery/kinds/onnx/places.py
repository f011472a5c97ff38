"""Where the tensors of an ONNX model belong: in its own file, or in the file beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

__all__ = ["INSIDE", "OUTSIDE", "all_tensors", "is_whole", "memory_of", "note_place", "place_of", "tensor_of"]

INSIDE, OUTSIDE = "inside", "outside"
_PLACE = "surgery.place"  # in the notes of a tensor, which no file has
_BYTE = 8  # bits; of narrower numbers, several share one

Put = Callable[[ir.TensorProtocol], None]


def all_tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, Put]]:
    """Yield all tensors of a model, also those of nodes, bodies and functions, and what puts another in the place."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in [each for outer in graphs for each in (outer, *outer.subgraphs())]:
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value, partial(setattr, value, "const_value")
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.value, partial(_put_one, node, name)
                elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                    for place, tensor in enumerate(attribute.value):
                        yield tensor, partial(_put_one_of_many, node, name, place)


def _put_one(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    node.attributes[name] = ir.AttrTensor(name, tensor)


def _put_one_of_many(node: ir.Node, name: str, place: int, tensor: ir.TensorProtocol) -> None:
    tensors = list(node.attributes[name].value)
    tensors[place] = tensor
    node.attributes[name] = ir.AttrTensors(name, tensors)


def note_place(tensor: ir.TensorProtocol, place: str) -> ir.TensorProtocol:
    """Note where a tensor belongs when its model is saved; return it."""
    tensor.meta[_PLACE] = place
    return tensor


def place_of(tensor: ir.TensorProtocol) -> str | None:
    """Return where a tensor belongs; None for a new one."""
    if isinstance(tensor, ir.ExternalTensor):
        return OUTSIDE
    if isinstance(tensor, ir.serde.TensorProtoTensor | ir.StringTensor):
        return INSIDE
    found: str | None = tensor.meta.get(_PLACE)
    return found


def is_whole(kind: int) -> bool:
    """Whether each number of a type has bytes of its own."""
    return kind != ir.DataType.STRING and ir.DataType(kind).bitwidth >= _BYTE


def tensor_of(like: ir.TensorProtocol, raw: memoryview) -> ir.TensorProtocol:
    """Return a tensor with the name, type and shape of another, on the memory of its numbers as a file has them."""
    said = {"name": like.name, "doc_string": like.doc_string, "metadata_props": dict(like.metadata_props)}
    if not is_whole(like.dtype):
        packed = np.frombuffer(raw, np.uint8)
        return ir.PackedTensor(packed, like.dtype, shape=like.shape, **said)  # type: ignore[arg-type]
    array = np.frombuffer(raw, np.dtype(like.dtype.numpy()).newbyteorder("<")).reshape(like.shape.numpy())
    return ir.Tensor(array if array.flags.aligned else array.copy(), dtype=like.dtype, shape=like.shape, **said)  # type: ignore[arg-type]


def memory_of(tensor: ir.TensorProtocol) -> memoryview:
    """Return the bytes of a tensor as a file has them; they are its own memory where that is possible."""
    if isinstance(tensor, ir.Tensor) and is_whole(tensor.dtype):
        array = np.ascontiguousarray(tensor.numpy())
        if array.dtype.newbyteorder("<") == array.dtype or array.dtype.itemsize == 1:
            return memoryview(array.reshape(-1).view(np.uint8).data)
    return memoryview(tensor.tobytes())
