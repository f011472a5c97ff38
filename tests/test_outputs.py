"""Writing: each file is whole, several appear together or not at all, only regular files are replaced, no litter."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from surgery.errors import FileError
from surgery.system.scratch import scratch_folder
from surgery.system.writing import Writer, check_outputs, noting, text_writer, write_atomically, write_together

MARK = "0123456789ab"


def _fails(error: BaseException) -> Writer:
    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    return write


def _interrupts(file: IO[bytes]) -> None:
    file.write(b"new")
    signal.raise_signal(signal.SIGINT)
    file.write(b"er")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(), OSError(28, "No space left")])
def test_a_failed_write_leaves_all_as_it_was(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "model.pt2"
    target.write_bytes(b"old")
    expected = FileError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_atomically(target, _fails(error))
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pt2"]


def test_overwriting_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "model.pt2"
    write_atomically(target, text_writer("one"), force=False)
    with pytest.raises(FileError, match="--force"):
        write_atomically(target, text_writer("two"), force=False)
    assert target.read_bytes() == b"one"

    def race(file: IO[bytes]) -> None:
        (tmp_path / "raced").write_bytes(b"theirs")
        file.write(b"ours")

    with pytest.raises(FileError, match="--force"):
        write_atomically(tmp_path / "raced", race, force=False)
    assert (tmp_path / "raced").read_bytes() == b"theirs"
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, text_writer("two"))
    assert target.read_bytes() == b"two"
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link", "model.pt2", "raced"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(code: int, tmp_path: Path) -> None:
    disk = tmp_path
    while not disk.is_mount():
        disk = disk.parent
    with pytest.raises(FileError, match=rf"no space left on the disk at {disk}; make room") as caught:
        write_atomically(tmp_path / "a", _fails(OSError(code, "x")))
    assert isinstance(caught.value.__cause__, OSError)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "is a folder"),
    "pipe": (_pipe, "is not a regular file"),
    "link to a device": (lambda path: path.symlink_to("/dev/null"), "is not a regular file"),
    "link to itself": (lambda path: path.symlink_to(path), "is not a regular file"),
    "link into no folder": (lambda path: path.symlink_to("none/x"), "the folder .* does not exist"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_only_regular_files_are_replaced(kind: str, tmp_path: Path) -> None:
    make, said = REFUSED[kind]
    path = tmp_path / "x"
    make(path)
    before = path.lstat()
    with pytest.raises(FileError, match=said):
        check_outputs([path], force=True)
    with pytest.raises(FileError, match=said):
        write_atomically(path, text_writer("x"))
    assert path.lstat().st_ino == before.st_ino
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["x" * 250, "x" * 5000, "a\0b", "", "no/folder", "/"])
def test_names_that_no_output_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 250 letters could be a file, but leaves no room for the name of its draft."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError) as caught:
        check_outputs([name], force=True)
    assert len(str(caught.value)) < 500


def test_what_became_a_pipe_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileError, match="is not a regular file"):
        write_atomically(path, lambda file: os.mkfifo(path))
    assert path.is_fifo()
    assert os.listdir(tmp_path) == ["x"]


def test_outputs_are_told_from_each_other_and_from_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"")
    Path("link").symlink_to("a")
    Path("dangling").symlink_to("new")
    os.link("a", "second name")
    assert check_outputs(["a", "new"], ["other", "no/where", "x" * 5000, "b\0"], force=True) == [
        tmp_path / "a",
        tmp_path / "new",
    ]
    for one, other in (("a", "./a"), ("a", "link"), ("a", "second name"), ("new", "dangling"), ("new", "../x/new")):
        other = other.replace("x", tmp_path.name) if other.startswith("..") else other
        with pytest.raises(FileError, match="two outputs"):
            check_outputs([one, other], force=True)
        with pytest.raises(FileError, match="is an input too"):
            check_outputs([one], ["b", other], force=True)


def test_several_appear_together_or_not_at_all(tmp_path: Path) -> None:
    old, new, last = (tmp_path / name for name in ("old", "new", "last"))
    old.write_bytes(b"old")

    def becomes_a_folder(file: IO[bytes]) -> None:
        last.mkdir()

    for failing in (_fails(ValueError("x")), becomes_a_folder):
        with pytest.raises(ValueError):  # noqa: PT011  # a FileError is one
            write_together([(old, text_writer("1")), (new, text_writer("2")), (last, failing)])
        assert old.read_bytes() == b"old"
        assert not new.exists()
    last.rmdir()
    names: list[Path] = []
    with noting(names):
        write_together([(old, text_writer("1")), (new, text_writer("2")), (last, text_writer("3"))])
    assert [path.read_bytes() for path in names] == [b"1", b"2", b"3"]
    assert sorted(os.listdir(tmp_path)) == ["last", "new", "old"]


def test_ctrl_c_before_the_first_appears_keeps_all_from_it(tmp_path: Path) -> None:
    names: list[Path] = []
    (tmp_path / "a").write_bytes(b"old")
    with noting(names), pytest.raises(KeyboardInterrupt):
        write_together([(tmp_path / "a", _interrupts), (tmp_path / "b", text_writer("b"))])
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    assert not names
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class _Interrupting(list[Path]):
    """Gets Ctrl-C at the moment when files have appeared."""

    def __iadd__(self, names: object) -> _Interrupting:  # type: ignore[misc,override]
        signal.raise_signal(signal.SIGINT)
        self.extend(names)  # type: ignore[arg-type]
        return self


def test_ctrl_c_after_they_have_appeared_is_too_late(tmp_path: Path) -> None:
    names = _Interrupting()
    with noting(names), pytest.raises(KeyboardInterrupt):
        write_together([(tmp_path / "a", text_writer("a")), (tmp_path / "b", text_writer("b"))])
    assert names == [tmp_path / "a", tmp_path / "b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_drafts_of_dead_processes_are_swept(tmp_path: Path) -> None:
    """That nobody has locked; those of others who are at work stay, and what only looks alike."""
    kept = [f".model.pt2.{MARK}0.tmp", ".model.pt2.my-notes-abc.tmp", f".other.pt2.{MARK}.tmp"]
    held, link = f".model.pt2.{MARK[::-1]}.tmp", ".model.pt2.aaaaaaaaaaaa.tmp"
    for name in (*kept, held, f".model.pt2.{MARK}.tmp"):
        (tmp_path / name).write_bytes(b"draft")
    (tmp_path / link).symlink_to(kept[0])
    with open(tmp_path / held) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomically(tmp_path / "model.pt2", text_writer("x"))
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, held, link, "model.pt2"])


def test_scratch_folders_go_and_those_of_dead_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (f"surgery-{MARK}.tmp", "surgery-notebook"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    with scratch_folder() as first, scratch_folder() as second:
        (first / "file").write_bytes(b"x")
        assert sorted(os.listdir(tmp_path)) == sorted(["surgery-notebook", first.name, second.name])
    assert os.listdir(tmp_path) == ["surgery-notebook"]
    with pytest.raises(KeyboardInterrupt), scratch_folder():
        signal.raise_signal(signal.SIGINT)
    assert os.listdir(tmp_path) == ["surgery-notebook"]


def test_a_full_scratch_folder_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(FileError, match=rf"{tmp_path}: no space left .* TMPDIR"), scratch_folder():
        raise OSError(errno.ENOSPC, "x")
    with pytest.raises(FileError, match=rf"temporary .* {tmp_path}: no space left .* TMPDIR"), scratch_folder() as own:
        write_atomically(own / "model", _fails(OSError(errno.ENOSPC, "full")))
    with pytest.raises(FileError, match="other: cannot be written: no space left"), scratch_folder():
        write_atomically(tmp_path / "other", _fails(OSError(errno.ENOSPC, "full")))
    with pytest.raises(FileNotFoundError), scratch_folder():
        raise FileNotFoundError("of the block's own")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(FileError, match=r"none.*TMPDIR"), scratch_folder():
        pass
