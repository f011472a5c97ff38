"""Write files so that each is always whole, the old or the new, and several appear together or not at all.

The bytes go to a draft in the target's folder, are flushed to the disk, and take the target's name in one step. An
error, Ctrl-C or SIGTERM removes the drafts and leaves the targets as they were.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import IO, TypeAlias

from surgery.errors import FileError
from surgery.system.interrupts import put_off
from surgery.system.opening import shown_path
from surgery.system.scratch import FULL, draft_folder, draft_name, open_draft, reason

__all__ = [
    "Writer",
    "check_folder",
    "check_outputs",
    "noting",
    "text_writer",
    "write_atomically",
    "write_folder",
    "write_together",
]

Writer: TypeAlias = Callable[[IO[bytes]], object]
_Path: TypeAlias = str | os.PathLike[str]

_EXISTS = "pass --force (in Python force=True) to overwrite it, or choose another name"
_NOTED: ContextVar[list[Path] | None] = ContextVar("_NOTED", default=None)


@contextlib.contextmanager
def noting(names: list[Path]) -> Iterator[None]:
    """Add to a list the names of all files that are written in the block, at the moment when they appear."""
    token = _NOTED.set(names)
    try:
        yield
    finally:
        _NOTED.reset(token)


def check_outputs(outputs: Sequence[_Path], inputs: Sequence[_Path] = (), *, force: bool) -> list[Path]:
    """Return the files that the names of outputs stand for, with links followed. Call it before any work is done.

    Raises:
        FileError: an output cannot be written, is not a regular file, exists without ``force``, or is named twice or as
            an input, too.
    """
    targets = [_checked(output, force=force) for output in outputs]
    read = [_identity(path) for path in inputs]
    seen: list[object] = []
    for output, target in zip(outputs, targets, strict=True):
        own = _identity(target)
        if own in read:
            raise FileError(f"{shown_path(output)}: is an input too", next_step="choose another name for the output")
        if own in seen:
            raise FileError(f"{shown_path(output)}: two outputs have this name", next_step="choose another for one")
        seen.append(own)
    return targets


def _identity(path: _Path) -> object:
    """Return what is equal for all names of one file."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    except ValueError:  # no file has such a name
        return path
    return found.st_dev, found.st_ino


def _checked(output: _Path, *, force: bool) -> Path:
    name = shown_path(output)
    if os.fspath(output) == "-":
        raise FileError("-: nothing is written to a stream", allowed="the name of a file", next_step="./- is one")
    try:
        target = Path(os.path.realpath(output))
        mode = _mode(target)
    except (OSError, ValueError) as error:
        raise _cannot_be_written(output, error) from error
    folder = target.parent
    if stat.S_ISDIR(mode):
        raise FileError(f"{name}: is a folder", allowed="the name of a file")
    if not folder.is_dir():
        raise FileError(f"{name}: the folder {shown_path(folder)} does not exist", next_step="make it first")
    if mode and not stat.S_ISREG(mode):
        raise FileError(f"{name}: is not a regular file", allowed="a new name, or that of a regular file")
    if mode and not force:
        raise FileError(f"{name}: exists already", next_step=_EXISTS)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"{name}: nothing can be written to the folder {shown_path(folder)}")
    return target


def _mode(target: Path) -> int:
    """Return the mode of a file, or 0 if it does not exist; raises OSError if it or its draft cannot have its name."""
    mode = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(target).st_mode  # links were followed, but for those that turn in a circle
    if not stat.S_ISDIR(mode):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(draft_name(target))
    return mode


def _cannot_be_written(path: _Path, error: OSError | ValueError) -> FileError:
    what = f"{shown_path(path)}: cannot be written: {reason(error, Path(path).parent)}"
    full = isinstance(error, OSError) and error.errno in FULL
    return FileError(what, next_step="make room, or choose another folder" if full else None)


def text_writer(text: str) -> Writer:
    """Return what writes a text, as UTF-8."""
    return lambda file: file.write(text.encode())


def write_atomically(path: _Path, write: Writer, *, force: bool = True) -> None:
    """Let ``write`` fill a file that appears at ``path`` only when it is complete and on the disk.

    ``force=False`` refuses a target that exists. A link is followed; only a regular file is replaced. Whatever
    ``write`` raises passes through, after the draft was removed; an OSError becomes a FileError.
    """
    write_together([(path, write)], force=force)


def write_together(files: Sequence[tuple[_Path, Writer]], *, force: bool = True) -> None:
    """Write several files as ``write_atomically`` does: all are complete before the first appears.

    If one cannot take its place, those before it are taken back. Ctrl-C and similar signals are put off. If they come
    before the first file appears, nothing is written; if they come later, all files are. Only if the process is killed,
    or the machine stops, between two files can one be new and the other old; both are whole even then.
    """
    targets = check_outputs([path for path, _ in files], force=force)
    with put_off() as interrupts, contextlib.ExitStack() as stack:
        drafts = []
        for (output, write), target in zip(files, targets, strict=True):
            with _telling(output):
                drafts.append(draft := _Draft(output, target))
                stack.callback(draft.discard)
                draft.fill(write)
        if not interrupts:
            _publish(drafts, force=force)


