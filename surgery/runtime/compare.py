"""How far the outputs of two models are apart on the same inputs.

Outputs may be nested (tuples, dicts, dataclasses such as those of transformers). They are compared tensor by tensor,
each as a whole, by two numbers: the largest absolute difference, and the Frobenius norm of the difference over that of
the first model's output.

What an onnxruntime session is fed: inputs in its order and form, and made-up ones of the shapes that it declares.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from surgery.algebra import relative_error
from surgery.errors import InputError, only_own_errors
from surgery.files.guard.onnx import open_onnx
from surgery.files.load import load
from surgery.kinds.inputs import Inputs, flatten_inputs, normalise_inputs, random_tensor
from surgery.kinds.onnx.session import open_file
from surgery.kinds.registry import is_model, kind_of
from surgery.text import first_line

__all__ = [
    "Difference",
    "Runnable",
    "OutputDifference",
    "compare",
    "compare_outputs",
    "default_inputs",
    "evaluating",
    "feed",
    "flatten_outputs",
    "open_model",
    "run_model",
    "session_inputs",
]

_GIVE_EXAMPLES = "give example_inputs"
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
        raise InputError(
            f"the inputs do not fit the model: given {given or 'none'}", allowed=wanted, next_step=_GIVE_EXAMPLES
        )
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


Runnable: TypeAlias = nn.Module | ExportedProgram | ort.InferenceSession
_GIVE = "give inputs: a tensor, a tuple, or a dict by name"


@dataclass(frozen=True)
class OutputDifference:
    """Differences of one output tensor; ``name`` is its place in the first model's outputs: ``[0]``, ``.logits``."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float


