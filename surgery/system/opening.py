"""Open files that others made: only regular files, so that nothing waits for a pipe or reads a device without end."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import BinaryIO

from surgery.errors import FileError, InputError
from surgery.text import cut, first_line, shown

__all__ = ["check_path", "check_regular", "open_regular", "read_regular", "shown_name", "shown_path"]

_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer would wait for one; for files it means nothing
_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is not a regular file but a pipe",
    stat.S_IFSOCK: "is not a regular file but a socket",
    stat.S_IFCHR: "is not a regular file but a device",
    stat.S_IFBLK: "is not a regular file but a device",
}
_LONGEST_NAME = 200
_COPY = "write what it holds to a file first"


def check_path(path: object) -> None:
    """Raise InputError for what is not a path."""
    if not isinstance(path, str | os.PathLike):
        what = f"a path of type {type(path).__name__}"
        raise InputError(what, allowed="text, or a pathlib.Path", next_step="give the name of a file")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise FileError unless there is a regular file of this name, or a link to one."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise _cannot_be_opened(path, error) from error
    _check_mode(path, mode)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Return a regular file, open to be read.

    The file is checked again once it is open, because its name may stand for something else by then.

    Raises:
        FileError: the file does not exist, is not a regular one, or may not be read; the text begins with the path.
    """
    check_regular(path)  # before: to open some devices is to change them
    try:
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(open(path, "rb", opener=_open_at_once))
            _check_mode(path, os.fstat(file.fileno()).st_mode)
            opened.pop_all()
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise _cannot_be_opened(path, error) from error
    return file


def _open_at_once(name: str, flags: int) -> int:
    return os.open(name, flags | _NO_WAITING)


def read_regular(path: str | os.PathLike[str], *, most: int | None = None) -> bytes:
    """Return the bytes of a regular file; raises FileError as ``open_regular``, and above ``most`` bytes."""
    with open_regular(path) as file:
        try:
            raw = file.read(-1 if most is None else most + 1)
        except OSError as error:
            raise FileError(f"{shown_path(path)}: cannot be read: {_reason(error)}") from error
    if raw is None:  # a file of the system that has nothing to say yet
        raise FileError(f"{shown_path(path)}: cannot be read now", allowed="a regular file", next_step=_COPY)
    if most is not None and len(raw) > most:
        raise FileError(f"{shown_path(path)}: is larger than {most} bytes", allowed=f"{most} bytes")
    return raw


def _check_mode(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = _KINDS.get(stat.S_IFMT(mode), "is not a regular file")
    next_step = None if stat.S_ISDIR(mode) else _COPY
    raise FileError(f"{shown_path(path)}: {kind}", allowed="a regular file", next_step=next_step)


def _cannot_be_opened(path: str | os.PathLike[str], error: OSError | ValueError) -> FileError:
    if isinstance(error, FileNotFoundError):
        return FileError(f"{shown_path(path)}: does not exist", next_step="check the path")
    return FileError(f"{shown_path(path)}: cannot be opened: {_reason(error)}", next_step="check the path")


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or first_line(error)  # str(error) has the path again


def shown_path(path: str | os.PathLike[str]) -> str:
    """Return a path as it may be printed: on one line, and no longer than can be read."""
    return cut(shown(os.fsdecode(path)), _LONGEST_NAME)


def shown_name(name: str) -> str:
    """Return a name from inside a file as it may be printed: on one line, and short."""
    return cut(shown(name), _LONGEST_NAME // 3)
