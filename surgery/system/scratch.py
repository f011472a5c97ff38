"""Temporary files and folders. The leftovers of a killed process are removed by the next one that wants the same.

Each file is locked as long as its process works on it. The system releases the lock when the process ends, however it
ends. So a file that nobody has locked is litter. Process numbers could not tell that across containers and machines.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from surgery.errors import FileError
from surgery.system.interrupts import put_off
from surgery.text import first_line

try:
    import fcntl
except ImportError:  # a system without such locks: nothing is swept there
    fcntl = None  # type: ignore[assignment]

__all__ = ["FULL", "draft_folder", "draft_name", "open_draft", "reason", "scratch_folder"]

FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM = (*FULL, errno.EROFS, errno.EACCES, errno.EFBIG)
_MARK = "[0-9a-f]{12}"  # what _mark returns


def _mark() -> str:
    return secrets.token_hex(6)


def draft_name(target: Path) -> Path:
    """Return a new name in the folder of a target."""
    return target.with_name(f".{target.name}.{_mark()}.tmp")


def open_draft(target: Path) -> tuple[Path, IO[bytes]]:
    """Return a new file in the folder of a target, locked until it is closed; remove leftovers of dead processes."""
    _sweep(target.parent, re.compile(rf"\.{re.escape(target.name)}\.{_MARK}\.tmp"))
    while True:
        path = draft_name(target)
        file = open(path, "x+b")  # noqa: SIM115  # for the caller to close
        # Until the file is locked, another process may take it for litter. Once it is, nobody removes it: a name that
        # is still there with the lock held stays.
        if _lock(file.fileno()) is not False and path.exists():
            return path, file
        file.close()  # another process has swept it, before it was locked


@contextlib.contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside a target, locked, which is removed afterwards unless it has got another name."""
    _sweep(target.parent, re.compile(rf"\.{re.escape(target.name)}\.{_MARK}\.tmp"))
    folder, descriptor = _new_folder(lambda: draft_name(target), 0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder for temporary files, which is removed afterwards.

    Raises:
        FileError: there is no room for the folder, or for what the block writes (in place of the OSError that says so).
    """
    folder: Path | None = None
    descriptor: int | None = None
    try:
        with put_off():
            folder, descriptor = _make_folder()
        yield folder
    except (OSError, FileError) as error:
        cause = error.__cause__ if isinstance(error, FileError) and str(folder) in error.what else error
        if not isinstance(cause, OSError) or (folder is not None and cause.errno not in _NO_ROOM):
            raise
        place = Path(tempfile.gettempdir() if folder is None else folder.parent)
        what = f"temporary files cannot be written to {place}: {reason(cause, place)}"
        raise FileError(what, next_step="set TMPDIR to a folder with room") from error
    finally:
        with put_off():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)


def _make_folder() -> tuple[Path, int | None]:
    parent = Path(tempfile.gettempdir())
    _sweep(parent, re.compile(rf"surgery-{_MARK}\.tmp"))
    return _new_folder(lambda: parent / f"surgery-{_mark()}.tmp", 0o700)


def _new_folder(name: Callable[[], Path], mode: int) -> tuple[Path, int | None]:
    """Make a folder of a new name; return it with the descriptor that locks it, or None without such locks."""
    while True:
        folder = name()
        folder.mkdir(mode)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # swept
        except OSError:  # a system that opens no folders
            return folder, None
        if _lock(descriptor) is not False and folder.exists():
            return folder, descriptor
        os.close(descriptor)


def reason(error: OSError | ValueError, folder: Path) -> str:
    """Return why nothing can be written to a folder; the text names the disk if the disk is full."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return getattr(error, "strerror", None) or first_line(error)
    disk = folder.resolve()
    while not os.path.ismount(disk):
        disk = disk.parent
    return f"no space left on the disk at {disk}"


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed; False if another process has it, None without such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sweep(folder: Path, names: re.Pattern[str]) -> None:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not names.fullmatch(entry.name):
                continue
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_folder or entry.is_file(follow_symlinks=False):
                _sweep_one(entry.path, is_folder=is_folder)


def _sweep_one(path: str, *, is_folder: bool) -> None:
    access = os.O_RDONLY if is_folder else os.O_RDWR  # to lock a file on another machine takes the right to write
    with contextlib.suppress(OSError):
        descriptor = os.open(path, access | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            # Its process lives. With the lock, the removal goes by name: a draft that has taken its target's name in
            # the meantime is not here any more and is left alone.
            if not _lock(descriptor):
                return
            if is_folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        finally:
            os.close(descriptor)
