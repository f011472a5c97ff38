"""Only regular files are opened: all else is one line that names the path and what stands there, at once."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.errors import FileError
from surgery.system.opening import check_regular, open_regular, read_regular


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def _link_to_a_pipe(path: Path) -> None:
    os.mkfifo(f"{path}.pipe")
    path.symlink_to(f"{path}.pipe")


NOT_REGULAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (Path.mkdir, "is a folder"),
    "pipe": (os.mkfifo, "is not a regular file but a pipe"),
    "socket": (_socket, "is not a regular file but a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file but a device"),
    "link to a pipe": (_link_to_a_pipe, "is not a regular file but a pipe"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be opened: Too many levels"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "does not exist"),
}


@pytest.mark.parametrize("opened", [check_regular, open_regular, read_regular])
@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_what_is_no_regular_file_is_refused(kind: str, opened: Callable[[Path], object], tmp_path: Path) -> None:
    make, said = NOT_REGULAR[kind]
    path = tmp_path / "x"
    make(path)
    with pytest.raises(FileError, match=f"^{re.escape(str(path))}: .*{said}") as caught:
        opened(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "a\0b", ""])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(FileError) as caught:
        open_regular(name)
    assert len(str(caught.value)) < 400


def test_a_regular_file_is_read_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    (tmp_path / "link").symlink_to("x")
    check_regular(tmp_path / "x")
    with open_regular(str(tmp_path / "link")) as file:
        assert file.read() == b"hello"
        assert file.seekable()
    assert read_regular(tmp_path / "link", most=5) == b"hello"
    with pytest.raises(FileError, match="larger than 4 bytes"):
        read_regular(tmp_path / "link", most=4)


def test_what_became_a_pipe_since_it_was_looked_at_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"hello")
    os.mkfifo(tmp_path / "pipe")
    before = os.stat(path)
    path.unlink()
    (tmp_path / "pipe").rename(path)
    monkeypatch.setattr(os, "stat", lambda _: before)
    with pytest.raises(FileError, match="but a pipe"):
        open_regular(path)
