"""Modules for the steps of chains that torch.nn does not have: a transpose, a shift by a bias, a sum of branches.

A factored site is an ``nn.Sequential`` of these modules, ``nn.Linear``, convolutions, ``nn.Unflatten`` and
``nn.Flatten``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from surgery.algebra import Flatten, Link, Unflatten
from surgery.algebra import steps as algebra

__all__ = [
    "Shift",
    "Sum",
    "Transpose",
    "build_link",
    "is_link_module",
    "read_flatten",
    "read_link_module",
    "read_transpose",
    "read_unflatten",
]


class Transpose(nn.Module):
    """Swap two axes, ``first`` < ``second`` < 0, of an input with any number of axes in front."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with the axes swapped."""
        return x.transpose(self.first, self.second)

    def extra_repr(self) -> str:
        """Return the axes."""
        return f"{self.first}, {self.second}"


class Shift(nn.Module):
    """Add a bias of shape (features,) to the last axis."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + bias``."""
        return x + self.bias


class Sum(nn.ModuleList):
    """Apply each child to the same input, and add up the outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the children's outputs."""
        first, *rest = self
        total: Tensor = first(x)
        for row in rest:
            total = total + row(x)
        return total


def read_unflatten(dim: Any, sizes: Any) -> Link | None:
    """Return the step that splits an axis counted from the end into fixed sizes; None for other arguments."""
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    return Unflatten(dim, tuple(sizes)) if isinstance(dim, int) and dim < 0 and whole else None


def read_flatten(start: Any, end: Any) -> Link | None:
    """Return the step that joins axes counted from the end; None for other arguments."""
    return Flatten(start, end) if isinstance(start, int) and start < end < 0 else None


def read_transpose(first: Any, second: Any) -> Link | None:
    """Return the step that swaps two axes counted from the end; None for other arguments."""
    both = isinstance(first, int) and isinstance(second, int) and first < 0 and second < 0
    return algebra.Transpose(min(first, second), max(first, second)) if both else None


def is_link_module(module: nn.Module) -> bool:
    """Whether a module is a step without a weight matrix, by its class."""
    return type(module) in (nn.Unflatten, nn.Flatten, Transpose, Shift)


def read_link_module(module: nn.Module) -> Link | None:
    """Return the reshape or transpose that a module is, or None for any other module, a shift included."""
    if type(module) is nn.Unflatten:
        return read_unflatten(module.dim, module.unflattened_size)
    if type(module) is nn.Flatten:
        return read_flatten(module.start_dim, module.end_dim)
    return algebra.Transpose(module.first, module.second) if type(module) is Transpose else None


def build_link(step: Link) -> nn.Module:
    """Return a module for a reshape or transpose; raises TypeError for any other step."""
    if isinstance(step, Unflatten):
        return nn.Unflatten(step.dim, step.sizes)
    if isinstance(step, Flatten):
        return nn.Flatten(step.start, step.end)
    if isinstance(step, algebra.Transpose):
        return Transpose(step.first, step.second)
    raise TypeError(f"{type(step).__name__} is not a reshape")
