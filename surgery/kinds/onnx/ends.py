"""What flows between the nodes of an ONNX model: the size, type and shape of each value, seen in one run.

A stage has to declare the types and shapes of what it takes and gives. What the model declares is taken first, then
what onnx infers; sizes that neither knows stay free, since the run shows those of one input only. What the run
contradicts is not taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from surgery.algebra import Shape
from surgery.errors import InputError
from surgery.kinds.inputs import Inputs
from surgery.kinds.onnx.interpret import Observers
from surgery.kinds.onnx.layout import lean
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.run import feeds_of, interpret
from surgery.kinds.onnx.tensors import DTYPES
from surgery.system.memory import give_back

__all__ = ["Seen", "declare", "infer", "observe"]

_KINDS = {dtype: kind for kind, dtype in DTYPES.items() if kind is not ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Seen:
    """What a run showed of a value: its bytes, and the type and shape of a tensor.

    ``type`` is None for a value that onnxruntime cannot be given from Python: a sequence, a text, a bfloat16 tensor.
    """

    bytes: int
    type: ir.DataType | None = None
    shape: Shape = ()

    @classmethod
    def of(cls, value: Any) -> Seen:
        """Return what is seen of a value of the interpreter."""
        if isinstance(value, Tensor):
            return cls(value.nbytes, _KINDS.get(value.dtype), tuple(value.shape))
        if isinstance(value, list):
            return cls(sum(cls.of(each).bytes for each in value))
        return cls(value.nbytes if isinstance(value, np.ndarray) else 0)


def observe(model: ir.Model, reader: Reader, inputs: Inputs) -> dict[ir.Value, Seen]:
    """Return what one run on example inputs shows of each value that the run computes.

    Raises:
        InputError: the model does not run on them, or has inputs and there are none.
    """
    if reader.inputs and not any(inputs):
        raise InputError("a model is split by what one run shows", next_step="give example_inputs")
    seen: dict[ir.Value, Seen] = {}

    def note(value: ir.Value) -> Callable[[Any], Any]:
        def see(found: Any) -> Any:
            seen[value] = Seen.of(found)
            return found

        return see

    feeds = feeds_of(reader, inputs)
    observers = Observers()
    observers.after = {value: note(value) for value in reader.values if value not in feeds}
    constants = interpret(model, reader, feeds, observers)
    give_back()
    known = {value: Seen.of(found) for value, found in (*feeds.items(), *constants.items())}
    return known | seen


def infer(model: ir.Model) -> dict[str, onnx.ValueInfoProto]:
    """Return what onnx infers of the values of a model's own graph, by name; nothing if it fails."""
    with contextlib.suppress(Exception):  # inference is a help; onnx may raise anything on operators of others
        graph = onnx.shape_inference.infer_shapes(lean(model)).graph
        return {info.name: info for info in (*graph.value_info, *graph.output)}
    return {}


def declare(value: ir.Value, inferred: Mapping[str, onnx.ValueInfoProto], seen: Seen | None) -> None:
    """Complete the type and shape that a value declares, from what is inferred and what was seen of it."""
    said = ir.Value(name=value.name)
    if (info := inferred.get(value.name or "")) is not None:
        ir.serde.deserialize_value_info_proto(info, said)
    if seen is None or seen.type is None:
        value.type, value.shape = value.type or said.type, value.shape or said.shape
        return
    tensor = ir.TensorType(seen.type)
    rows = [each.shape for each in (value, said) if each.shape is not None and len(each.shape) == len(seen.shape)]
    sizes = [next((row[at] for row in rows if row[at] != ir.SymbolicDim(None)), None) for at in range(len(seen.shape))]
    fits = all(not isinstance(size, int) or size == got for size, got in zip(sizes, seen.shape, strict=True))
    value.shape = ir.Shape(sizes if fits else [None] * len(sizes))
    value.type = tensor if value.type is None or value.dtype != tensor.dtype else value.type
