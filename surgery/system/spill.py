"""Numbers that are too many to hold at once: they take memory while one looks at them, and else stand in a file.

The file has no name, so that nothing is left of it when the process ends, however it ends. Its room is reserved first:
where a disk is full, the numbers stay in memory. What is opened maps its part of the file; the system takes the pages
back as soon as nobody holds the tensor.

    spill = Spill()
    total = spill.zeros((1, 4096, 4096))     128 MiB of the file, none in memory
    total.opened()[0] += x.mT @ x            in memory for as long as this line runs
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from surgery.system.mapped import map_file

__all__ = ["LARGE", "Spill", "Spilled"]

LARGE = 2**17  # bytes that are worth a place in a file: float64 of 128 x 128


class Spilled:
    """A tensor that starts as zeros, in memory or in a part of a file."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, spill: Spill | None, offset: int
    ) -> None:
        self.shape, self._dtype, self._spill, self._offset = torch.Size(shape), dtype, spill, offset
        self._held = torch.zeros(self.shape, dtype=dtype, device=device) if spill is None else None

    @property
    def in_file(self) -> bool:
        """Whether it takes no memory while nobody looks at it."""
        return self._held is None

    def opened(self) -> Tensor:
        """Return the tensor; what is written into it stays."""
        return self.part(0, self.shape)

    def part(self, start: int, shape: Sequence[int]) -> Tensor:
        """Return the numbers from place ``start`` on as a tensor of a shape; what is written into it stays."""
        if self._held is not None:
            return self._held.view(-1)[start : start + math.prod(shape)].view(*shape)
        assert self._spill is not None
        count, width = math.prod(shape), self._dtype.itemsize
        mapped, skipped = self._spill.mapped(self._offset + width * start, width * count)
        found = torch.frombuffer(mapped, dtype=self._dtype, offset=skipped, count=count)  # which keeps what is mapped
        return found.view(*shape)


class Spill:
    """A file for many numbers, made when the first of them need it, and gone with the last."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0

    def zeros(
        self, shape: Sequence[int], device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float64
    ) -> Spilled:
        """Return zeros of a shape; in memory where they are few, on another device, or find no room in a file."""
        where, size = torch.device(device), dtype.itemsize * math.prod(shape)
        offset = self._next()
        in_file = where.type == "cpu" and size >= LARGE and self._reserve(offset, size)
        if in_file:
            self._end = offset + size
        return Spilled(shape, dtype, where, self if in_file else None, offset)

    def holding(self, values: Tensor) -> Spilled:
        """Return what holds a copy of values, in the file where they are many."""
        made = self.zeros(values.shape, values.device, dtype=values.dtype)
        made.opened().copy_(values)
        return made

    def mapped(self, offset: int, size: int) -> tuple[mmap.mmap, int]:
        """Return a part of the file, mapped as long as it is held, and how many bytes of it come before ``offset``."""
        # A mapping starts at a page. Example of pages of 4096 bytes: byte 5000 is the 904th of the second.
        assert self._file is not None
        skipped = offset % mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_WRITE
        return map_file(self._file.fileno(), size + skipped, offset=offset - skipped, access=access), skipped

    def room(self, size: int) -> npt.NDArray[np.uint8] | None:
        """Return bytes of the file, mapped as long as they are held; None if they are few, or there is no room."""
        offset = self._next()
        if size < LARGE or not self._reserve(offset, size):
            return None
        self._end = offset + size
        mapped, _ = self.mapped(offset, size)
        return np.frombuffer(mapped, np.uint8)

    def _next(self) -> int:
        """Return where the next part starts: where a mapping may."""
        # Example of pages of 4096 bytes: after 5000 bytes the next one is at 8192.
        return -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

    def _reserve(self, offset: int, size: int) -> bool:
        """Reserve room for a part; False where there is none, or the system cannot reserve it."""
        if not hasattr(os, "posix_fallocate"):  # without it, a full disk would show when the part is written
            return False
        with suppress(OSError):
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as any part of it is needed
                weakref.finalize(self, self._file.close)
            os.posix_fallocate(self._file.fileno(), offset, size)
            return True
        return False
