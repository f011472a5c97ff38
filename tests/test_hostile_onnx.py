"""Hostile ONNX files: each ends in one line, and nothing outside of its folder is opened."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import FileError
from surgery.files.load import load
from tests.hostile.command_lines import CommandLines
from tests.hostile.onnx_files import ONNX_ATTACKS, SECRET, write_secret

LINES = ("inspect x.onnx", "compare x.onnx x.onnx", "decompose x.onnx -o o.onnx --ranks 2 --no-timing")
_OPENED: list[str] | None = None


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPENED is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(_see)  # for the life of the process: it only notes while a list is there


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The names of all files that Python opens in the test."""
    global _OPENED
    _OPENED = []
    yield _OPENED
    _OPENED = None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own = tmp_path / "own"
    own.mkdir()
    write_secret(own)
    return own


@pytest.mark.parametrize("name", ONNX_ATTACKS)
def test_nothing_outside_of_the_folder_is_opened(name: str, folder: Path, opened: list[str]) -> None:
    """Neither here nor by onnxruntime, whose opening is not seen: the file is refused before there is a session."""
    path = folder / "x.onnx"
    path.write_bytes(ONNX_ATTACKS[name](folder).SerializeToString())
    with pytest.raises(FileError) as caught:
        load(path)
    assert str(caught.value).isprintable()
    assert str(path) in str(caught.value)
    outside = [each for each in opened if os.path.basename(each) in ("secret", "pipe", "passwd", "zero")]
    assert not outside


@pytest.mark.xdist_group("command lines")
@pytest.mark.law(8)
@pytest.mark.parametrize("name", ONNX_ATTACKS)
def test_whole_commands_refuse_it_in_one_line(name: str, folder: Path, command_lines: CommandLines) -> None:
    (folder / "x.onnx").write_bytes(ONNX_ATTACKS[name](folder).SerializeToString())
    for line in LINES:
        done = command_lines.run(folder, *line.split(" "))
        assert not done.faults(allowed=(2,)), done
        assert SECRET.decode() not in done.stdout + done.stderr
