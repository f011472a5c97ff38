"""Models timed in processes of their own: whose numbers they are, what fails, what stays. Nothing asserts a time."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgery.cost.onnxruntime.processes import TimingJob, compare_generations, time_generations, without_waits
from surgery.errors import InputError, SurgeryError
from surgery.runtime.export import export_onnx
from surgery.runtime.fresh import time_apart, time_batches

X = torch.ones(2, 6)


def net(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def dynamic(width: int = 4) -> torch.export.ExportedProgram:
    return torch.export.export(net(width), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which temporary files are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def child(folder: Path, answers: str) -> Path:
    """Return a program that is run in place of the one that times; ``answers`` is Python that gets ``what``."""
    path = folder / "child.py"
    path.write_text(f"import json, sys\nwhat = json.loads(sys.argv[1])\n{answers}\n")
    return path


SCRIPTED = """
print('"ready"', flush=True)
for line in sys.stdin:
    print(json.dumps([[float(what["model"]), 0.0], [2 * float(what["model"]), 0.0], [9.0, 0.0]]), flush=True)
"""


def jobs(folder: Path, answers: str) -> list[TimingJob]:
    return [TimingJob(name, Path(name), Path("none"), child=child(folder, answers)) for name in ("2.0", "1.0")]


def test_medians_are_those_of_the_processes(tmp_path: Path) -> None:
    shares: list[float] = []
    found = time_generations(jobs(tmp_path, SCRIPTED), seconds=0.01, progress=shares.append)
    assert len(found) == 4
    assert all(set(blocks) == {(s, 2 * s, 9.0)} for g in found for blocks, s in zip(g, (2.0, 1.0), strict=True))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    first, second = zip(*found, strict=True)
    speedup = compare_generations(first, second)
    assert (speedup.value, speedup.low, speedup.high) == pytest.approx((2.0, 2.0, 2.0))
    assert speedup.verdict == "faster"


def test_models_are_timed_in_new_processes_and_nothing_stays(temporary: Path) -> None:
    timing = time_apart([dynamic(), net(8)], X, names=["dense", "wide"], threads=1, seconds=0.0)
    assert [m.path for m in timing.models] == ["dense", "wide"]
    assert all(m.runs >= 6 and 0 < m.median_s <= m.p90_s for m in timing.models)
    [comparison] = timing.comparisons
    assert comparison.path == "wide"
    assert comparison.low <= comparison.speedup <= comparison.high
    assert json.loads(json.dumps(timing.to_json()))["environment"]["threads"] == 1
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("raise RuntimeError('out of memory')", "RuntimeError: out of memory"),
        ("sys.exit(3)", "ended with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended with status -9"),
        ("print('\"ready\"', flush=True); sys.stdin.readline(); raise ValueError('no such size')", "no such size"),
        ("print('hello', flush=True); sys.stdin.read()", r"2\.0 cannot be timed.*it said 'hello'"),
    ],
    ids=["raises", "exits", "is killed", "fails in a block", "says something else"],
)
def test_a_process_that_fails_is_one_error(tmp_path: Path, answers: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        time_generations(jobs(tmp_path, answers), seconds=0.01)
    assert "\n" not in str(error.value)


def test_a_model_that_fails_in_its_process_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no model")
    np.savez(tmp_path / "inputs.npz", X.numpy())
    with pytest.raises(InputError, match=r"dense cannot be timed.*INVALID_PROTOBUF"):
        time_generations([TimingJob("dense", tmp_path / "net.onnx", tmp_path / "inputs.npz")], seconds=0.0)


def test_an_interrupt_ends_the_processes_and_removes_the_files(tmp_path: Path, temporary: Path) -> None:
    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_apart([net()], X, seconds=0.0, progress=interrupt)
    assert list(temporary.iterdir()) == []


def test_an_interval_knows_how_far_processes_differ() -> None:
    same: list[Any] = [((1.0,) * 50,)] * 4
    apart: list[Any] = [((value,) * 50,) for value in (1.0, 1.1, 0.9, 1.0)]  # steady runs, each process its own
    assert compare_generations(same, same).low == 1.0
    found = compare_generations(apart, same)
    assert found.low < 0.9
    assert found.high > 1.1
    assert found.verdict == "no difference"
    swapped = compare_generations(same, apart)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((1 / found.value, 1 / found.high, 1 / found.low))
    fewer = compare_generations(apart[:3], same[:3])
    assert fewer.high - fewer.low > found.high - found.low
    for bad in ((same[:1], same[:1]), (same, same[:2])):
        with pytest.raises(InputError, match="cannot be compared"):
            compare_generations(*bad)


def test_waits_for_a_core_do_not_count() -> None:
    quiet, waiting = (2.0, 0.01), (5.0, 3.0)
    turns = [[quiet] * 4, [waiting, quiet]]
    assert without_waits([turns], single=True) == [((1.99,) * 4, (2.0, 1.99))]
    assert without_waits([turns, turns], single=False) == [((2.0,) * 4, (2.0,))] * 2
    few = [[waiting] * 4, [quiet, waiting]]
    assert without_waits([turns, few], single=False) == [((2.0,) * 4, (5.0, 2.0)), ((5.0,) * 4, (2.0, 5.0))]
    assert without_waits([[[waiting], [quiet] * 5]], single=False) == [((), (2.0,) * 5)]


def test_one_usable_core_is_not_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of one process on one core wait for each other all the time: subtracted, nothing would be left."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    found = [TimingJob("a", Path("a"), Path("a"), threads).one_thread for threads in (None, 1, 2)]
    assert found == [False, True, False]
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert TimingJob("a", Path("a"), Path("a")).one_thread


def test_turns_of_one_round_are_compared() -> None:
    slow = [((1.0, 1.0), (3.0,), (3.0,)), ((1.0,), (1.0,), (1.0,))]  # the machine, for two rounds of one generation
    fast = [((0.5,), (1.5, 1.5), (1.5,)), ((0.5,), (0.5,), (0.5,))]
    found = compare_generations(slow, fast)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    empty = [((), (2.0,)), ((2.0,), ())]  # all of a turn was waiting
    assert compare_generations(empty, [((1.0,), ()), ((), (1.0,))]).value == pytest.approx(2.0)


def test_what_is_open_is_timed_for_longer(tmp_path: Path) -> None:
    shares: list[float] = []
    asked: list[int] = []

    def settled(found: list[Any]) -> bool:
        asked.append(len(found))
        return len(asked) == 2

    how: dict[str, Any] = {"seconds": 0.0, "settled": settled, "progress": shares.append}
    assert len(time_generations(jobs(tmp_path, SCRIPTED), patience=5, **how)) == 8
    assert asked == [4, 8]
    assert shares[-1] == 1.0
    assert len(time_generations(jobs(tmp_path, SCRIPTED), patience=1, **how)) == 4


def test_batches_follow_the_dynamic_axis(tmp_path: Path) -> None:
    path = export_onnx(dynamic(), tmp_path / "net.onnx").path
    shares: list[float] = []
    found = time_batches([path], X, batches=(1, 3), threads=1, seconds=0.0, progress=shares.append)
    assert list(found) == [1, 3]
    assert shares[-1] == 1.0
    with pytest.raises(InputError, match="Sequential has no dynamic batch axis"):
        time_batches([net()], X)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: time_apart([]), "a list of models"),
        (lambda: time_apart("net.onnx"), "a list of models"),
        (lambda: time_apart([net()]), "no model knows the shape of its inputs"),
        (lambda: time_apart([net()], X, names=["a", "b"]), "2 names for 1 models"),
        (lambda: time_apart([net()], X, threads=0), "threads=0"),
        (lambda: time_apart([net()], X, seconds=-1.0), "seconds=-1.0"),
        (lambda: time_apart([net(), nn.Linear(5, 5)], X), "Linear: the model does not run on these inputs"),
        (lambda: time_batches([net()], X, batches=()), "batches="),
        (lambda: time_batches([net()], X, batches=(0,)), "batches="),
    ],
)
def test_bad_arguments_are_refused(call: Any, said: str, temporary: Path) -> None:
    with pytest.raises(SurgeryError, match=said):
        call()
    assert list(temporary.iterdir()) == []
