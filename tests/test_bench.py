"""Timing of whole models: what goes in and what comes out. Nothing asserts a time."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.cost.timing import Budget, Samples, interleave, waited
from surgery.errors import FileError, InputError
from surgery.runtime.bench import bench, environment
from surgery.runtime.export import export_onnx
from surgery.system.machine import physical_cores
from tests.command_line import run

X = torch.ones(2, 6)


def net(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The network as a program that takes batches of any size, and as an ONNX file made of it."""
    program = torch.export.export(net(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    folder = tmp_path_factory.mktemp("files")
    torch.export.save(program, folder / "net.pt2")
    export_onnx(program, folder / "net.onnx")
    return folder / "net.pt2", folder / "net.onnx"


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file that takes inputs of one shape."""
    export_onnx(net(), path := tmp_path_factory.mktemp("fixed") / "net.onnx", X)
    return path


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each model takes from now on, in place of measured ones."""
    seconds: list[float] = []

    def pretend(runs: Any, budget: Budget, **_: Any) -> tuple[Samples, ...]:
        for once in runs:
            once()
        return tuple(Samples((s,) * 20) for s, _ in zip(seconds, runs, strict=True))

    monkeypatch.setattr(importlib.import_module("surgery.runtime.bench"), "interleave", pretend)
    return seconds


def test_models_of_all_kinds_are_timed_on_the_same_inputs(files: tuple[Path, Path], scripted: list[float]) -> None:
    program = torch.export.export(net(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    scripted += [1.0, 0.5, 2.0, 1.005, 1.0]
    traced = torch.fx.symbolic_trace(net())  # fx names its class after the module
    models: list[Any] = [program, files[0], str(files[1]), traced, net(8)]
    timing = bench(models, threads=1)
    assert [m.path for m in timing.models] == [
        "ExportedProgram",
        *map(str, files),
        "Sequential",
        "Sequential",
    ]
    assert [m.median_s for m in timing.models] == scripted
    assert [c.verdict for c in timing.comparisons] == ["faster", "slower", "no difference", "no difference"]
    assert timing.comparisons[0].speedup == timing.comparisons[0].low == timing.comparisons[0].high == 2.0


def test_timing_is_json(fixed: Path, scripted: list[float]) -> None:
    scripted += [1.0, 0.5]
    timing = bench([fixed, net(8)], X, threads=1)
    data = json.loads(json.dumps(timing.to_json()))
    assert data["models"][1] == {"path": "Sequential", "median_s": 0.5, "p90_s": 0.5, "spread": 0.0, "runs": 20}
    assert data["comparisons"] == [{"path": "Sequential", "speedup": 2.0, "low": 2.0, "high": 2.0, "verdict": "faster"}]
    assert data["environment"]["threads"] == 1
    assert set(data["environment"]) >= {"cpu", "torch", "onnxruntime", "surgery", "python"}


def test_models_may_be_named(fixed: Path, scripted: list[float]) -> None:
    scripted += [1.0, 0.5]
    timing = bench([fixed, fixed], X, names=["dense", "factored"], threads=1)
    assert [m.path for m in timing.models] == ["dense", "factored"]
    assert timing.comparisons[0].path == "factored"
    with pytest.raises(InputError, match="1 names for 2 models"):
        bench([fixed, fixed], X, names=["dense"])


def test_bench_really_measures(fixed: Path) -> None:
    seen: list[float] = []
    timing = bench([fixed, net()], X, seconds=0.02, progress=seen.append)
    assert replace(timing.environment, load=None) == replace(environment(physical_cores()), load=None)
    assert all(m.runs >= 11 and 0 < m.median_s <= m.p90_s and m.spread >= 0 for m in timing.models)
    assert timing.comparisons[0].low <= timing.comparisons[0].high
    assert seen[-1] == 1.0


def test_waits_for_a_core_do_not_count() -> None:
    seconds = iter(range(0, 10**9, 10))  # each run is said to have waited for ten seconds: all of it
    budget = Budget(0, min_rounds=2)
    [samples] = interleave([lambda: None], budget, waited=lambda: float(next(seconds)))
    assert samples.seconds == (0.0, 0.0)
    [samples] = interleave([lambda: None], budget)
    assert min(samples.seconds) > 0
    assert 0 <= waited() <= waited()


def test_an_onnx_file_knows_its_shapes(fixed: Path, scripted: list[float]) -> None:
    scripted += [1.0, 1.0]
    assert len(bench([fixed, net()]).models) == 2
    scripted.pop()
    assert bench([fixed], {"input": X}).models[0].runs == 20


def test_models_with_other_inputs_are_refused(fixed: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(InputError, match=r"net\.onnx: the inputs do not fit the model: given float32 5x6"):
        bench([net(), fixed], torch.ones(5, 6))
    with pytest.raises(InputError, match="Sum: the model does not run on these inputs"):
        bench([fixed, Sum()], X)
    with pytest.raises(InputError, match="no model knows the shape of its inputs"):
        bench([net()])


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a list of models"):
        bench([])
    with pytest.raises(InputError, match="a list of models"):
        bench("net.onnx")
    with pytest.raises(InputError, match="threads=-1"):
        bench([net()], X, threads=-1)
    with pytest.raises(FileError, match="does not exist"):
        bench([tmp_path / "no.pt2"], X)
    with pytest.raises(InputError, match=r"no\.onnx"):
        bench([tmp_path / "no.onnx"], X)
    with pytest.raises(InputError, match="measuring budget"):
        bench([net()], X, seconds=-1)


@pytest.mark.parametrize("apart", [(), ("--apart",)], ids=["together", "apart"])
def test_bench_says_what_it_ran_on_and_takes_a_batch(apart: tuple[str, ...], files: tuple[Path, Path]) -> None:
    program, onnx = files
    quick = ("--seconds", 0.01, "--threads", 1, *apart)
    said = run("bench", program, onnx, *quick).stdout
    assert "inputs: input float32 2x6" in said
    for file in files[-1:] if apart else files:
        done = run("bench", file, "--batch", 5, "--json", *quick)
        assert json.loads(done.stdout)["inputs"] == ["input float32 5x6"]
    done = run("bench", onnx, "--input-shape", "input:3,6", "--json", *quick)
    assert json.loads(done.stdout)["inputs"] == ["input float32 3x6"]
    done = run("bench", onnx, "--input-shape", "other:3,6", *quick)
    assert done.status == 2
    assert "the model has no input other" in done.stderr


def test_a_batch_of_a_model_of_one_size_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(net(), (X,)), tmp_path / "net.pt2")
    done = run("bench", tmp_path / "net.pt2", "--batch", 5, "--seconds", 0.01)
    assert done.status == 2
    assert "2" in done.stderr
