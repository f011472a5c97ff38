"""Inputs of models: bring them to one form, ``(args, kwargs)``, make some up, and say how a model is called.

Users give a tensor, a tuple or list of positional inputs, a dict of inputs by name, or the pair ``(args, kwargs)`` that
``torch.export`` keeps in a program. Made-up inputs are normal random numbers. Integer inputs are 0 or 1, which is a
valid token, segment or class in any vocabulary; masks are all ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.system.arrays import MOST_BYTES

__all__ = [
    "Declared",
    "Inputs",
    "Signature",
    "example_forms",
    "flatten_inputs",
    "forward_signature",
    "given_inputs",
    "input_like",
    "normalise_inputs",
    "random_tensor",
    "with_batch",
]


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_ALLOWED = "a tensor, a tuple or list of positional inputs, a dict of inputs by name, or a pair (tuple, dict) of both"
_GIVE = "give example_inputs"


def normalise_inputs(example_inputs: Any) -> Inputs:
    """Return example inputs as ``(args, kwargs)``, NumPy arrays as tensors; ``((), {})`` for None.

    Raises:
        InputError: the inputs have another type, or names that are not strings.

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
    # a pair of a tuple and a dict is (args, kwargs); any other sequence is positional inputs
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict):
        return tuple(map(_convert, example_inputs[0])), _named(example_inputs[1])
    return tuple(map(_convert, example_inputs)), {}


def _named(inputs: Mapping[Any, Any]) -> dict[str, Any]:
    if not all(isinstance(name, str) for name in inputs):
        raise InputError("example inputs by name have names that are not strings", allowed=_ALLOWED)
    return {name: _convert(value) for name, value in inputs.items()}


def _convert(value: Any) -> Any:
    return pytree.tree_map_only((np.ndarray, np.generic), _as_tensor, value)


def _as_tensor(value: Tensor | npt.NDArray[Any]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value, order="C", copy=None))
    except TypeError as error:
        raise InputError(f"a NumPy array of type {value.dtype}", allowed="a dtype that torch has as well") from error


