"""A folder of stages: one file for each stage, and the manifest. Written together; read as files of anybody."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import FileError, SurgeryError, UnsafeFileError
from surgery.files.load import load
from surgery.files.memory import check_room, file_need
from surgery.files.save import model_files
from surgery.kinds.base import Kind, Piece, Pieces
from surgery.kinds.registry import KINDS, kind_of
from surgery.stages.manifest import MANIFEST, SUFFIXES, Manifest, StageFile, read_manifest
from surgery.stages.report import SplitReport
from surgery.system.opening import check_path, read_regular, shown_path
from surgery.system.writing import Writer, text_writer, write_folder
from surgery.text import first_line

__all__ = ["FolderContent", "is_folder", "read_folder", "read_report", "stage_files", "write_stages"]

_LONGEST_FILE = 1 << 26
_STAGE = re.compile(r"stage\d+\.(pt2|onnx|onnx\.data)")
_AGAIN = "write the folder again with surgery split"


@dataclass(frozen=True, eq=False)
class FolderContent:
    """What a folder holds: the kind of its stages, the stages, the kind of the model that was cut, and the report."""

    kind: Kind
    pieces: Pieces
    origin: str
    report: SplitReport


def is_folder(path: object) -> bool:
    """Whether a path is that of a folder of stages."""
    return isinstance(path, str | os.PathLike) and os.path.isfile(os.path.join(os.fspath(path), MANIFEST))


def stage_files(content: FolderContent, folder: str | os.PathLike[str]) -> list[tuple[str, Writer]]:
    """Return the files of a folder, each with its name and what writes it, the manifest last.

    Raises:
        InputError: a stage cannot be saved.
    """
    suffix, stages = SUFFIXES[content.kind.name], content.pieces.stages
    names = [f"stage{at}{suffix}" for at in range(len(stages))]
    files: list[tuple[str, Writer]] = []
    for name, stage in zip(names, stages, strict=True):
        files += [(path.name, write) for path, write in model_files(stage.model, Path(folder, name))]
    manifest = Manifest(
        kind=content.kind.name,
        origin=content.origin,
        inputs=content.pieces.inputs,
        outputs=content.pieces.outputs,
        stages=tuple(StageFile(n, s.inputs, s.outputs) for n, s in zip(names, stages, strict=True)),
        report=content.report,
        whole=content.pieces.whole,
    )
    return [*files, (MANIFEST, text_writer(manifest.to_json()))]


def write_stages(content: FolderContent, folder: str | os.PathLike[str], *, force: bool) -> None:
    """Write the files of a folder; with ``force`` also over those of another split, of which nothing is left.

    Raises:
        FileError: the folder cannot be written, or holds files and ``force`` is False.
        InputError: a stage cannot be saved.
    """
    check_path(folder)
    files = stage_files(content, folder)
    known = {name for name, _ in files}
    stale = _old_stages(Path(folder)) if force and is_folder(folder) else []
    write_folder(folder, files, force=force)
    # Last: as long as the old manifest stands, the old stages have to.
    for path in stale:
        if path.name not in known:
            path.unlink(missing_ok=True)


def _old_stages(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _STAGE.fullmatch(path.name) and not path.is_dir()]


def read_folder(folder: str | os.PathLike[str], *, memory: int | None = None) -> FolderContent:
    """Return what a folder holds; no code of its files is run, and nothing outside of it is read.

    Raises:
        FileError: there is no such folder, its manifest is damaged, a stage is missing or is not what the manifest
            says, or they need more than ``memory`` bytes.
        UnsafeFileError: a stage is a link, or would run code.
    """
    check_path(folder)
    with _naming(Path(folder)):
        return _read(Path(folder), memory)


def read_report(folder: str | os.PathLike[str]) -> SplitReport:
    """Return the report in the manifest of a folder; the stages themselves are not read.

    Raises:
        FileError: there is no such folder, or its manifest is damaged.
    """
    check_path(folder)
    with _naming(Path(folder)):
        return _manifest(Path(folder)).report


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Let errors begin with the path of the folder, or of a file in it."""
    try:
        yield
    except SurgeryError as error:
        if error.what.startswith(shown_path(folder)):
            raise
        kind = type(error) if isinstance(error, FileError) else FileError
        raise kind(f"{shown_path(folder)}: {error.what}", allowed=error.allowed, next_step=error.next_step) from error


def _read(folder: Path, memory: int | None) -> FolderContent:
    manifest = _manifest(folder)
    paths = [_inside(folder, stage.file) for stage in manifest.stages]
    check_room(file_need(sum(path.stat().st_size for path in paths)), memory)
    kind = KINDS[manifest.kind]
    stages = []
    for path, stage in zip(paths, manifest.stages, strict=True):
        model = load(path, memory=memory)
        _check_stage(path, model, kind, stage)
        stages.append(Piece(model, stage.inputs, stage.outputs))
    pieces = Pieces(tuple(stages), manifest.inputs, manifest.outputs, manifest.whole)
    return FolderContent(kind, pieces, manifest.origin, manifest.report)


def _manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        missing = not os.path.lexists(folder)
        what = "does not exist" if missing else "is not a folder"
        raise FileError(what, allowed="a folder that surgery split wrote", next_step="check the path")
    if not os.path.lexists(folder / MANIFEST):
        raise FileError(f"has no {MANIFEST}", allowed="a folder that surgery split wrote")
    raw = read_regular(_inside(folder, MANIFEST), most=_LONGEST_FILE)
    try:
        return read_manifest(raw.decode())
    except UnicodeDecodeError as error:
        raise FileError(f"the manifest is not JSON: {first_line(error)}", next_step=_AGAIN) from None


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder; raise FileError where it is missing, and UnsafeFileError for a link."""
    path = folder / name
    if path.is_symlink():
        raise UnsafeFileError(f"{name} is a link", allowed="files in the folder itself", next_step="copy them there")
    if not path.exists():
        raise FileError(f"has no {name}, of which the manifest tells", next_step=_AGAIN)
    return path


def _check_stage(path: Path, model: Any, kind: Kind, stage: StageFile) -> None:
    if not isinstance(model, kind.models):
        what = f"{shown_path(path)}: is a {kind_of(model).label}"
        raise FileError(what, allowed=kind.label, next_step=_AGAIN)
    taken = tuple(kind.signature(model, ((), {})).names)
    if len(taken) != len(stage.inputs):
        what = f"{shown_path(path)}: takes {len(taken)} inputs, and the manifest names {len(stage.inputs)}"
        raise FileError(what, next_step=_AGAIN)
    for own, name in zip(taken, stage.inputs, strict=True):
        if own != name:
            what = (
                f"{shown_path(path)}: takes {own[:80]!r} where the manifest names {name[:80]!r}: is it another stage?"
            )
            raise FileError(what, next_step=_AGAIN)
