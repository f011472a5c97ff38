"""The machine that this process runs on: its processor and its cores."""

from __future__ import annotations

import contextlib
import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["cpu_name", "physical_cores", "pin_thread", "usable_cores"]

_CPU_FIELDS = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@cache
def cpu_name() -> str:
    """Return the processor's model with its family and stepping, which is all that virtual machines show."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine()
    found = [fields[name] for name in _CPU_FIELDS if fields.get(name)]
    return f"{found[0]} ({'/'.join(found[1:])})" if found else platform.machine()


def physical_cores() -> int:
    """Return the number of physical cores that this process may use."""
    try:
        usable = os.sched_getaffinity(0)
        return len({Path(_SIBLINGS.format(cpu)).read_text() for cpu in usable})
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use: one of each physical core first, then their twins."""
    try:
        usable = sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return list(range(os.cpu_count() or 1))
    # Threads of one physical core have the same list of siblings. Example of cores 0 to 3 where 0, 1 and 2, 3 are
    # twins: the order is 0, 2, 1, 3.
    seen: set[str] = set()
    first: list[int] = []
    twins: list[int] = []
    for core in usable:
        try:
            siblings = Path(_SIBLINGS.format(core)).read_text()
        except OSError:
            siblings = str(core)
        (twins if siblings in seen else first).append(core)
        seen.add(siblings)
    return [*first, *twins]


def pin_thread(core: int) -> None:
    """Keep the calling thread on a core, if the system can."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {core})  # 0 is the calling thread
