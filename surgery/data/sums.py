"""Sums of x x^T over many rows, and values that are made of such sums each time one is asked for.

The second moments of all sites of a model may take several times the memory of its weights: of a linear layer from 4096
to 1024 values the moment has four times as many numbers, of twice the width. So each stands in a file where it is
large, and what is made of it lives as long as somebody works with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from surgery.system.spill import Spill

__all__ = ["Computed", "DiagonalSum", "SquareSum"]

_Value = TypeVar("_Value", covariant=True)

_SHARE = 16  # of its size: how many rows wait to be added to a sum in a file
_ROWS = 1024  # of a large sum that are looked at at once


class Computed(Mapping[str, _Value]):
    """Values by name, which are made each time that one is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], _Value]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> _Value:
        """Return a new value of this name."""
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        """Whether there is one of this name; none is made."""
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._makers)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._makers)


class SquareSum:
    """The sum of x x^T (groups, n, n) over rows x, in float64."""

    def __init__(self, groups: int, size: int, spill: Spill, device: torch.device | str = "cpu") -> None:
        self._sum, self._device = spill.zeros((groups, size, size), device), device
        self._groups, self._size, self._waiting = groups, size, list[Tensor]()

    def add(self, rows: Tensor) -> None:
        """Add (groups, rows, n); products are in its dtype."""
        self._waiting.append(rows)
        # To open a sum in a file costs as much as to add many rows, so that a few wait for others.
        if not self._sum.in_file or sum(x.shape[1] for x in self._waiting) >= self._size // _SHARE:
            self._flush()

    def over(self, count: int) -> Tensor:
        """Return the sum divided by a number, in a new tensor."""
        made = torch.empty(self._groups, self._size, self._size, dtype=torch.float64, device=self._device)
        for groups, rows, block in self.blocks():
            torch.div(block, count, out=made[groups, rows])
        return made

    def add_to(self, other: Tensor) -> None:
        """Add the sum to a tensor of its shape, in place."""
        for groups, rows, block in self.blocks():
            other[groups, rows] += block

    def diagonal(self) -> Tensor:
        """Return the diagonal (groups, n) in a new tensor."""
        made = torch.empty(self._groups, self._size, dtype=torch.float64, device=self._device)
        for groups, rows, block in self.blocks():
            made[groups, rows] = block.diagonal(rows.start, -2, -1)
        return made

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the sum in blocks (groups, rows, n), each after which groups and rows it has."""
        self._flush()
        yield from self._opened()

    def _opened(self) -> Iterator[tuple[slice, slice, Tensor]]:
        # A block is some whole groups, or some rows of one, so that its numbers are next to each other. Example of 3
        # groups of 400: the first block has 2 of them. Of one group of 1500, it has the rows before 1024.
        many = max(1, _ROWS // self._size)
        for first in range(0, self._groups, many):
            groups = slice(first, min(first + many, self._groups))
            for start in range(0, self._size, _ROWS):
                rows = slice(start, min(start + _ROWS, self._size))
                shape = (groups.stop - first, rows.stop - start, self._size)
                yield groups, rows, self._sum.part((first * self._size + start) * self._size, shape)

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, 1)
        self._waiting.clear()
        for groups, part, block in self._opened():
            block += rows[groups, :, part].mT @ rows[groups]


class DiagonalSum:
    """The diagonal (groups, n) of that sum, alone."""

    def __init__(self, groups: int, size: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(groups, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add (groups, rows, n)."""
        self._sum += rows.square().sum(1, dtype=torch.float64)

    def add_shares(self, shares: Tensor) -> None:
        """Add the sum of one-hot rows (n,), which is its own diagonal."""
        self._sum += shares

    def over(self, count: int) -> Tensor:
        """Return the sum divided by a number, in a new tensor."""
        return self._sum / count

    def diagonal(self) -> Tensor:
        """Return the sum in a new tensor."""
        return self._sum.clone()
