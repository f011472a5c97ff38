"""How much memory this process can have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory"]

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

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - int(_PAGES.read_text().split()[0]) * resource.getpagesize()
