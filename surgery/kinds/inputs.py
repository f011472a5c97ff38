"""Example inputs in one form, ``(args, kwargs)``, and inputs for those who give none.

Users give a tensor, a tuple or list of positional inputs, a dict of inputs by name, or the pair ``(args, kwargs)`` that
``torch.export`` keeps in a program. Made-up inputs are normal random numbers; whole numbers are 0 or 1, which is a
valid token, segment or class in any vocabulary; masks are all ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.system.arrays import MOST_BYTES

__all__ = ["Inputs", "flatten_inputs", "input_like", "normalise_inputs", "random_tensor", "with_batch"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_ALLOWED = "a tensor, a tuple or list of positional inputs, a dict of inputs by name, or a pair (tuple, dict) of both"
_GIVE = "give example_inputs"


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


def input_like(value: Any, name: str, seed: int) -> Tensor:
    """Return made-up numbers of the form of a value of a graph; a dynamic size is that of the export, or 2."""
    return random_tensor([_size(size) for size in value.shape], value.dtype, seed=seed, name=name)


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 2 if hint is None else int(hint)


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


def _show(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape)) or "scalar"
