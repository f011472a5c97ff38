"""Arguments that nobody means: each ends in one error that names it, before any work that could be long or large."""

from __future__ import annotations

import os
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.export import export

import surgery
from surgery.cli.group import cli
from surgery.errors import FileError, InputError, SurgeryError
from surgery.kinds.inputs import random_tensor


class Kinds(nn.Module):
    """A model with an input that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, kind: str) -> Tensor:
        return self.fc(x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arguments")
    surgery.save(export(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), (torch.ones(2, 8),)), folder / "m.pt2")
    surgery.save(export(Kinds(), (torch.ones(2, 8), "kind")), folder / "k.pt2")
    np.savez(folder / "c.npz", input=np.ones((4, 8), np.float32))
    np.save(folder / "c.npy", np.ones((2, 8), np.float32))
    os.mkfifo(folder / "pipe.npz")
    (folder / "leaves.py").write_text("raise SystemExit")
    return folder


def run(folder: Path, words: str | list[str], monkeypatch: pytest.MonkeyPatch) -> BaseException | None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SURGERY_CACHE", "off")
    words = words.split(" ") if isinstance(words, str) else words
    return CliRunner().invoke(cli, words, standalone_mode=False).exception


OUT = "-o o.pt2 --no-timing"
LONG = "9" * 5000
BAD = {
    "inspect /": "is a folder",
    "inspect .": "is a folder",
    "decompose /": "is a folder",
    "recompose .": "is a folder",
    "decompose ": "is a folder",
    "recompose ..": "is a folder",
    "inspect /dev/zero": "but a device",
    "compare m.pt2 pipe.npz": "but a pipe",
    f"inspect {LONG}": "cannot be opened: File name too long",
    f"decompose m.pt2 --plan {LONG} {OUT}": "cannot be opened: File name too long",
    f"decompose m.pt2 --plan / {OUT}": "is a folder",
    f"decompose m.pt2 --calibration pipe.npz {OUT}": "but a pipe",
    f"decompose m.pt2 --calibration /dev/zero {OUT}": "but a device",
    "compare m.pt2 m.pt2 --inputs /": "is a folder",
    "compare m.pt2 m.pt2 --inputs pipe.npz": "but a pipe",
    "plan diff / /": "is a folder",
    "plan diff pipe.npz pipe.npz": "but a pipe",
    f"decompose m.pt2 --ranks 2 --no-timing -o {LONG}": "cannot be written: File name too long",
    f"decompose m.pt2 --ranks 2 --no-timing -o {'9' * 250}": "cannot be written: File name too long",
    "decompose m.pt2 --ranks 2 --no-timing -o /dev/null": "is not a regular file",
    "decompose m.pt2 --ranks 2 --no-timing --force -o /dev/null": "is not a regular file",
    "decompose m.pt2 --ranks 2 --no-timing --force -o o.pt2 --save-plan ./o.pt2": "two outputs",
    "recompose m.pt2 --force -o o.pt2 --state-dict ./o.pt2": "two outputs",
    "inspect m.pt2 --input-shape 1000000,1000000": "would take 4000000000000 bytes",
    f"inspect m.pt2 --input-shape {'9' * 26}": "--input-shape '99999999999999999999999999'",
    f"inspect m.pt2 --input-shape {LONG}": "--input-shape '9999",
    f"inspect m.pt2 --input-shape {'1,' * 64}1": "1 to 64 whole numbers",
    "inspect m.pt2 --input-shape 0,8": "--input-shape '0,8'",
    "inspect m.pt2 --input-shape :2,8": "--input-shape ':2,8'",
    "inspect m.pt2 --input-shape other:2,8": "no input other; allowed: input",
    "inspect m.pt2 --input-shape 2,8 --input-shape 2,8": "no input None",
    "inspect k.pt2 --input-shape kind:2,8": "--input-shape for kind, which is no tensor",
    f"inspect m.pt2 --input-shape 2,8 --seed {10**20}": "100000000000000000000 is not in the range",
    "inspect m.pt2 --seed -1": "-1 is not in the range",
    f"bench m.pt2 --threads {10**20}": "threads=100000000000000000000; allowed: 1 to ",
    f"bench m.pt2 --apart --threads {10**5}": "threads=100000; allowed: 1 to ",
    "bench m.pt2 --seconds nan": "measuring budget",
    f"decompose m.pt2 --calibration c.npz --max-error nan {OUT}": "max_error",
    f"decompose m.pt2 --plan p.json --ranks 4 {OUT}": "--ranks with --plan, which says it for each site",
    f"decompose m.pt2 --plan p.json --factorization svd {OUT}": "--factorization with --plan",
    f"decompose m.pt2 --plan p.json --joint inputs {OUT}": "--joint with --plan",
    f"decompose m.pt2 --plan p.json --max-error 0.1 {OUT}": "--max-error needs --ranks auto",
    f"decompose m.pt2 --ranks 4 --cost macs {OUT}": "--cost needs --ranks auto",
    f"decompose m.pt2 --ranks 4 --no-promise {OUT}": "--no-promise with other ranks than auto",
    f"decompose m.pt2 --no-promise --target-speedup 2 {OUT}": "--no-promise with --target-speedup",
    f"decompose m.pt2 --max-error 0.1 --target-speedup 2 {OUT}": "--max-error and --target-speedup at once",
    f"decompose m.pt2 --target-speedup 2 --cost macs {OUT}": "--target-speedup with --cost macs",
    f"decompose m.pt2 --max-drop 0.1 {OUT}": "--max-drop without a metric",
    "bench m.pt2 --backend abacus --apart": "the backend 'abacus' is not known; allowed: onnxruntime",
    "bench m.pt2 --backend onnxruntime": "--backend without --apart",
    f"decompose m.pt2 --backend abacus {OUT}": "the backend 'abacus' is not known; allowed: onnxruntime",
    f"decompose m.pt2 --ranks 2 --backend onnxruntime {OUT}": "--backend with --no-timing",
    f"decompose m.pt2 --cost macs --backend onnxruntime {OUT}": "a backend with cost='macs'",
    f"decompose m.pt2 --best-effort {OUT}": "--best-effort without --target-speedup",
    f"decompose m.pt2 --groups 2 {OUT}": "--groups without --calibration",
    f"decompose m.pt2 --dry-run --cost macs {OUT}": "--dry-run with calibration or a promise",
    f"decompose m.pt2 --joint inputs {OUT}": "joint with the promise",
    f"decompose m.pt2 --calibration c.npz --target-speedup nan {OUT}": "target_speedup",
    f"decompose m.pt2 --calibration c.npz --groups -1 {OUT}": "groups",
    f"decompose m.pt2 --ranks {10**30} {OUT}": "rank",
    f"decompose m.pt2 --ranks energy=nan {OUT}": "energy",
    f"decompose m.pt2 --ranks 2 --include [ {OUT}": "no site matches '['",
    f"decompose m.pt2 --eval nowhere:x {OUT}": "--eval 'nowhere:x': ModuleNotFoundError",
    f"decompose m.pt2 --eval leaves:x {OUT}": "--eval 'leaves:x': SystemExit",
    f"decompose m.pt2 --eval os:sep {OUT}": "--eval 'os:sep' is a str",
}


@pytest.mark.parametrize("words", BAD, ids=lambda words: words[:60])
def test_what_nobody_means_is_one_error(words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = run(folder, words, monkeypatch)
    assert isinstance(error, SurgeryError | click.UsageError), error
    assert (error.exit_code if isinstance(error, click.UsageError) else error.exit_status) == 2
    text = error.format_message() if isinstance(error, click.UsageError) else str(error)
    assert BAD[words] in text
    assert text.isprintable()
    assert not (folder / "o.pt2").exists()


def test_inputs_come_from_the_files_that_calibration_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(folder, "compare m.pt2 m.pt2 --inputs c.npy", monkeypatch) is None
    np.savez(folder / "big-endian.npz", input=np.ones((2, 8), ">f8"))
    assert run(folder, "compare m.pt2 m.pt2 --inputs big-endian.npz", monkeypatch) is None
    torch.save({"anything": torch.ones(2, 8)}, folder / "i.pt")
    assert run(folder, "compare m.pt2 m.pt2 --inputs i.pt", monkeypatch) is None
    np.savez(folder / "wide.npz", input=np.ones((2, 9), np.float32))
    error = run(folder, "compare m.pt2 m.pt2 --inputs wide.npz", monkeypatch)
    assert isinstance(error, FileError)
    assert "input has the shape (2, 9); allowed: (samples, 8)" in str(error)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_have_bounds_in_python_too(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed={seed}; allowed: whole numbers from 0"):
        random_tensor((1,), torch.float32, seed=seed)
