"""Modules for what chains need and torch.nn does not have: a transpose, a shift by a bias, a sum of branches.

They stand in the ``nn.Sequential`` of a factored site beside ``nn.Linear``, the convolutions, ``nn.Unflatten`` and
``nn.Flatten``.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Shift", "Sum", "Transpose"]


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
    """Apply each child to the same input, and add up."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the children's outputs."""
        first, *rest = self
        total: Tensor = first(x)
        for row in rest:
            total = total + row(x)
        return total
