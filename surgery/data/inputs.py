"""Example inputs in one form, ``(args, kwargs)``, and inputs for those who give none.

Users give a tensor, a tuple or list of positional inputs, a dict of inputs by name, or the pair ``(args, kwargs)`` that
``torch.export`` keeps in a program. Made-up inputs are normal random numbers; whole numbers are 0 or 1, which is a
valid token, segment or class in any vocabulary; masks are all ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.system.arrays import MOST_BYTES

__all__ = [
    "Inputs",
    "default_inputs",
    "feed",
    "flatten_inputs",
    "normalise_inputs",
    "program_inputs",
    "random_tensor",
    "session_inputs",
    "with_batch",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_ALLOWED = "a tensor, a tuple or list of positional inputs, a dict of inputs by name, or a pair (tuple, dict) of both"
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


def normalise_inputs(example_inputs: Any) -> Inputs:
    """Return example inputs as ``(args, kwargs)``, NumPy arrays as tensors; ``((), {})`` for None.

    Raises:
        InputError: an input of an unknown kind.

    >>> normalise_inputs(None)
    ((), {})
    >>> normalise_inputs({"x": 1})
    ((), {'x': 1})
    """
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Tensor | np.ndarray):
        return (_as_tensor(example_inputs),), {}
    if isinstance(example_inputs, PackedSequence):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), _named(example_inputs)
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str | bytes):
        raise InputError(f"example inputs of type {type(example_inputs).__name__}", allowed=_ALLOWED)
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict):
        return tuple(map(_convert, example_inputs[0])), _named(example_inputs[1])
    return tuple(map(_convert, example_inputs)), {}


def _named(inputs: Mapping[Any, Any]) -> dict[str, Any]:
    if not all(isinstance(name, str) for name in inputs):
        raise InputError("example inputs by name have names that are no strings", allowed=_ALLOWED)
    return {name: _convert(value) for name, value in inputs.items()}


def _convert(value: Any) -> Any:
    return pytree.tree_map_only(np.ndarray, _as_tensor, value)


def _as_tensor(value: Tensor | npt.NDArray[Any]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.ascontiguousarray(value))
    except TypeError as error:
        raise InputError(f"a NumPy array of type {value.dtype}", allowed="numbers that torch has too") from error


def random_tensor(shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0, name: str = "") -> Tensor:
    """Return made-up numbers for one input: normal, or 0 and 1 for whole numbers, or ones for masks and booleans.

    Raises:
        InputError: no such seed, or a shape of more bytes than are made up.
    """
    _check_random(shape, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool or "mask" in name:
        return torch.ones(tuple(shape), dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(tuple(shape), generator=generator, dtype=wide).to(dtype)
    return torch.randint(2, tuple(shape), generator=generator, dtype=dtype)


def _check_random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> None:
    """Raise InputError for what torch would refuse or the memory not hold."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed={seed}", allowed="whole numbers from 0 below 2 ** 64")
    size = math.prod(shape) * dtype.itemsize
    if size > MOST_BYTES:
        what = f"an input of the shape {_show(shape)}, which would take {size} bytes"
        raise InputError(what, allowed=f"{MOST_BYTES} bytes of made-up numbers", next_step="choose smaller sizes")


def default_inputs(model: Any, *, seed: int = 0) -> Inputs | None:
    """Return the inputs that a model brings along, or random ones of its shapes; None where it knows no shapes.

    An ExportedProgram and a traced GraphModule know their shapes, an onnxruntime session too, other modules do not.
    """
    if isinstance(model, ExportedProgram):
        return program_inputs(model, seed=seed)
    if isinstance(model, ort.InferenceSession):
        return session_inputs(model, seed=seed)
    if isinstance(model, torch.fx.GraphModule):
        nodes = [node for node in model.graph.nodes if node.op == "placeholder"]
        values = [node.meta.get("val", node.meta.get("tensor_meta")) for node in nodes]
        if nodes and all(hasattr(value, "shape") for value in values):
            rows = enumerate(zip(nodes, values, strict=True))
            return tuple(_like(value, node.name, seed + i) for i, (node, value) in rows), {}
    return None


def program_inputs(program: ExportedProgram, *, seed: int = 0) -> Inputs:
    """Return the program's own example inputs, else random ones; a dynamic size is that of the export, or 2.

    Raises:
        InputError: the program has no example inputs, and takes something else than tensors.
    """
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return tuple(args), dict(kwargs)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves = []
    for index, name in enumerate(program.graph_signature.user_inputs):
        value = values.get(str(name))
        if not isinstance(value, Tensor):
            raise InputError(f"the input {name} of the program is no tensor", next_step=_GIVE)
        leaves.append(_like(value, str(name), seed + index))
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def _like(value: Any, name: str, seed: int) -> Tensor:
    return random_tensor([_size(size) for size in value.shape], value.dtype, seed=seed, name=name)


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 2 if hint is None else int(hint)


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


def with_batch(inputs: Inputs, batch: int) -> Inputs:
    """Return inputs of so many samples: repeated along axis 0, or cut.

    Those count whose axis 0 is as long as that of the first input.

    Raises:
        InputError: the first input has no axis of samples.

    >>> with_batch(((torch.tensor([[1], [2]]), torch.ones(3)), {}), 3)[0][0].flatten().tolist()
    [1, 2, 1]
    """
    first = next((leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    if first is None or first.dim() == 0 or not len(first):
        raise InputError(f"a batch of {batch} of inputs without samples", next_step=_GIVE)
    places = torch.arange(batch) % len(first)

    def resized(leaf: Tensor) -> Tensor:
        return leaf.index_select(0, places) if leaf.dim() and len(leaf) == len(first) else leaf

    args, kwargs = pytree.tree_map_only(Tensor, resized, inputs)
    return args, kwargs


def flatten_inputs(inputs: Inputs, program: ExportedProgram | None = None) -> list[Tensor]:
    """Return the tensors among the inputs, in the order in which the program, or else the caller, has them."""
    args, kwargs = inputs
    if program is not None and program.call_spec.in_spec is not None:
        order = program.call_spec.in_spec.child(1).context or []
        if set(order) == set(kwargs):
            kwargs = {name: kwargs[name] for name in order}
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


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
