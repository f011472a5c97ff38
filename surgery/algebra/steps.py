"""Steps of a chain that are not operators: reshapes move numbers, a shift adds a bias, and branches add up.

Axes are counted from the end, so that a step is the same with any number of batch axes in front. Each step has a
counterpart among torch's modules and among its functions. There are those that the factorizations need, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from surgery.algebra.operators import Operator, Shape

__all__ = ["Branches", "Flatten", "Link", "Shift", "Step", "Transpose", "Unflatten"]


@dataclass(frozen=True)
class Link:
    """Base of the steps that are not operators."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return 0

    def macs(self, shape: Shape) -> int:
        """Return 0: nothing is multiplied."""
        return 0

    def to(self, **kwargs: Any) -> Link:
        """Return the same step with its tensors, if any, moved or cast."""
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the step."""
        raise TypeError(f"{type(self).__name__} cannot run")

    def out_shape(self, shape: Shape) -> Shape:
        """Return the output shape for an input shape."""
        raise TypeError(f"{type(self).__name__} has no output shape")


@dataclass(frozen=True)
class Unflatten(Link):
    """Split the axis ``dim`` (negative) into axes of ``sizes``, all positive."""

    dim: int
    sizes: Shape

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to (..., prod(sizes), ...)."""
        return x.unflatten(self.dim, self.sizes)

    def out_shape(self, shape: Shape) -> Shape:
        """Return the shape with ``sizes`` in the place of the axis."""
        at = len(shape) + self.dim
        return (*shape[:at], *self.sizes, *shape[at + 1 :])


@dataclass(frozen=True)
class Flatten(Link):
    """Make one axis of those from ``start`` to ``end`` (both negative, both included)."""

    start: int
    end: int

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to a tensor with at least ``-start`` axes."""
        return x.flatten(self.start, self.end)

    def out_shape(self, shape: Shape) -> Shape:
        """Return the shape with the product of the axes in their place."""
        first, last = len(shape) + self.start, len(shape) + self.end
        size = 1
        for axis in shape[first : last + 1]:
            size *= axis
        return (*shape[:first], size, *shape[last + 1 :])


@dataclass(frozen=True)
class Transpose(Link):
    """Swap two axes, both negative, ``first`` < ``second``."""

    first: int
    second: int

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to a tensor with at least ``-first`` axes."""
        return x.transpose(self.first, self.second)

    def out_shape(self, shape: Shape) -> Shape:
        """Return the shape with the axes swapped."""
        sizes = list(shape)
        sizes[self.first], sizes[self.second] = sizes[self.second], sizes[self.first]
        return tuple(sizes)


@dataclass(frozen=True, eq=False)
class Shift(Link):
    """Add a bias to the last axis, as a linear layer does last; for chains without an operator that could hold it."""

    bias: Tensor

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.bias.numel()

    def to(self, **kwargs: Any) -> Shift:
        """Return the same shift with its bias moved or cast."""
        return replace(self, bias=self.bias.to(**kwargs))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to (..., len(bias))."""
        return x + self.bias

    def out_shape(self, shape: Shape) -> Shape:
        """Return the same shape."""
        return shape


@dataclass(frozen=True, eq=False)
class Branches(Link):
    """The sum of several rows of operators on the same input; only the last operator may have a bias."""

    rows: tuple[tuple[Operator, ...], ...]

    @property
    def operators(self) -> tuple[Operator, ...]:
        """All operators, row by row."""
        return tuple(operator for row in self.rows for operator in row)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last operator."""
        return self.rows[-1][-1].bias

    def with_bias(self, bias: Tensor | None) -> Branches:
        """Return the same sum with another bias."""
        *before, last = self.rows
        return Branches((*before, (*last[:-1], last[-1].with_bias(bias))))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(operator.parameters for operator in self.operators)

    def macs(self, shape: Shape) -> int:
        """Return the multiply-accumulates of all rows; additions are not counted."""
        total = 0
        for row in self.rows:
            at = shape
            for operator in row:
                total += operator.macs(at)
                at = operator.out_shape(at)
        return total

    def to(self, **kwargs: Any) -> Branches:
        """Return the same sum with its tensors moved or cast."""
        return Branches(tuple(tuple(operator.to(**kwargs) for operator in row) for row in self.rows))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply every row, and add."""
        values = []
        for row in self.rows:
            value = x
            for operator in row:
                value = operator(value)
            values.append(value)
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def out_shape(self, shape: Shape) -> Shape:
        """Return the output shape of each row."""
        for operator in self.rows[0]:
            shape = operator.out_shape(shape)
        return shape


Step = Operator | Link
