"""ONNX messages to models of onnx_ir and back, with what onnx_ir does not know: sparse initializers and training.

A sparse initializer is read as a dense one, so that its numbers can be worked with; it is sparse again in the message
that is written, unless its numbers have changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from surgery.errors import FileError
from surgery.kinds.onnx.origin import DESCRIBED
from surgery.system.arrays import MOST_BYTES
from surgery.system.opening import shown_name

__all__ = ["keep_part", "keep_sparse", "read_proto", "sparse_tensors", "write_proto"]

_KEPT = "surgery: not in onnx_ir"  # in the meta of a graph, which its copies share


@dataclass(frozen=True, eq=False)
class _Kept:
    """What onnx_ir does not hold; sparse initializers with the dense numbers that were made of them."""

    training: tuple[onnx.TrainingInfoProto, ...]
    sparse: tuple[tuple[onnx.SparseTensorProto, ir.TensorProtocol | None], ...]


def read_proto(proto: onnx.ModelProto) -> ir.Model:
    """Return a message as onnx_ir holds it; the message stays as it is.

    Raises:
        FileError: two weights of a graph have one name, or a sparse one is not right, too large, or in a body.
    """
    sparse = list(proto.graph.sparse_initializer)
    for graph in (proto.graph, *_bodies(proto)):
        # onnx_ir would keep the last of them, onnxruntime the first
        names = [
            *(tensor.name for tensor in graph.initializer),
            *(each.values.name for each in graph.sparse_initializer),
        ]
        if len(set(names)) < len(names):
            (twice, _), *_ = Counter(names).most_common(1)
            raise FileError(f"has two weights named {shown_name(twice)}", next_step="export the model again")
    if any(graph.sparse_initializer for graph in _bodies(proto)):
        raise FileError("has a sparse initializer in a body", allowed="sparse initializers in the graph itself")
    whole = proto
    if sparse:
        whole = onnx.ModelProto()
        whole.CopyFrom(proto)
        whole.graph.initializer.extend(map(_dense, sparse))
    model = ir.serde.deserialize_model(whole)
    model.graph.meta[_KEPT] = _Kept(
        tuple(proto.training_info),
        tuple((each, model.graph.initializers[each.values.name].const_value) for each in sparse),
    )
    for info in proto.graph.value_info:
        if info.name in model.graph.initializers:
            model.graph.initializers[info.name].meta[DESCRIBED] = True
    return model


def sparse_tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    """Return the dense tensors of a model that are sparse in its message."""
    kept: _Kept | None = model.graph.meta.get(_KEPT)
    values = model.graph.initializers
    found = [] if kept is None else [(each.values.name, numbers) for each, numbers in kept.sparse]
    return [t for name, t in found if t is not None and name in values and values[name].const_value is t]


def keep_part(model: ir.Model) -> None:
    """Keep of what onnx_ir does not hold what belongs to the initializers that a model has; training belongs to all."""
    kept: _Kept | None = model.graph.meta.get(_KEPT)
    if kept is not None:
        sparse = tuple(pair for pair in kept.sparse if pair[0].values.name in model.graph.initializers)
        model.graph.meta[_KEPT] = replace(kept, training=(), sparse=sparse)


def keep_sparse(model: ir.Model, parts: Sequence[ir.Model]) -> None:
    """Keep the sparse messages that parts of a model keep, in the order of its initializers."""
    kept: _Kept = model.graph.meta[_KEPT]  # of a model that was read from a message
    every = [part.graph.meta.get(_KEPT) for part in parts]
    found = {each.values.name: (each, dense) for one in every if one is not None for each, dense in one.sparse}
    sparse = tuple(found[name] for name in model.graph.initializers if name in found)
    model.graph.meta[_KEPT] = replace(kept, sparse=sparse)


def write_proto(model: ir.Model) -> onnx.ModelProto:
    """Return a model as a message."""
    proto: onnx.ModelProto = ir.to_proto(model)
    for tensor in proto.graph.initializer:  # onnx_ir repeats what was read of an initializer
        known = {entry.key: entry.value for entry in tensor.metadata_props}
        if len(known) < len(tensor.metadata_props):
            del tensor.metadata_props[:]
            for key, value in known.items():
                tensor.metadata_props.add(key=key, value=value)
    kept: _Kept | None = model.graph.meta.get(_KEPT)
    if kept is None:
        return proto
    values, graph = model.graph.initializers, proto.graph
    proto.training_info.extend(kept.training)
    still = {tensor.name or "" for tensor in sparse_tensors(model)}
    graph.sparse_initializer.extend(each for each, _ in kept.sparse if each.values.name in still)
    _drop(graph.initializer, still)
    # onnx_ir describes each initializer a second time
    _drop(graph.value_info, {name for name, value in values.items() if not value.meta.get(DESCRIBED)})
    return proto


def _drop(messages: Any, names: Set[str]) -> None:
    for place in reversed(range(len(messages))):
        if messages[place].name in names:
            del messages[place]


def _bodies(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs inside of nodes."""
    waiting: list[Any] = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while waiting:
        for attribute in waiting.pop().attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield graph
                waiting += graph.node


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Return a sparse initializer as a dense one of the same name."""
    name, dims = sparse.values.name, tuple(sparse.dims)
    what = f"has a sparse initializer, {name},"
    # Before memory is taken: a few bytes may claim any size.
    numbers = 8 * math.prod(dims)
    if numbers > MOST_BYTES:
        raise FileError(f"{what} of {math.prod(dims)} numbers", allowed=f"{MOST_BYTES} bytes of numbers")
    try:
        values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        if places.ndim == 2:
            places = np.ravel_multi_index(tuple(places.T), dims)
        whole = np.zeros(math.prod(dims), values.dtype)
        whole[places] = values
    except (ValueError, IndexError, TypeError) as error:
        raise FileError(f"{what} that cannot be right", next_step="get the file again from its source") from error
    found: onnx.TensorProto = numpy_helper.from_array(whole.reshape(dims), name)
    return found
