"""How far the outputs of two models are apart on the same inputs.

Outputs may be nested (tuples, dicts, dataclasses such as those of transformers). They are compared tensor by tensor,
each as a whole, by two numbers: the largest absolute difference, and the Frobenius norm of the difference over that of
the first model's output.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.algebra import relative_error
from surgery.errors import InputError, only_own_errors
from surgery.files.load import model_of
from surgery.kinds.inputs import Inputs, normalise_inputs
from surgery.kinds.registry import Model, kind_of
from surgery.text import first_line

__all__ = [
    "Difference",
    "OutputDifference",
    "compare",
    "compare_outputs",
    "default_inputs",
    "evaluating",
    "flatten_outputs",
    "run_model",
    "shared_inputs",
]


def default_inputs(model: Model, *, seed: int = 0) -> Inputs | None:
    """Return the inputs that a model brings along, or random ones of its shapes; None where it knows no shapes.

    An ExportedProgram, a traced GraphModule and an ONNX model know their shapes, other modules do not.
    """
    return kind_of(model).brought_inputs(model, seed=seed)


def shared_inputs(models: Sequence[Model], example_inputs: Any, *, seed: int = 0) -> Inputs:
    """Return the example inputs, or those of the first model that knows any; raises InputError where none does.

    ONNX models are asked last, since their inputs go by order alone, and of them first those of a fixed batch size.
    """
    if example_inputs is not None:
        return normalise_inputs(example_inputs)
    for model in sorted(models, key=_freedom):
        inputs = default_inputs(model, seed=seed)
        if inputs is not None:
            return inputs
    what = "no model knows the shape of its inputs"
    raise InputError(what, next_step="give example_inputs (on the command line --input-shape)")


def _freedom(model: Model) -> int:
    kind = kind_of(model)
    return 0 if not kind.is_onnx else 1 if kind.fixed_batch(model) is not None else 2


_GIVE = "give inputs: a tensor, a tuple, or a dict by name"


@dataclass(frozen=True)
class OutputDifference:
    """Differences of one output tensor.

    ``name`` is what an ONNX model among the two calls the output, or else its place: ``[0]``, ``.logits``.
    """

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
    a: Model | str | os.PathLike[str], b: Model | str | os.PathLike[str], inputs: Any = None, *, seed: int = 0
) -> Difference:
    """Return the differences of the outputs of ``b`` from those of ``a``; modules run in evaluation mode.

    Models are modules, exported programs, ONNX models, or paths of their files. Without ``inputs``, those are used that
    a module or a program brings along, the first one's if both do, else random ones of the shapes of an ONNX model.

    Raises:
        InputError: inputs are not known or do not fit, the outputs differ in number, kind or shape, or no number in
            them is finite, so that nothing can be compared.

    >>> layer = nn.Linear(3, 2)
    >>> compare(layer, layer, torch.ones(1, 3)).max_abs
    0.0
    """
    models = [model_of(a), model_of(b)]
    given = shared_inputs(models, inputs, seed=seed)
    first, second = (run_model(model, given) for model in models)
    names = next((found for model in models if (found := kind_of(model).output_names(model)) is not None), ())
    difference = compare_outputs(first, second, names=names)
    numbers = [tensor for _, tensor in flatten_outputs(first) if tensor.numel()]
    if numbers and not any(torch.isfinite(tensor).any() for tensor in numbers):
        raise InputError("the outputs hold no finite number, and nothing can be compared", next_step=_GIVE)
    return difference


def run_model(model: Model, inputs: Inputs) -> Any:
    """Return the outputs, without gradients and in evaluation mode; an ONNX model's as a tuple of tensors.

    Raises:
        InputError: the model does not take these inputs.
    """
    args, kwargs = inputs
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about itself; what matters here are the outputs
        module = kind_of(model).runnable(model)
        with evaluating(module):
            return _call(lambda: module(*args, **kwargs))


def _call(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except InputError:
        raise
    except Exception as error:  # whatever a model raises
        raise InputError(f"the model does not run on these inputs: {first_line(error)}", next_step=_GIVE) from error


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


def compare_outputs(first: Any, second: Any, *, names: Sequence[str] = ()) -> Difference:
    """Return the differences of two nests of tensors; ``names`` are those of the tensors, if there is one for each.

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
    named = names if len(names) == len(a) else [name for name, _ in a]
    return Difference(tuple(_differ(name, x, y) for name, (_, x), (_, y) in zip(named, a, b, strict=True)))


def _differ(name: str, first: Tensor, second: Tensor) -> OutputDifference:
    x, y = (_real(tensor.detach().cpu()) for tensor in (first, second))
    if torch.equal(torch.isnan(x), torch.isnan(y)):
        # inf - inf would be NaN. Only where both agree do they become 0: one infinity against a
        # number stays a difference.
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

    Texts of an ONNX model are passed over: they have no distance.

    Raises:
        InputError: the nest contains something other than tensors, numbers and arrays of texts.
    """
    if value is None or (isinstance(value, np.ndarray) and value.dtype == object):
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