def check_folder(folder: _Path, inputs: Sequence[_Path] = (), *, force: bool) -> Path:
    """Return the folder that a name stands for, with links followed. Call it before any work is done.

    Raises:
        FileError: no such folder can be made, or the name is that of something else; or it holds files and ``force`` is
            False; or one of the inputs lies in it.
    """
    name = shown_path(folder)
    try:
        target = Path(os.path.realpath(folder))
        filled = os.path.lexists(target) and any(target.iterdir())
    except NotADirectoryError:
        raise FileError(f"{name}: is not a folder", allowed="the name of a folder, old or new") from None
    except (OSError, ValueError) as error:
        raise _cannot_be_written(folder, error) from error
    if not os.path.lexists(target):
        return _checked(folder, force=False)
    if filled and not force:
        raise FileError(f"{name}: exists already, and is not empty", next_step=_EXISTS)
    if not os.access(target, os.W_OK | os.X_OK):
        raise FileError(f"{name}: nothing can be written to this folder")
    if inside := [path for path in inputs if Path(os.path.realpath(path)).parent == target]:
        what = f"{name}: holds {shown_path(inside[0])}, which is an input"
        raise FileError(what, next_step="choose another folder for the output")
    return target


def write_folder(folder: _Path, files: Sequence[tuple[str, Writer]], *, force: bool = False) -> None:
    """Write several files, each with its name, as one folder: all of them, or none and no folder.

    A new folder appears whole. Into one that is there the files come as ``write_together`` writes them; what else it
    holds stays.

    Raises:
        FileError: as ``check_folder``, or nothing can be written.
    """
    target = check_folder(folder, force=force)
    if target.is_dir():
        write_together([(Path(folder, name), write) for name, write in files], force=force)
        return
    with put_off() as interrupts, _telling(folder), draft_folder(target) as draft:
        with noting([]), _naming(draft, folder):
            write_together([(draft / name, write) for name, write in files], force=False)
        if interrupts:
            return
        _checked(folder, force=False)  # what stands there may have changed meanwhile
        os.rename(draft, target)
        _sync(target.parent)
        noted = _NOTED.get()
        if noted is not None:
            noted.append(Path(folder))


@contextlib.contextmanager
def _naming(draft: Path, folder: _Path) -> Iterator[None]:
    """Let errors name the folder that was asked for, in place of its draft."""
    try:
        yield
    except FileError as error:
        what = error.what.replace(shown_path(draft), shown_path(folder))
        raise FileError(what, allowed=error.allowed, next_step=error.next_step) from error


@contextlib.contextmanager
def _telling(output: _Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_be_written(output, error) from error


class _Draft:
    """A file in its target's folder, which is to take the target's name."""

    def __init__(self, output: _Path, target: Path) -> None:
        self.output, self.target = output, target
        self._path, self._file = open_draft(target)
        self._old: Path | None = None  # a second name of the file that is replaced, to take it back

    def fill(self, write: Writer) -> None:
        """Write all of it to the disk."""
        write(self._file)
        # On the disk before the rename: after a crash, the new name must not stand for bytes that never got there.
        self._file.flush()
        os.fsync(self._file.fileno())
        if os.name == "nt":
            self._file.close()  # Windows moves no open files

    def publish(self, *, force: bool, keep: bool) -> None:
        """Give the draft the target's name; with ``keep`` this can be taken back afterwards."""
        _checked(self.target, force=force)  # what stands there may have changed meanwhile
        if not force:
            _move_to_new(self._path, self.target)
            return
        if self.target.exists():
            # The permissions of the old file, but no setuid or setgid.
            self._path.chmod(self.target.stat().st_mode & 0o777)
            if keep:
                self._old = draft_name(self.target)
                _second_name(self.target, self._old)
        os.replace(self._path, self.target)

    def take_back(self) -> None:
        """Put the old file in its place again; remove the new one where there was no old one."""
        if self._old is None:
            self.target.unlink()
        else:
            os.replace(self._old, self.target)

    def discard(self) -> None:
        """Remove what is left over; an error here must not hide the one that led here."""
        with contextlib.suppress(OSError):  # of what was left to write to a full disk
            self._file.close()
        for path in (self._path, self._old):
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def _move_to_new(path: Path, target: Path) -> None:
    """Rename a file. Unlike ``os.replace``, this fails if someone else has made the target in the meantime."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise FileError(f"{shown_path(target)}: exists already", next_step=_EXISTS) from None
    except OSError:  # a file system without second names: the check just now has to do
        os.replace(path, target)


def _second_name(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)


def _publish(drafts: Sequence[_Draft], *, force: bool) -> None:
    # Invariant: ``done`` are the drafts that stand in their targets' places. On an error these are taken back, the last
    # first; all others have changed nothing.
    done: list[_Draft] = []
    try:
        for draft in drafts:
            with _telling(draft.output):
                draft.publish(force=force, keep=len(drafts) > 1)
            done.append(draft)
    except BaseException:
        for draft in reversed(done):
            with contextlib.suppress(OSError):
                draft.take_back()
        raise
    noted = _NOTED.get()
    if noted is not None:
        noted += [Path(draft.output) for draft in drafts]
    for folder in {draft.target.parent for draft in drafts}:
        _sync(folder)


def _sync(folder: Path) -> None:
    """Make the new names themselves durable, where the system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
