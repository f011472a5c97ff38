"""The kind of ONNX models, and how one is called: its inputs by name, in the order of the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from surgery.errors import FileError, InputError
from surgery.kinds.base import Access, Kind, Piece, Pieces
from surgery.kinds.inputs import Declared, Inputs, Signature, given_inputs, random_tensor
from surgery.kinds.onnx.cut import CuttableOnnx
from surgery.kinds.onnx.graph import RECORD, read_metadata, set_numbers
from surgery.kinds.onnx.join import join_stages
from surgery.kinds.onnx.norms import NormNode, set_in_proto
from surgery.kinds.onnx.places import all_tensors
from surgery.kinds.onnx.proto import read_proto, write_proto
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.run import OnnxModule
from surgery.kinds.onnx.session import fitting_inputs
from surgery.kinds.onnx.tensors import DTYPES, to_torch
from surgery.kinds.onnx.write import OpenOnnx
from surgery.text import first_line

__all__ = ["OnnxKind", "OnnxProtoKind", "random_inputs"]


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _sizes(value: ir.Value) -> tuple[int | str, ...]:
    """Return the sizes that an input declares, with names (or "?") for those that may vary."""
    shape = () if value.shape is None else value.shape
    known = [size if isinstance(size, int) else size.value for size in shape]
    return tuple("?" if size is None or (isinstance(size, int) and size < 0) else size for size in known)


def _dtype(value: ir.Value) -> torch.dtype | None:
    return None if value.dtype is None else DTYPES.get(value.dtype)


def random_inputs(
    model: ir.Model, *, seed: int = 0, shapes: Mapping[str | int, Sequence[int]] = MappingProxyType({})
) -> Inputs:
    """Return random inputs of the shapes that a model declares; sizes that may vary are 1.

    ``shapes`` are those of other inputs, by name or by place.

    Raises:
        InputError: an input is not a tensor of numbers, or no shape of it is known; or a shape is that of no input.
    """
    made, values = [], _inputs(model)
    known = [value.name or "" for value in values]
    if unknown := [key for key in shapes if key not in known and key not in range(len(known))]:
        which = unknown[0] if isinstance(unknown[0], str) else f"number {unknown[0] + 1}"
        raise InputError(f"the model has no input {which}", allowed=", ".join(known) or "none")
    for number, (name, value) in enumerate(zip(known, values, strict=True)):
        dtype, shape = _dtype(value), shapes.get(name, shapes.get(number))
        if dtype is None:
            said = "of no known type" if value.dtype is None else f"of the type {value.dtype.name.lower()}"
            raise InputError(f"the input {name} is {said}", allowed="tensors of numbers and of booleans")
        if shape is None and value.shape is None:
            raise InputError(f"the input {name} declares no shape", next_step=f"give --input-shape {name}:N,N,...")
        sizes = shape or [size if isinstance(size, int) else 1 for size in _sizes(value)]
        made.append(random_tensor(sizes, dtype, seed=seed + number, name=name))
    return tuple(made), {}


class OnnxKind(Kind):
    """ONNX models, as ``onnx_ir`` holds them: their nodes are rewritten in a copy."""

    name = "onnx"
    models: ClassVar[type] = ir.Model
    label = "onnx_ir.Model"
    is_onnx = True

    def read(self, model: Any) -> ir.Model:
        """Return a model as ``onnx_ir`` holds it."""
        found: ir.Model = model
        return found

    def open(self, model: Any, inputs: Inputs, access: Access) -> OpenOnnx:
        """Open a model; the model itself is never changed."""
        return OpenOnnx(self.read(model), self._inputs(model, inputs))

    def _inputs(self, model: Any, inputs: Inputs) -> Inputs:
        """Return the inputs that are given, if they fit, or else those that a model brings, if it does."""
        if not any(inputs):
            return self.brought_inputs(model) or ((), {})
        declared = {}
        for value in _inputs(self.read(model)):
            declared[value.name or ""] = (_dtype(value), None if value.shape is None else _sizes(value))
        if unknown := [name for name in inputs[1] if name not in declared]:
            raise InputError(f"the model has no input {unknown[0]}", allowed=", ".join(declared) or "none")
        return (), dict(fitting_inputs(declared, inputs))

    def runnable(self, model: Any) -> nn.Module:
        """Return a module that runs a model under onnxruntime."""
        return OnnxModule(self.read(model))

    def as_onnx(self, model: Any) -> ir.Model | None:
        """Return the model as ``onnx_ir`` holds it."""
        return self.read(model)

    def kept(self, model: Any) -> Any:
        """Return what the metadata of a model have."""
        return read_metadata(self.read(model))

    def keep(self, model: Any, values: Mapping[str, Any]) -> None:
        """Put values into the metadata of a model."""
        model.metadata_props[RECORD] = json.dumps(values, allow_nan=False)

    def tensors(self, model: Any) -> Mapping[str, Any]:
        """Return the weights of a model by name."""
        return {name: to_torch(tensor) for name, tensor in Reader(self.read(model)).parameters.items()}

    def parts(self, model: Any) -> Mapping[str, Any]:
        """Return the weights of a model by name, as they are while it is open."""
        opened = OpenOnnx(self.read(model), ((), {}))
        return {name: to_torch(tensor) for name, tensor in opened.reader.parameters.items()}

    def exchanged(self, model: Any, parts: Mapping[str, Any]) -> ir.Model:
        """Return a copy of a model with other numbers for some of its parts, as ``onnx_ir`` holds it."""
        opened = OpenOnnx(self.read(model), ((), {}))
        for name, numbers in parts.items():
            set_numbers(opened.parameter(name), numbers)
        found: ir.Model = opened.finish()
        return found

    def brought_inputs(self, model: Any, *, seed: int = 0) -> Inputs | None:
        """Return random inputs of the shapes that a model declares; sizes that may vary are 1. None if it cannot."""
        read = self.read(model)
        known = all(_dtype(value) is not None and value.shape is not None for value in _inputs(read))
        return random_inputs(read, seed=seed) if known else None

    def signature(self, model: Any, example: Inputs) -> Signature:
        """Return how a model is called."""
        names = tuple(value.name or "" for value in _inputs(self.read(model)))
        return Signature(names, len(names), frozenset(names), positional=len(names))

    def output_names(self, model: Any) -> tuple[str, ...]:
        """Return the names of the graph's outputs."""
        return tuple(value.name or "" for value in self.read(model).graph.outputs)

    def declared_inputs(self, model: Any, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return what a model says about its inputs."""
        given = given_inputs(example, signature)
        found = {}
        for value in _inputs(self.read(model)):
            dtype, sizes = _dtype(value), _sizes(value)
            name = value.name or ""
            if dtype is None:
                continue
            if value.shape is None:
                if name not in given:
                    continue  # of any shape
                sizes = ("?",) * given[name].dim()
            fixed = tuple(size if isinstance(size, int) else None for size in sizes)
            found[name] = Declared(dtype, fixed, sizes)
        return found

    def fixed_batch(self, model: Any) -> int | None:
        """Return the only batch size that a model accepts, or None if it accepts any."""
        first = next((sizes for value in _inputs(self.read(model)) if (sizes := _sizes(value))), ())
        return first[0] if first and isinstance(first[0], int) else None

    def refuse_inplace(self, model: Any) -> str | None:
        """Refuse, since a changed model is always a new one."""
        return "an ONNX model cannot be changed in place"

    def refuse_structure(self) -> str | None:
        """Refuse, since the chains of a graph are nodes and not layers."""
        return "an ONNX graph"

    def cuttable(self, model: Any, inputs: Inputs) -> CuttableOnnx:
        """Open a model to be cut; it runs once on the inputs, which show the sizes of its values."""
        return CuttableOnnx(self.read(model), self._inputs(model, inputs))

    def join(self, pieces: Pieces) -> Any:
        """Return the model that was taken apart; the frame of the whole may come from a file of others."""
        return join_stages(list(map(self.read, self.stages_of(pieces))), pieces.whole)

    def leaves(self, pieces: Pieces, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the inputs of a call, which may come by name, in the order of the graph."""
        given = dict(zip(pieces.inputs, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != len(pieces.inputs) or given.keys() != set(pieces.inputs):
            raise InputError(f"{len(args) + len(kwargs)} inputs", allowed=", ".join(pieces.inputs) or "none")
        return [given[name] for name in pieces.inputs]

    def run_stage(self, model: Any, values: Sequence[Any]) -> tuple[Any, ...]:
        """Run a stage in a new session of onnxruntime; ``runnable`` keeps one for many runs."""
        found: tuple[Any, ...] = self.runnable(model)(*values)
        return found

    def result(self, pieces: Pieces, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Return the outputs as a tuple, as a model's module does."""
        return tuple(leaves)


class OnnxProtoKind(OnnxKind):
    """ONNX models as protobuf messages; the result is one as well."""

    name = "onnx-proto"
    models = onnx.ModelProto
    label = "onnx.ModelProto"

    def read(self, model: Any) -> ir.Model:
        """Return a message as ``onnx_ir`` holds it.

        Raises:
            InputError: it cannot be right, or says that weights are in files, and not in which folder.
        """
        try:
            found = read_proto(model)
        except FileError as error:
            what = f"the onnx.ModelProto {error.what}"
            raise InputError(what, allowed=error.allowed, next_step=error.next_step) from error
        except Exception as error:  # of onnx_ir, which knows no sparse tensors in nodes, say
            what = f"the onnx.ModelProto has parts that onnx_ir cannot read: {first_line(error)}"
            raise InputError(what, next_step="export the model again") from error
        if any(isinstance(tensor, ir.ExternalTensor) for tensor, _ in all_tensors(found)):
            what = "the onnx.ModelProto has weights in other files, and does not know their folder"
            raise InputError(what, next_step="load it with surgery.load(path), or with onnx.load(path)")
        return found

    def open(self, model: Any, inputs: Inputs, access: Access) -> OpenOnnx:
        """Open a message; the message itself is never changed."""
        return _OpenProto(model, self.read(model), self._inputs(model, inputs))

    def cuttable(self, model: Any, inputs: Inputs) -> CuttableOnnx:
        """Open a message to be cut; its stages are messages too."""
        return _CuttableProto(self.read(model), self._inputs(model, inputs))

    def join(self, pieces: Pieces) -> Any:
        """Return the message that was taken apart."""
        return write_proto(super().join(pieces))

    def keep(self, model: Any, values: Mapping[str, Any]) -> None:
        """Put values into the metadata of a message."""
        known = {entry.key: entry.value for entry in model.metadata_props}
        onnx.helper.set_model_props(model, known | {RECORD: json.dumps(values, allow_nan=False)})


class _OpenProto(OpenOnnx):
    def __init__(self, message: onnx.ModelProto, model: ir.Model, inputs: Inputs) -> None:
        super().__init__(model, inputs)
        self._message = message

    def keep_norm(self, found: NormNode, statistics: tuple[Tensor, Tensor]) -> None:
        """Give a batch norm of the message other statistics."""
        set_in_proto(self._message, found, statistics)

    def finish(self) -> Any:
        """Return the changed model as a message."""
        return write_proto(super().finish())


class _CuttableProto(CuttableOnnx):
    def cut(self, stage_of: Sequence[int]) -> Pieces:
        """Return the stages as messages."""
        pieces = super().cut(stage_of)
        stages = tuple(Piece(write_proto(piece.model), piece.inputs, piece.outputs) for piece in pieces.stages)
        return replace(pieces, stages=stages)
