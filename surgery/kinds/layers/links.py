"""Reshapes as modules: the layers that are steps of a chain without a weight matrix, read and built.

What ``build_link`` makes, ``read_link_module`` reads.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.algebra.steps import Flatten, Link, Transpose, Unflatten
from surgery.kinds.layers import steps as layers

__all__ = ["build_link", "is_link_module", "read_flatten", "read_link_module", "read_transpose", "read_unflatten"]


def read_unflatten(dim: Any, sizes: Any) -> Link | None:
    """Return the step of these arguments, or None where a chain has no such step."""
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    return Unflatten(dim, tuple(sizes)) if isinstance(dim, int) and dim < 0 and whole else None


def read_flatten(start: Any, end: Any) -> Link | None:
    """Return the step of these arguments, or None where a chain has no such step."""
    return Flatten(start, end) if isinstance(start, int) and start < end < 0 else None


def read_transpose(first: Any, second: Any) -> Link | None:
    """Return the step of these arguments, or None where a chain has no such step."""
    both = isinstance(first, int) and isinstance(second, int) and first < 0 and second < 0
    return Transpose(min(first, second), max(first, second)) if both else None


def is_link_module(module: nn.Module) -> bool:
    """Whether the module's class is one of a step without a weight matrix."""
    return type(module) in (nn.Unflatten, nn.Flatten, layers.Transpose, layers.Shift)


def read_link_module(module: nn.Module) -> Link | None:
    """Return the reshape or transpose that a module is, or None for any other module (a shift has a parameter)."""
    if type(module) is nn.Unflatten:
        return read_unflatten(module.dim, module.unflattened_size)
    if type(module) is nn.Flatten:
        return read_flatten(module.start_dim, module.end_dim)
    return Transpose(module.first, module.second) if type(module) is layers.Transpose else None


def build_link(step: Link) -> nn.Module:
    """Return the module of a reshape or transpose."""
    if isinstance(step, Unflatten):
        return nn.Unflatten(step.dim, step.sizes)
    if isinstance(step, Flatten):
        return nn.Flatten(step.start, step.end)
    if isinstance(step, Transpose):
        return layers.Transpose(step.first, step.second)
    raise TypeError(f"{type(step).__name__} is no reshape")