@dataclass(frozen=True)
class Difference:
    """Differences of all outputs; ``max_abs`` and ``relative`` are the largest of any output."""

    outputs: tuple[OutputDifference, ...]

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of two numbers."""
        return max(output.max_abs for output in self.outputs)

    @property
    def relative(self) -> float:
        """Largest relative Frobenius error of an output."""
        return max(output.relative for output in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """Return the differences as JSON values."""
        rows = [dataclasses.asdict(output) for output in self.outputs]
        return {"max_abs": self.max_abs, "relative": self.relative, "outputs": rows}


@only_own_errors
def compare(
    a: Runnable | str | os.PathLike[str], b: Runnable | str | os.PathLike[str], inputs: Any = None, *, seed: int = 0
) -> Difference:
    """Return the differences of the outputs of ``b`` from those of ``a``; modules run in evaluation mode.

    Models are modules, exported programs, or paths to .pt2 and .onnx files. Without ``inputs``, the inputs that the
    first model brings along are used, else those of the second, else random ones of their shapes.

    Raises:
        InputError: inputs are not known or do not fit, the outputs differ in number, kind or shape, or no number in
            them is finite, so that nothing can be compared.

    >>> layer = nn.Linear(3, 2)
    >>> compare(layer, layer, torch.ones(1, 3)).max_abs
    0.0
    """
    models = [open_model(a), open_model(b)]
    if inputs is None:
        found = (default_inputs(model, seed=seed) for model in models)
        given = next((candidate for candidate in found if candidate is not None), None)
        if given is None:
            raise InputError("neither model knows the shape of its inputs", next_step=_GIVE)
    else:
        given = normalise_inputs(inputs)
    first, second = (run_model(model, given) for model in models)
    difference = compare_outputs(first, second)
    numbers = [tensor for _, tensor in flatten_outputs(first) if tensor.numel()]
    if numbers and not any(torch.isfinite(tensor).any() for tensor in numbers):
        raise InputError("the outputs hold no finite number, and nothing can be compared", next_step=_GIVE)
    return difference


def open_model(model: Runnable | str | os.PathLike[str], *, threads: int | None = None) -> Runnable:
    """Return a model as it is, or from its file: an .onnx file becomes a session, and any other file is loaded.

    Raises:
        InputError: the model is of another kind, its file cannot be read, or its weights lie outside of its folder.
    """
    if isinstance(model, ort.InferenceSession) or is_model(model):
        return model
    if not isinstance(model, str | os.PathLike):
        allowed = "nn.Module, GraphModule, ExportedProgram, or the path of a .pt2 or .onnx file"
        raise InputError(f"a model of type {type(model).__name__}", allowed=allowed)
    path = Path(model)
    if path.suffix != ".onnx":
        return load(path)
    return open_file(open_onnx(path), threads=threads)


def run_model(model: Runnable, inputs: Inputs) -> Any:
    """Return the outputs, without gradients and in evaluation mode; a session's as a tuple of tensors.

    Raises:
        InputError: the model does not take these inputs.
    """
    if isinstance(model, ort.InferenceSession):
        feeds = feed(model, inputs)
        return tuple(_from_onnx(value) for value in _call(lambda: model.run(None, feeds)))
    args, kwargs = inputs
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about itself; what matters here are the outputs
        module = kind_of(model).runnable(model)
        with evaluating(module):
            return _call(lambda: module(*args, **kwargs))


def _call(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:  # whatever a model raises
        raise InputError(f"the model does not run on these inputs: {first_line(error)}", next_step=_GIVE) from error


def _from_onnx(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype != object else value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put all submodules in evaluation mode, and each back in its own mode afterwards."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False  # not eval(): exported modules refuse it
    try:
        yield
    finally:
        for m in training:
            m.training = True


def compare_outputs(first: Any, second: Any) -> Difference:
    """Return the differences of two nests of tensors.

    Raises:
        InputError: the two have different numbers of tensors, different shapes, or no tensor at all.
    """
    a, b = list(flatten_outputs(first)), list(flatten_outputs(second))
    shapes = [[tuple(tensor.shape) for _, tensor in side] for side in (a, b)]
    if shapes[0] != shapes[1]:
        said = [", ".join("x".join(map(str, shape)) or "scalar" for shape in side) or "none" for side in shapes]
        raise InputError(f"the outputs differ in structure: {said[0]} against {said[1]}", allowed="equal shapes")
    if not a:
        raise InputError("the models return no tensors", allowed="models with at least one output")
    return Difference(tuple(_differ(name, x, y) for (name, x), (_, y) in zip(a, b, strict=True)))


def _differ(name: str, first: Tensor, second: Tensor) -> OutputDifference:
    x, y = (_real(tensor.detach().cpu()) for tensor in (first, second))
    if torch.equal(torch.isnan(x), torch.isnan(y)):
        same = (x == y) | torch.isnan(x)  # infinities and NaN in the same places do not count as a difference
        x, y = x.masked_fill(same & ~torch.isfinite(x), 0), y.masked_fill(same & ~torch.isfinite(y), 0)
    max_abs = float((x - y).abs().max()) if x.numel() else 0.0
    relative = relative_error(y, x)
    return OutputDifference(
        name or "output",
        tuple(first.shape),
        max_abs if math.isfinite(max_abs) else math.inf,
        relative if math.isfinite(relative) else math.inf,
    )


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


def flatten_outputs(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a nest, each with its place: ``[0]``, ``.logits``; a number counts as a tensor.

    Raises:
        InputError: the nest contains something other than tensors and numbers.
    """
    if value is None:
        return
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten_outputs(item, f"{name}.{key}")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from flatten_outputs(item, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from flatten_outputs(getattr(value, field.name), f"{name}.{field.name}")
    elif type(value) in pytree.SUPPORTED_NODES:
        for index, leaf in enumerate(pytree.tree_leaves(value)):
            yield from flatten_outputs(leaf, f"{name}[{index}]")
    else:
        allowed = "tensors and numbers in tuples, lists, dicts and dataclasses"
        raise InputError(f"the output{name} is a {type(value).__name__}", allowed=allowed)
