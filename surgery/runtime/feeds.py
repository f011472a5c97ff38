"""What an onnxruntime session is fed: inputs in its order and form, and made-up ones of the shapes that it declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor
from torch.export import ExportedProgram

from surgery.errors import InputError
from surgery.kinds.inputs import Inputs, flatten_inputs, random_tensor
from surgery.kinds.registry import kind_of

__all__ = ["default_inputs", "feed", "session_inputs"]

_GIVE = "give example_inputs"
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def default_inputs(model: Any, *, seed: int = 0) -> Inputs | None:
    """Return the inputs that a model brings along, or random ones of its shapes; None where it knows no shapes.

    An ExportedProgram and a traced GraphModule know their shapes, an onnxruntime session too, other modules do not.
    """
    if isinstance(model, ort.InferenceSession):
        return session_inputs(model, seed=seed)
    return kind_of(model).brought_inputs(model, seed=seed)


def session_inputs(
    session: ort.InferenceSession, *, seed: int = 0, shapes: Mapping[str | int, Sequence[int]] = MappingProxyType({})
) -> Inputs:
    """Return random inputs by position, of the declared shapes; dynamic sizes are 1.

    ``shapes`` are those of other inputs, by name or by place.

    Raises:
        InputError: an input that is no tensor of numbers.
    """
    made = []
    known = [declared.name for declared in session.get_inputs()]
    if unknown := [key for key in shapes if key not in known and key not in range(len(known))]:
        raise InputError(f"the model has no input {unknown[0]}", allowed=", ".join(known))
    for index, declared in enumerate(session.get_inputs()):
        if declared.type not in _DTYPES:
            raise InputError(f"the input {declared.name} is a {declared.type}", allowed=", ".join(_DTYPES))
        plain = [size if isinstance(size, int) and size >= 0 else 1 for size in declared.shape]
        shape = shapes.get(declared.name, shapes.get(index, plain))
        made.append(random_tensor(shape, _DTYPES[declared.type], seed=seed + index, name=declared.name))
    return tuple(made), {}


def feed(
    session: ort.InferenceSession, inputs: Inputs, program: ExportedProgram | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Return what the session takes: inputs by name by their names, the others in order.

    ``program`` is the one that was exported to it, if there is one: it knows the place of nested inputs and names.

    Raises:
        InputError: another number of inputs, another shape or type; the message shows both sides.
    """
    declared = session.get_inputs()
    tensors = flatten_inputs(inputs if program else _by_name(inputs, [d.name for d in declared]), program)
    wanted = ", ".join(f"{d.name} {d.type} {_show(d.shape)}" for d in declared)
    fits = len(tensors) == len(declared) and all(map(_fits, tensors, declared))
    if not fits:
        given = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {_show(t.shape)}" for t in tensors)
        raise InputError(f"the inputs do not fit the model: given {given or 'none'}", allowed=wanted, next_step=_GIVE)
    return {d.name: t.detach().cpu().contiguous().numpy() for d, t in zip(declared, tensors, strict=True)}


def _by_name(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """Bring inputs by name into the session's order."""
    args, kwargs = inputs
    if len(names) == len(kwargs) == 1:
        return args, kwargs  # nothing can be mistaken
    rest = names[len(args) :]
    if kwargs and set(kwargs) != set(rest):
        raise InputError(f"inputs named {', '.join(kwargs)}", allowed=", ".join(rest) or "none by name")
    return args, {name: kwargs[name] for name in rest if name in kwargs}


def _fits(tensor: Tensor, declared: Any) -> bool:
    if _DTYPES.get(declared.type) != tensor.dtype or len(declared.shape) != tensor.dim():
        return False
    pairs = zip(declared.shape, tensor.shape, strict=True)
    return all(not isinstance(size, int) or size == got for size, got in pairs)


def _show(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape)) or "scalar"
