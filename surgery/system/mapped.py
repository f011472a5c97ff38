"""Parts of files that are mapped into memory; the system takes their pages back when it is asked to."""

from __future__ import annotations

import contextlib
import mmap
import weakref

__all__ = ["drop_pages", "map_file"]

_MAPS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def map_file(descriptor: int, size: int, *, offset: int = 0, access: int = mmap.ACCESS_READ) -> mmap.mmap:
    """Return a part of a file, mapped as long as it is held; what is written into it is written into the file."""
    found = mmap.mmap(descriptor, size, access=access, offset=offset)
    _MAPS.add(found)
    return found


def drop_pages() -> None:
    """Let the pages of all parts go; nothing is lost, since they are those of the files."""
    for each in list(_MAPS):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # other systems than Linux; a closed one
            each.madvise(mmap.MADV_DONTNEED)
