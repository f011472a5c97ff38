"""Run the forward of a layer with a chain in the place of its operator, or with observers of the operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Proxy

from surgery.algebra import Operator, Shape
from surgery.errors import InputError, Refusal
from surgery.kinds.layers.follow import CalledWith, RunInPlace, Tap, without_modes
from surgery.kinds.layers.layer_call import follow, operator_of, trials
from surgery.kinds.layers.untouched import evaluation
from surgery.kinds.layers.within import Within
from surgery.text import first_line

__all__ = ["inner_of_chain", "inner_shape", "read_within", "run_within", "watching"]


def read_within(module: nn.Module, within: Within) -> Operator | Refusal:
    """Return the operator inside a layer, with the weight and the bias that the layer computes now."""
    found = follow(module, trials(module)[0])
    return found if isinstance(found, Refusal) else operator_of(found[0], pads=within.pads)


def inner_shape(module: nn.Module, within: Within, shape: Shape) -> Shape:
    """Return the shape of the operator's input inside a layer, for an input shape of the layer.

    Raises:
        InputError: the layer's forward does not run at that shape.
    """
    try:
        found = follow(module, shape)
    except Exception as error:  # a forward may raise anything
        raise InputError(f"a layer cannot be followed at the shape {shape}: {first_line(error)}") from error
    if isinstance(found, Refusal):
        raise InputError(f"a layer cannot be followed at the shape {shape}: {found.reason}")
    # a padding that is done by hand enlarges the last axes of the input
    # Example: of an input (1, 3, 8, 8), a padding (1, 2) makes (1, 3, 10, 12).
    pads = _pads(found[0].parts) if within.pads else ()
    return tuple(
        size + (2 * pads[at - len(found[0].shape)] if len(found[0].shape) - at <= len(pads) else 0)
        for at, size in enumerate(found[0].shape)
    )


def _pads(parts: CalledWith) -> tuple[Any, ...]:
    """Return the padding of a call: for each spatial axis, the size on each of its two sides."""
    padding = dict(zip(parts.rest[0][2:], parts.rest[1:], strict=True))["padding"]
    dims = parts.weight.dim() - 2
    return padding if isinstance(padding, tuple) and len(padding) == dims else (padding,) * dims


class _Reached(Exception):
    """Raised to stop a forward once it has reached the operator."""


def inner_of_chain(layer: Any, within: Within, shape: Shape) -> Shape:
    """Return the shape of the chain's input in a factored layer, for an input shape of the layer.

    Raises:
        InputError: the layer's forward does not run at that shape.
    """
    found: list[Shape] = []
    like = next(iter(layer.parameters()))
    whole = issubclass(within.kind, nn.Embedding)

    def reach(source: Tensor) -> Tensor:
        found.append(tuple(int(size) for size in source.shape))
        raise _Reached

    try:
        with torch.no_grad(), evaluation(layer), FakeTensorMode(allow_non_fake_inputs=True):
            source = torch.zeros(shape, dtype=torch.int64 if whole else like.dtype, device=like.device)
            run_within(layer, within, source, reach, like)
    except _Reached:
        return found[0]
    except Exception as error:  # a forward may raise anything
        raise InputError(f"a layer cannot be followed at the shape {shape}: {first_line(error)}") from error
    raise InputError(f"a layer does not call its operator at the shape {shape}")


def run_within(layer: nn.Module, within: Within, source: Any, run: Callable[[Any], Any], like: Tensor) -> Any:
    """Run the forward of the original class of a factored layer, with ``run`` in the place of its operator.

    ``like`` is a tensor that has the dtype and the device of the weight.

    Raises:
        InputError: torch.fx traces the layer and cannot see the call, or the call has other arguments than before.
    """
    # The forward runs on an object of the original class with the attributes of the factored layer. Ghosts, tensors
    # without numbers, stand for the parameters that went into the chain; the operator is the call that reads them.
    with without_modes():
        ghosts = {name: torch.empty(shape, dtype=like.dtype, device="meta") for name, shape in within.ghosts}
    made: Any = object.__new__(within.kind)
    own, theirs = vars(made), vars(layer)
    own.update(theirs)
    own.update(ghosts)
    ran = []

    def instead(parts: CalledWith) -> Any:
        ran.append(parts)
        return run(_padded(within, parts))

    with RunInPlace(ghosts.values(), like.device, instead):
        result = within.kind.forward(made, source)
    if not ran and isinstance(source, Proxy):
        raise InputError("torch.fx cannot see a factored layer call its operator", next_step="use torch.export")
    for name, value in own.items():  # attributes that the forward has set belong to the layer
        # ``own`` stands for what is not there: it is nobody's attribute
        if theirs.get(name, own) is not value and name not in ghosts:
            theirs[name] = value
    return result


def _padded(within: Within, parts: CalledWith) -> Any:
    """Return the input of an operator; it is padded here if the operator's padding changes with the input.

    Raises:
        InputError: the call has other arguments than the operator that was factored.
    """
    if within.pads:
        return F.pad(parts.source, [side for pad in reversed(_pads(parts)) for side in (pad, pad)])
    if parts.rest != within.rest:
        raise InputError(
            "a factored layer calls its operator with another stride, padding or dilation than it was factored for",
            next_step="factor the model with example inputs of this kind, or recompose it first",
        )
    return parts.source


@contextlib.contextmanager
def watching(
    layer: nn.Module, within: Within, see: Callable[[Any], None], change: Callable[[Any], Any] | None = None
) -> Iterator[None]:
    """Call ``see`` with each input of the operator inside a layer, and replace its outputs by those of ``change``."""

    def forward(source: Any) -> Any:
        def show(parts: CalledWith) -> None:
            see(_padded(within, parts))

        with Tap(within.at, show, change):
            return type(layer).forward(layer, source)

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]
