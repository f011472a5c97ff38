"""Saving: a target is always whole, the old or the new, whatever fails and whenever it is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery.errors import FileError, InputError
from surgery.files.load import load
from surgery.files.save import model_files, save
from tests.hostile import builder


def _export(module: nn.Module, *args: Any) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), args)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_an_error_and_not_the_end_of_the_process() -> None:
    program = _export(nn.Linear(300, 300), torch.ones(1, 300))
    for buffering in (0, -1):
        with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb", buffering=buffering) as file:
            model_files(program, "model.pt2")[-1][1](file)


class Extra(nn.Module):
    def get_extra_state(self) -> str:
        return "text"


def test_what_cannot_be_saved_is_a_clear_error(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(FileError, match=r"the folder .* does not exist"):
        save(module, tmp_path / "absent" / "model.pt")
    with pytest.raises(FileError, match="is a folder"):
        save(module, tmp_path)
    quantized = nn.Linear(2, 2)
    vars(quantized)["_parameters"]["weight"] = torch.nn.parameter.UninitializedParameter()
    for other in (quantized, Extra()):
        with pytest.raises(InputError, match="of the state dict is a"):
            save(other, tmp_path / "model.pt")
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    graph.meta["surgery"] = {"version": 1, "sites": {"weight": {}}}
    with pytest.raises(InputError, match="cannot be saved as a state"):
        save(graph, tmp_path / "model.pt")
    with pytest.raises(InputError, match="cannot save a dict"):
        save({}, tmp_path / "model.pt")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


_SAVER = """
import os, shutil, signal, sys, time
from surgery.files.load import load
from surgery.files.save import save
folder, *sources = sys.argv[1:]
programs = [load(name) for name in sources]
for round in range(20):
    target = f"{folder}/{round}.pt2"
    shutil.copy(sources[0], target)
    child = os.fork()
    while child == 0:
        for program in programs:
            save(program, target)
    time.sleep(0.005 + 0.0037 * round)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_killed_saver_leaves_a_whole_file(tmp_path: Path) -> None:
    """Twenty savers, each killed at another moment; some leave a temporary file, none a broken target."""
    sources = [tmp_path / "a", tmp_path / "b"]
    for scale, source in enumerate(sources, 1):
        net = nn.Linear(64, 64)
        nn.init.constant_(net.weight, scale)
        save(_export(net, torch.ones(1, 64)), source)
    folder = tmp_path / "out"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", _SAVER, folder, *sources], check=True)
    for target in folder.glob("*.pt2"):
        program = load(target)
        assert isinstance(program, torch.export.ExportedProgram)
        weight = program.state_dict["weight"].detach()
        assert weight.eq(weight[0, 0]).all()
        assert float(weight[0, 0]) in (1.0, 2.0)
    assert len(list(folder.glob("*.pt2"))) == 20
    assert list(folder.glob(".*.tmp"))  # else no saver was killed at work


def test_the_record_is_the_file_surgery_json(tmp_path: Path) -> None:
    program = _export(nn.Linear(2, 2), torch.ones(1, 2))
    program.graph_module.meta["surgery"] = {"a": 1}
    save(program, tmp_path / "model.pt2")
    assert json.loads(builder.entries((tmp_path / "model.pt2").read_bytes())["extra/surgery.json"]) == {"a": 1}
