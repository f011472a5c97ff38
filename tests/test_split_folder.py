"""A folder of stages is written whole or not at all, and is read as what anybody may have written."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import FileError, InputError, SurgeryError, UnsafeFileError
from surgery.kinds.base import Pieces
from surgery.stages.folder import read_report
from surgery.stages.manifest import MANIFEST, read_manifest
from surgery.system.writing import check_folder, text_writer, write_folder
from tests.hostile.manifests import FOLDERS
from tests.test_hostile import STRANGE

X = torch.ones(2, 4)
# seen by the kind, once the stages run or are joined
BROUGHT = ("whole is empty", "one output too many")


def _program() -> torch.export.ExportedProgram:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return torch.export.export(net.eval(), (X,))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest") / "stages"
    surgery.split(_program(), measure=False).save(folder)
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    """A copy of the honest folder."""
    shutil.copytree(honest, tmp_path / "stages")
    return tmp_path / "stages"


def _used(folder: Path) -> None:
    """Do with a folder what can be done."""
    cut = surgery.load_split(folder)
    cut.run(X)
    cut.join()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_lies_is_refused_in_one_line(name: str, folder: Path) -> None:
    FOLDERS[name](folder)
    with pytest.raises(SurgeryError) as caught:
        _used(folder)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1000
    assert isinstance(caught.value, FileError) or name in BROUGHT
    assert text.startswith(str(folder)) or name in BROUGHT
    if name.endswith("is a link"):
        assert isinstance(caught.value, UnsafeFileError)


def test_stages_of_equal_shapes_that_are_swapped_do_not_run(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    surgery.split(net, X, stages=3, measure=False).save(tmp_path / "stages")
    shutil.copy(tmp_path / "stages" / "stage1.pt2", tmp_path / "stages" / "stage2.pt2")
    with pytest.raises(FileError, match="takes 'linear' where the manifest names 'linear_1': is it another stage"):
        surgery.load_split(tmp_path / "stages")


def test_an_honest_folder_is_refused_nothing(folder: Path) -> None:
    _used(folder)
    assert read_report(folder) == surgery.load_split(folder).report
    linked = folder.with_name("linked")
    linked.symlink_to(folder)
    _used(linked)  # the folder itself may have another name


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(each, (*path, key))


def test_no_value_of_a_manifest_ends_in_a_failure_of_ours(folder: Path) -> None:
    """A strange value in the place of each: reading refuses it, or what it says is used as any other."""
    said = json.loads((folder / MANIFEST).read_text())
    cut = surgery.load_split(folder)
    kinds = {tuple("*" if isinstance(key, int) else key for key in path): path for path in _places(said) if path}
    for number, (*parents, key) in enumerate(kinds.values()):
        changed = copy.deepcopy(said)
        place = changed
        for parent in parents:
            place = place[parent]
        place[key] = STRANGE[number % len(STRANGE)]
        try:
            found = read_manifest(json.dumps(changed))
        except FileError:
            continue
        if found.whole != cut.pieces.whole:
            pieces = Pieces(cut.pieces.stages, found.inputs, found.outputs, found.whole)
            other = surgery.Split(found.report, cut.kind, pieces, found.origin)
            with contextlib.suppress(InputError):
                other.join()
            with contextlib.suppress(InputError):
                other.run(X)


def test_a_folder_that_exists_is_only_written_with_force(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    cut = surgery.split(_program(), stages=1, measure=False)
    with pytest.raises(FileError, match=r"is not empty.*--force"):
        cut.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {**before, "notes.txt": b"mine"}
    cut.save(folder, force=True)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "notes.txt", "stage0.pt2"]
    _used(folder)


def test_an_empty_folder_is_written_without_force(tmp_path: Path) -> None:
    surgery.split(_program(), measure=False).save(tmp_path)
    _used(tmp_path)


def _full(file: Any) -> None:
    file.write(b"a half")
    raise OSError(28, os.strerror(28))


def test_a_disk_that_is_full_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no space left"):
        write_folder(tmp_path / "new", [("a", text_writer("whole")), ("b", _full)])
    assert not list(tmp_path.iterdir())


def test_a_folder_where_nothing_can_be_written_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FileError) as refused:
        check_folder(tmp_path / "new", force=False)
    assert refused.value.what == f"{tmp_path}/new: nothing can be written to the folder {tmp_path}"


def test_an_interrupt_leaves_no_folder(tmp_path: Path) -> None:
    def stop(file: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", [("a", stop), ("b", text_writer("whole"))])
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        write_folder(tmp_path / "new", [("a", text_writer("whole")), ("b", lambda file: os._exit(9))])
    os.waitpid(child, 0)
    assert not (tmp_path / "new").exists()
    assert len(list(tmp_path.iterdir())) == 1
    write_folder(tmp_path / "new", [("a", text_writer("whole"))])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "a").read_text() == "whole"


def test_a_folder_that_holds_the_input_is_not_written(tmp_path: Path) -> None:
    from tests.command_line import run

    surgery.save(_program(), tmp_path / "m.pt2")
    done = run("split", tmp_path / "m.pt2", "-o", tmp_path, "--force", "--no-measure")
    assert done.status == 2
    assert "which is an input" in done.stderr


@pytest.mark.parametrize("lie", ["no outputs", "a form without outputs", "a tie of nothing"])
def test_outputs_and_ties_that_are_not_there_are_refused(lie: str, folder: Path) -> None:
    said = json.loads((folder / MANIFEST).read_text())
    if lie == "no outputs":
        said["outputs"] = []
    elif lie == "a form without outputs":
        said["whole"]["signature"]["output_specs"] = []
    else:
        said["whole"]["ties"] = [[]]
    (folder / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(SurgeryError):
        _used(folder)


def test_commands_that_change_a_model_join_a_folder_first(folder: Path) -> None:
    from tests.command_line import run

    done = run("recompose", folder, "-o", folder.parent / "whole.pt2")
    assert done.status == 0, done.stderr
    found = surgery.load(folder.parent / "whole.pt2")
    assert isinstance(found, torch.export.ExportedProgram)
    assert list(found.state_dict) == list(_program().state_dict)


def test_too_many_stages_are_told_how_many_there_can_be() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    with pytest.raises(InputError, match=r"9 stages for 3 parts .*; allowed: 1 to 3 stages$"):
        surgery.split(net, X, stages=9, measure=False)
    with pytest.raises(InputError, match=r"all have to stay together; allowed: 1 stage; .*--ties copy\) allows 3"):
        surgery.split(net, X, ties="together", measure=False)


def test_a_stage_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    cut = surgery.split(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X, measure=False)
    with pytest.raises(InputError, match="stage 0 does not run"):
        cut.run(torch.ones(2, 5))
    assert capfd.readouterr() == ("", "")
