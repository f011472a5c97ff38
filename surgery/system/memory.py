"""How much memory there is, how much a solver may need, and the refusal of what would not fit.

The estimate is rough, and an upper bound. It counts in the dtype that solvers work in (float32 or float64). It adds up

- some copies of the weight: permuted, projected, what is left of it (one in float64 counts twice);
- four matrices of the size of the largest Gram matrix: itself, its eigenvectors, and LAPACK's work space of twice that.

A Gram matrix of the shorter side of an unfolding is never larger than the weight.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from surgery.errors import InputError
from surgery.system.mapped import drop_pages

__all__ = ["available_memory", "check_memory", "estimate", "give_back", "give_back_large"]

_MUCH = 2**20  # bytes
_MMAP_THRESHOLD = -3  # of mallopt, as glibc numbers it
_MEMINFO = Path("/proc/meminfo")
_PAGES = Path("/proc/self/statm")
_GROUP = Path("/sys/fs/cgroup")
_CONTAINERS = (
    (_GROUP / "memory.max", _GROUP / "memory.current"),
    (_GROUP / "memory" / "memory.limit_in_bytes", _GROUP / "memory" / "memory.usage_in_bytes"),
)


def available_memory() -> int | None:
    """Return the bytes that this process can have without swapping, or None where nothing says (other than Linux).

    That is the least of three: what the machine has free, what its container has free, and what is left of the limit of
    the process itself (``ulimit -v``).
    """
    found = [*_of_machine(), *_of_container(), *_of_process()]
    return max(0, min(found)) if found else None


def give_back(used: int = _MUCH) -> None:
    """Give back to the system what was freed and the C library would keep, and the pages of mapped files.

    To search for what was freed takes a millisecond, and is left out where few bytes were ``used``.
    """
    drop_pages()
    if used < _MUCH:
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems than Linux with glibc
        ctypes.CDLL(None).malloc_trim(0)


def give_back_large(size: int = 2**22) -> None:
    """Let memory blocks of this size or more go back to the system as soon as this process frees them."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, size)


def _of_machine() -> Iterator[int]:
    with contextlib.suppress(OSError):
        lines = _MEMINFO.read_text().splitlines()
        yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _of_container() -> Iterator[int]:
    for limit, used in _CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # the limit is "max" where there is none
            yield int(limit.read_text()) - int(used.read_text()) + _cached(used.with_name("memory.stat"))


def _cached(statistics: Path) -> int:
    """Return the bytes of files that a container holds and would give up, although they count as used."""
    with contextlib.suppress(OSError, ValueError):
        found = dict(line.split() for line in statistics.read_text().splitlines())
        return int(found.get("total_inactive_file", found.get("inactive_file", 0)))
    return 0


def _of_process() -> Iterator[int]:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on every system

        # RLIMIT_AS limits the address space, whose pages are the first number in statm.
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - int(_PAGES.read_text().split()[0]) * resource.getpagesize()


_COPIES = {"svd": 5, "spatial": 5, "depthwise": 5, "tucker": 6, "cp": 6, "tt": 5, "tr": 6}
_SQUARES = 4


def estimate(method: str, kernel: Sequence[int], itemsize: int) -> int:
    """Return about how many bytes a method needs at most besides a kernel (g, O, I, *size) of ``itemsize`` a number.

    A method that is not known counts as the most demanding one.

    >>> estimate("svd", (1, 4096, 4096), 4) // 2**20
    640
    """
    # Example of a float32 layer 4096 x 4096, 64 MiB: the weight, five copies and four Gram matrices of 4096 x
    # 4096 are ten times 64 MiB.
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