def random_tensor(shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0, name: str = "") -> Tensor:
    """Return made-up numbers for one input: normal, or 0 and 1 for integers, or ones for masks and booleans.

    Raises:
        InputError: the seed is out of range, or the tensor would take too many bytes.
    """
    _check_random(shape, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool or "mask" in name:
        return torch.ones(tuple(shape), dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        # torch draws no random numbers in some narrow dtypes; and so each dtype gets the same numbers, rounded
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(tuple(shape), generator=generator, dtype=wide).to(dtype)
    return torch.randint(2, tuple(shape), generator=generator, dtype=dtype)


def _check_random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> None:
    """Raise InputError for a seed that torch refuses, or for a tensor of more than ``MOST_BYTES``."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed={seed}", allowed="whole numbers from 0 below 2 ** 64")
    size = math.prod(shape) * dtype.itemsize
    if size > MOST_BYTES:
        what = f"an input of the shape {_show(shape)}, which would take {size} bytes"
        raise InputError(what, allowed=f"{MOST_BYTES} bytes of made-up numbers", next_step="choose smaller sizes")


def input_like(value: Any, name: str, seed: int) -> Tensor:
    """Return made-up numbers for a value of a graph; a dynamic size is its size at the export, or 2 if unknown."""
    return random_tensor([_size(size) for size in value.shape], value.dtype, seed=seed, name=name)


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 2 if hint is None else int(hint)


def with_batch(inputs: Inputs, batch: int) -> Inputs:
    """Return inputs with ``batch`` samples: the samples are repeated along axis 0, or cut.

    Only tensors whose axis 0 is as long as that of the first tensor are changed.

    Raises:
        InputError: the first tensor has no samples along axis 0.

    >>> with_batch(((torch.tensor([[1], [2]]), torch.ones(3)), {}), 3)[0][0].flatten().tolist()
    [1, 2, 1]
    """
    first = next((leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    if first is None or first.dim() == 0 or not len(first):
        raise InputError(f"a batch of {batch} of inputs without samples", next_step=_GIVE)
    # samples 0, 1, 0, 1, 0 for a batch of five from two
    places = torch.arange(batch) % len(first)

    def resized(leaf: Tensor) -> Tensor:
        return leaf.index_select(0, places) if leaf.dim() and len(leaf) == len(first) else leaf

    args, kwargs = pytree.tree_map_only(Tensor, resized, inputs)
    return args, kwargs


def flatten_inputs(inputs: Inputs, program: ExportedProgram | None = None) -> list[Tensor]:
    """Return the tensors among the inputs, in the order of the program's inputs, or as given if there is no program."""
    args, kwargs = inputs
    if program is not None and program.call_spec.in_spec is not None:
        order = program.call_spec.in_spec.child(1).context or []
        if set(order) == set(kwargs):
            kwargs = {name: kwargs[name] for name in order}
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _show(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape)) or "scalar"


@dataclass(frozen=True)
class Signature:
    """How a model is called: the names of its inputs, in order; the first ``positional`` cannot be given by name.

    ``taken`` is how many values of a sequence are inputs; the values after them are labels. ``required`` are the inputs
    that must be given. An ``open_ended`` model accepts other names as well.
    """

    names: tuple[str, ...]
    taken: int
    required: frozenset[str]
    positional: int = 0
    open_ended: bool = False

    def arrange(self, item: Any) -> Inputs:
        """Return one calibration input of the user's as ``(args, kwargs)``, without labels.

        Raises:
            InputError: it has too few values, or lacks a required name.
        """
        if isinstance(item, Mapping):
            return self._by_name(item)
        args, kwargs = normalise_inputs(item)
        if isinstance(item, Tensor) or kwargs:
            return args, kwargs
        if len(args) < len(self.required):
            what = f"a calibration input has {len(args)} values"
            raise InputError(what, allowed=f"{', '.join(self.names)}, and labels, which are left out")
        return args[: self.taken], {}

    def _by_name(self, item: Mapping[Any, Any]) -> Inputs:
        _, given = normalise_inputs(item)
        if len(given) == 1 and len(self.required) == 1 and not set(given) & set(self.names) and not self.open_ended:
            return tuple(given.values()), {}  # one array for one input: its name does not matter
        missing = [name for name in self.names if name in self.required and name not in given]
        if missing:
            what = f"the calibration inputs have no {', '.join(missing)} (they have {', '.join(given) or 'none'})"
            raise InputError(what, allowed=", ".join(self.names))
        # inputs that cannot go by name become positional, in the model's order
        first = self.names[: self.positional]
        known = given if self.open_ended else {name: given[name] for name in self.names if name in given}
        args = tuple(known[name] for name in first if name in known)
        return args, {name: value for name, value in known.items() if name not in first}


@dataclass(frozen=True)
class Declared:
    """What is known of an input: its dtype and its sizes (None for a size that may vary).

    ``shape`` is the shape of the example input, with names in the place of named dynamic sizes. ``ids`` is the number
    of ids that the model knows, if the input is ids. ``longest`` is the limit on the size of the second axis, if there
    is one.
    """

    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    shape: tuple[int | str, ...]
    ids: int | None = None
    longest: int | None = None


def forward_signature(model: nn.Module, example: Inputs) -> Signature:
    """Return how a module is called, from the signature of its ``forward``."""
    parameters = inspect.signature(model.forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # *args and **kwargs have no names; a model with **kwargs accepts other names
    plain = [p for p in parameters if p.kind not in variadic]
    names = [p.name for p in plain]
    needed = [p.name for p in plain if p.default is p.empty]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = len(example[0]) or len(needed) or len(names)
    return Signature(tuple(names), taken, frozenset(needed), open_ended=open_ended)


def given_inputs(example: Inputs, signature: Signature) -> dict[str, Any]:
    """Return example inputs by name."""
    args, kwargs = example
    return dict(zip(signature.names, args, strict=False)) | kwargs


def example_forms(model: nn.Module, example: Inputs, signature: Signature) -> dict[str, Declared]:
    """Return dtype and shape of the inputs that are tensors, by name, from the example inputs."""
    return {
        name: Declared(value.dtype, (None,) * value.dim(), tuple(value.shape), _ids(model, name))
        for name, value in given_inputs(example, signature).items()
        if isinstance(value, Tensor)
    }


def _ids(model: nn.Module, name: str) -> int | None:
    """Return the number of ids that a Hugging Face model knows, for its input ``input_ids``; else None."""
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    if name != "input_ids" or embeddings is None:
        return None
    known = getattr(embeddings(), "num_embeddings", None)
    return known if isinstance(known, int) else None
