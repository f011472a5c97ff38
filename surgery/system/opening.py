"""Open files that others made: only regular files, so that nothing waits for a pipe or reads a device without end."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from surgery.errors import FileError, InputError, UnsafeFileError
from surgery.text import cut, first_line, shown

__all__ = [
    "check_path",
    "check_regular",
    "open_inside",
    "open_regular",
    "read_regular",
    "shown_name",
    "shown_path",
    "size_of",
]

_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer would wait for one; for files it means nothing
_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is not a regular file but a pipe",
    stat.S_IFSOCK: "is not a regular file but a socket",
    stat.S_IFCHR: "is not a regular file but a device",
    stat.S_IFBLK: "is not a regular file but a device",
}
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_IN_FOLDER = os.open in os.supports_dir_fd
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


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Return a regular file of a folder, or of one in it, open to be read; links may only lead to such files.

    Links are followed once, and then each folder on the way is opened in the one before it. So no link that is made
    meanwhile leads out.

    Raises:
        FileError: as ``open_regular``.
        UnsafeFileError: the file is outside of the folder, or may have another name outside of it.
    """
    allowed, next_step = "regular files in its folder, no links out", "copy them there"
    base = os.path.realpath(folder)
    try:
        target = os.path.realpath(os.path.join(base, name))
    except (OSError, ValueError) as error:
        raise _cannot_be_opened(folder / name, error) from error
    if os.path.isabs(name) or ".." in Path(name).parts or not Path(target).is_relative_to(base):
        raise UnsafeFileError("outside its folder", allowed=allowed, next_step=next_step)
    check_regular(target)  # before: to open some devices is to change them
    try:
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(open(_descend(base, Path(target).relative_to(base).parts), "rb"))
            found = os.fstat(file.fileno())
            _check_mode(target, found.st_mode)
            # A hard link to a file elsewhere is a regular file on a way without links; only the
            # number of names gives it away.
            if found.st_nlink > 1:
                raise UnsafeFileError("a file with a second name", allowed=allowed, next_step=next_step)
            opened.pop_all()
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise _cannot_be_opened(folder / name, error) from error
    return file


def _descend(base: str, parts: tuple[str, ...]) -> int:
    """Return a descriptor of what lies below a folder, on a way without links."""
    if not _IN_FOLDER:
        return os.open(Path(base, *parts), os.O_RDONLY | getattr(os, "O_BINARY", 0))
    # Invariant: ``way`` is an open folder below the base. A part that has become a link since ``realpath`` is an error.
    way = os.open(base, os.O_RDONLY)
    for part in parts:
        try:
            step = os.open(part, os.O_RDONLY | _NO_WAITING | _NO_LINKS, dir_fd=way)
        finally:
            os.close(way)
        way = step
    return way


def size_of(file: BinaryIO) -> int:
    """Return how many bytes an open file has."""
    return os.fstat(file.fileno()).st_size


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
