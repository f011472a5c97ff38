"""How much memory a solver may need, and the refusal of what would not fit.

The estimate is rough, and an upper bound. It counts in the dtype that solvers work in (float32 or float64). It adds up

- some copies of the weight: permuted, projected, what is left of it (one in float64 counts twice);
- four matrices of the size of the largest Gram matrix: itself, its eigenvectors, and LAPACK's work space of twice that.

A Gram matrix of the shorter side of an unfolding is never larger than the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.errors import InputError
from surgery.system.memory import available_memory

__all__ = ["check_memory", "estimate"]

_COPIES = {"svd": 5, "spatial": 5, "depthwise": 5, "tucker": 6, "cp": 6, "tt": 5, "tr": 6}
_SQUARES = 4


def estimate(method: str, kernel: Sequence[int], itemsize: int) -> int:
    """Return about how many bytes a method needs at most besides a kernel (g, O, I, *size) of ``itemsize`` a number.

    A method that is not known counts as the most demanding one.

    >>> estimate("svd", (1, 4096, 4096), 4) // 2**20
    640
    """
    groups, out, columns, *size = kernel
    taps, weights = math.prod(size), math.prod(kernel)
    by_out, by_in = min(out, columns * taps), min(columns, out * taps)
    largest = {"svd": by_out, "tucker": max(by_out, by_in), "cp": max(by_out, by_in)}
    square = largest[method] ** 2 if method in largest else out * columns * taps
    copies = _COPIES.get(method, max(_COPIES.values()))
    return itemsize * weights + max(itemsize, 4) * (copies * weights + _SQUARES * groups * square)


def check_memory(needed_bytes: int, what: str) -> None:
    """Let pass what fits into the memory available, or where the system does not say how much that is.

    Raises:
        InputError: ``what`` needs more; with the estimate, what is available, and what to do next.
    """
    available = available_memory()
    if available is not None and needed_bytes > available:
        raise InputError(
            f"{what} may need {_size(needed_bytes)} of memory",
            allowed=f"the {_size(available)} available",
            next_step="keep this site dense (rank None), or run where more is free",
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{math.ceil(count / 2**20)} MiB"
