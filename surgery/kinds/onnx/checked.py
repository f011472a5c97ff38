"""Check that the interpreter computes what onnxruntime computes, and find whether gradients lead through all nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from surgery.errors import InputError
from surgery.kinds.onnx.interpret import Interpreter, Observers
from surgery.kinds.onnx.one_node import arrays_back
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.session import TOLERANCES
from surgery.text import first_line

__all__ = ["Checked", "agree", "check"]

Start = Callable[[], Any]  # a session of onnxruntime


@dataclass(frozen=True, eq=False)
class Checked:
    """An interpreter that is right, and whether gradients lead from its outputs to the calls of all operators."""

    interpreter: Interpreter
    differentiable: bool


def check(
    reader: Reader, model: ir.Model, start: Start, feeds: Mapping[ir.Value, Tensor], calls: Iterable[ir.Value]
) -> Checked:
    """Return an interpreter whose outputs agree with those of onnxruntime; ``start`` opens a session of the model.

    If those of torch do not agree, onnxruntime runs all nodes. Outputs that are random cannot be compared.

    Raises:
        InputError: onnxruntime does not run the model on these inputs.
    """
    arrays = {value.name: found.numpy() for value, found in feeds.items()}
    try:
        expected = _by_onnxruntime(start, arrays)
    except InputError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no other base
        what = f"the model does not run on the calibration inputs: {first_line(error)}"
        raise InputError(what, next_step="check their number, shapes and dtypes") from error
    try:
        interpreter = Interpreter(model, reader.gates, calls=reader.calling)
        found = _with_gradients(interpreter, feeds, calls)
        right = agree(found, expected)
        if not right and interpreter.is_random:
            right = not agree(_by_onnxruntime(start, arrays), expected)
        if right:
            return Checked(interpreter, not interpreter.blocked)
    except Exception:  # torch may raise anything; onnxruntime did run the model
        pass
    plain = Interpreter(model, reader.gates, calls=reader.calling, in_torch=False)
    return Checked(plain, differentiable=False)


def _by_onnxruntime(start: Start, arrays: Mapping[str | None, Any]) -> list[Any]:
    """Return the outputs of a session, which maps the weights for as long as it lasts."""
    found = start().run(None, arrays)
    return [arrays_back(array) for array in found]


def _with_gradients(
    interpreter: Interpreter, feeds: Mapping[ir.Value, Any], calls: Iterable[ir.Value]
) -> Sequence[Any]:
    """Run a graph so that ``blocked`` shows where gradients of calls end; nothing is kept for a backward pass."""

    def start(y: Any) -> Any:
        known = isinstance(y, Tensor) and y.is_floating_point() and not y.requires_grad
        return y.detach().requires_grad_() if known else y

    observers = Observers()
    observers.after = dict.fromkeys(calls, start)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: kept):
        return interpreter.run(feeds, observers)


def agree(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether outputs have equal types and shapes, equal whole numbers and texts, and floats that differ by rounding.

    The error may be as large as export allows, or, of numbers far below 1, the last place of 1: onnxruntime's Sigmoid
    has an error of that size.
    """
    return len(found) == len(expected) and all(map(_agrees, found, expected))


def _agrees(found: Any, expected: Any) -> bool:
    if isinstance(found, list) and isinstance(expected, list):
        return agree(found, expected)
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return bool(np.array_equal(found, expected))
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if expected.dtype not in TOLERANCES:
        return torch.equal(found, expected)
    share, last_place = TOLERANCES[expected.dtype], torch.finfo(expected.dtype).eps
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found.detach())):
        return False
    found, expected = found.detach()[finite].double(), expected[finite].double()
    allowed = share * torch.linalg.vector_norm(expected) + last_place * expected.numel() ** 0.5
    return bool(torch.linalg.vector_norm(found - expected) <= allowed)
