"""How far rounding alone moves the outputs of a program: by how much an exact copy on another runtime may differ.

Two runtimes add the same numbers in different orders. What that does to an output depends on the model: differences of
nearly equal numbers lose digits, and a deep network passes the loss on. There are two yardsticks, both relative
Frobenius errors:

- The error of the program itself, against a run of the same graph in float64. For that run every float tensor is
  widened, and every narrow type that the graph names, as in ``x.to(float32)``, becomes float64.
- The change of the outputs when each weight and input moves by at most one unit in the last place, at random. It shows
  how the graph multiplies roundings, whatever operators it has (Monte Carlo arithmetic, Parker 1997, at the leaves
  alone).

The second replaces the first where that cannot be computed: an operator has no float64 kernel, or changes its narrow
inputs in place. It also guards the first where that is small by luck, as in an output of a single number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.kinds.inputs import Inputs
from surgery.runtime.compare import flatten_outputs

__all__ = ["float64_outputs", "shaken_outputs"]

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


def float64_outputs(program: ExportedProgram, inputs: Inputs) -> list[Tensor] | None:
    """Return the outputs of the program, all computed in float64; None if that is not possible.

    >>> program = torch.export.export(torch.nn.Linear(2, 3), (torch.ones(1, 2),))
    >>> [output.dtype for output in float64_outputs(program, ((torch.ones(1, 2),), {}))]
    [torch.float64]
    """
    return _run(program, inputs, _widen, _InFloat64)


def shaken_outputs(program: ExportedProgram, inputs: Inputs, *, seed: int = 0) -> list[Tensor] | None:
    """Return the outputs with each weight and input moved by up to one unit in the last place; None if that fails."""
    generator = torch.Generator().manual_seed(seed)

    def shake(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        # eps |x| is one to two units in the last place of x: 1.5 in float32 moves by up to 1.8e-7. The factor is in
        # float64, as 1 + eps noise rounded to float32 would be 1 or one of its neighbours.
        noise = torch.empty(value.shape, dtype=torch.float64).uniform_(-1, 1, generator=generator).to(value.device)
        moved = (value * (1 + torch.finfo(value.dtype).eps * noise)).to(value.dtype)
        return torch.where(value == value.round(), value, moved)  # whole numbers are exact: masks, places, limits

    return _run(program, inputs, shake, None)


def _run(
    program: ExportedProgram,
    inputs: Inputs,
    change: Callable[[Any], Any],
    mode: type[TorchDispatchMode] | None,
) -> list[Tensor] | None:
    """Run a program with its state and inputs changed; the program itself stays as it is."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch about itself
            module = program.module()
            state = {name: change(value.detach()) for name, value in _state(module).items()}
            args, kwargs = pytree.tree_map(change, inputs)
            if mode is None:
                outputs = torch.func.functional_call(module, state, args, kwargs)
            else:
                with mode():
                    outputs = torch.func.functional_call(module, state, args, kwargs)
        return [tensor for _, tensor in flatten_outputs(outputs)]
    except Exception:  # whatever an operator without such a kernel raises: the caller has another yardstick
        return None


def _state(module: torch.nn.Module) -> Mapping[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _InFloat64(TorchDispatchMode):
    """Computes in float64 whatever is asked for in a narrower float type, including tensors that operators create."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args, kwargs or {}
        if func._schema.is_mutable and any(_is_narrow(leaf) for leaf in pytree.tree_leaves(given)):
            raise TypeError(f"{func} changes a narrow tensor in place")  # a widened copy would take the change
        args, kwargs = pytree.tree_map(_widen, given)
        return pytree.tree_map(_widen, func(*args, **kwargs))


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _WIDE


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    return value.to(_WIDE[value.dtype]) if _is_narrow(value) else value
