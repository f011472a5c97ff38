"""The machine that this process runs on: its processor and its cores."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["cpu_name", "physical_cores"]

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
