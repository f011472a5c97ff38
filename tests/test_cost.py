"""ONNX models of operators, the timing core on made-up samples, and the store of latencies. Nothing asserts a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import pwd
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from surgery.algebra import Chain, Conv, Geometry, Linear, Operator, Shape, relative_error
from surgery.cost.cache import Store, cache_path, described
from surgery.cost.onnxruntime import backend
from surgery.cost.onnxruntime.backend import OnnxRuntime
from surgery.cost.onnxruntime.model import BESIDE, build_choice, build_model
from surgery.cost.onnxruntime.sessions import bind
from surgery.cost.timing import Budget, Samples, Speedup, compare_samples, interleave
from surgery.errors import InputError
from surgery.factorizations import named
from surgery.kinds.onnx.session import open_session
from surgery.system.machine import cpu_name, physical_cores

QUICK = Budget(seconds=0.0, min_rounds=2, warmup_rounds=0)


def conv(dims: int = 2, *, channels: tuple[int, int] = (6, 4), size: int = 3, groups: int = 1, **changes: Any) -> Conv:
    """Return a convolution of odd geometry unless ``changes`` say otherwise."""
    padding = ((size // 2, size // 2),) * dims
    geometry = replace(Geometry((1,) * dims, padding, (1,) * dims, (0,) * dims), **changes)
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = channels
    rows, columns = (inputs, outputs // groups) if geometry.transposed else (outputs, inputs // groups)
    weight = torch.randn(rows, columns, *(size,) * dims, generator=generator)
    return Conv(weight, geometry, groups, bias=torch.randn(outputs, generator=generator))


def chain(operator: Operator, ranks: tuple[int, ...] = (2, 2), name: str = "tucker") -> Chain:
    found = named(name).factor(operator, ranks)
    assert isinstance(found, Chain)
    return found


LINEAR = Linear(torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), bias=torch.arange(5.0))
CASES: dict[str, tuple[Operator | Chain, tuple[int, ...]]] = {
    "conv1d": (conv(1), (2, 6, 9)),
    "conv2d": (conv(), (2, 6, 9, 8)),
    "conv3d": (conv(3), (1, 6, 5, 4, 6)),
    "unbatched conv1d": (conv(1), (6, 9)),
    "unbatched conv2d": (conv(), (6, 9, 8)),
    "no bias": (conv().with_bias(None), (1, 6, 9, 8)),
    "stride": (conv(stride=(2, 1)), (1, 6, 9, 8)),
    "dilation": (conv(dilation=(2, 3), padding=((2, 2), (3, 3))), (1, 6, 11, 12)),
    "grouped": (conv(groups=2), (1, 6, 9, 8)),
    "depthwise": (conv(channels=(6, 6), groups=6), (1, 6, 9, 8)),
    "same, even kernel": (conv(size=4, padding=((1, 2), (1, 2))), (1, 6, 9, 8)),
    "reflect": (conv(padding_mode="reflect"), (1, 6, 9, 8)),
    "replicate": (conv(padding_mode="replicate", padding=((1, 2), (0, 3))), (1, 6, 9, 8)),
    "circular": (conv(padding_mode="circular", padding=((2, 1), (1, 1))), (1, 6, 9, 8)),
    "circular 1d, unbatched": (conv(1, padding_mode="circular"), (6, 9)),
    "transposed": (conv(transposed=True, stride=(2, 3), output_padding=(1, 2)), (1, 6, 5, 4)),
    "transposed, grouped": (conv(transposed=True, groups=2, dilation=(2, 1)), (1, 6, 5, 4)),
    "transposed 1d": (conv(1, transposed=True, stride=(2,), output_padding=(1,)), (2, 6, 5)),
    "transposed 3d": (conv(3, transposed=True, stride=(2, 2, 1)), (1, 6, 3, 4, 5)),
    "linear 1d": (LINEAR, (7,)),
    "linear 2d": (LINEAR, (3, 7)),
    "linear 3d": (LINEAR, (2, 3, 7)),
    "linear without bias 2d": (LINEAR.with_bias(None), (3, 7)),
    "linear without bias 3d": (LINEAR.with_bias(None), (2, 3, 7)),
    "chain of linear": (chain(LINEAR, (3,), "svd"), (2, 3, 7)),
    "chain of conv": (chain(conv(stride=(2, 2))), (2, 6, 9, 8)),
    "spatial chain": (chain(conv(), (5,), "spatial"), (1, 6, 9, 8)),
    "unbatched chain": (chain(conv()), (6, 9, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_onnx_model_computes_what_the_operator_computes(name: str) -> None:
    operator, shape = CASES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (found,) = open_session(build_model(operator, shape), threads=1).run(None, {"input": x.numpy()})
    assert found.shape == tuple(operator.out_shape(shape))
    assert relative_error(torch.from_numpy(found), operator(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_become_float32(dtype: torch.dtype) -> None:
    session = open_session(build_model(conv().to(dtype=dtype), (1, 6, 9, 8)), threads=1)
    assert session.get_inputs()[0].type == "tensor(float)"


def test_a_skeleton_gets_random_weights() -> None:
    skeleton = named("tucker").skeleton(conv(), (2, 2))
    (found,) = open_session(build_model(skeleton, (1, 6, 9, 8))).run(None, {"input": np.ones((1, 6, 9, 8), "f")})
    assert np.isfinite(found).all()
    assert found.std() > 0


def test_onnx_model_refuses_what_it_cannot_build() -> None:
    with pytest.raises(InputError, match="there is no known ONNX node for Operator"):
        build_model(Operator(torch.ones(1)), (1,))
    huge = Linear(torch.empty(40_000, 40_000, device="meta"))
    with pytest.raises(InputError, match=r"6\.0 GiB"):
        build_model(huge, (1, 40_000))


def test_a_choice_runs_one_branch(tmp_path: Path) -> None:
    """The profile of a run has the nodes of the chosen branch and no others."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    branches = LINEAR, chain(LINEAR, (2,), "svd")
    session = ort.InferenceSession(build_choice(*branches, (3, 7)), options, providers=["CPUExecutionProvider"])
    x = np.ones((3, 7), "f")
    (second,) = session.run(None, {"input": x, "second": np.array(True)})
    events = json.loads(Path(session.end_profiling()).read_text())
    assert sum(e.get("args", {}).get("op_name") == "Gemm" for e in events) == 2
    (first,) = session.run(None, {"input": x, "second": np.array(False)})
    for branch, found in zip(branches, (first, second), strict=True):
        assert relative_error(torch.from_numpy(found), branch(torch.from_numpy(x))) < 1e-5


def noisy(seconds: float, *, seed: int, noise: float = 0.05, rounds: int = 60) -> Samples:
    generator = np.random.default_rng(seed)
    return Samples(tuple(seconds * (1 + noise * generator.gamma(1.0, size=rounds))))


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [(0.5, "faster"), (2.0, "slower"), (1.0, "no difference"), (0.995, "no difference"), (1.005, "no difference")],
)
def test_verdict(seconds: float, verdict: str) -> None:
    speedup = compare_samples(noisy(1.0, seed=0), noisy(seconds, seed=1))
    assert speedup.low <= speedup.value <= speedup.high
    assert speedup.verdict == verdict


def test_a_small_but_certain_difference_is_none() -> None:
    sure = Samples((1.0,) * 50), Samples((0.995,) * 50)
    assert compare_samples(*sure).low > 1
    assert compare_samples(*sure).verdict == "no difference"


def test_an_interval_around_one_is_no_difference() -> None:
    assert Speedup(1.3, 0.9, 1.8).verdict == "no difference"
    assert Speedup(0.7, 0.5, 1.1).verdict == "no difference"


def test_rounds_are_paired() -> None:
    """A disturbance that hits both in the same rounds widens no interval."""
    drift = np.repeat([1.0, 3.0], 50)
    speedup = compare_samples(Samples(tuple(drift)), Samples(tuple(drift / 2)))
    assert (speedup.low, speedup.high) == pytest.approx((2.0, 2.0), rel=0.5)
    assert speedup.verdict == "faster"


def test_equal_samples_are_rarely_told_apart() -> None:
    verdicts = [compare_samples(noisy(1, seed=2 * i), noisy(1, seed=2 * i + 1)).verdict for i in range(100)]
    assert verdicts.count("no difference") >= 85


def test_samples_of_other_rounds_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="cannot be paired"):
        compare_samples(Samples((1.0,)), Samples((1.0, 2.0)))
    with pytest.raises(InputError, match="cannot be paired"):
        compare_samples(Samples(()), Samples(()))


def test_statistics_of_samples() -> None:
    samples = Samples(tuple(float(i) for i in range(1, 12)))
    assert (samples.runs, samples.median, samples.p90) == (11, 6.0, 10.0)
    assert samples.spread == pytest.approx(5 / 6)


def test_interleaving_runs_each_once_a_round_in_changing_order() -> None:
    calls: list[int] = []
    runs = [lambda i=i: calls.append(i) for i in range(3)]
    samples = interleave(runs, Budget(seconds=0, min_rounds=8, warmup_rounds=2), seed=3)
    assert [s.runs for s in samples] == [8, 8, 8]
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 10
    assert all(sorted(r) == [0, 1, 2] for r in rounds)
    assert len(set(rounds)) > 1
    again: list[int] = []
    interleave([partial(again.append, i) for i in range(3)], Budget(0, min_rounds=8, warmup_rounds=2), seed=3)
    assert again == calls


def test_interleaving_stops_at_the_most_rounds_and_tells_its_progress() -> None:
    seen: list[float] = []
    (samples,) = interleave([lambda: None], Budget(seconds=60, min_rounds=2, max_rounds=5), progress=seen.append)
    assert samples.runs == 5
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize("bad", [{"seconds": -1.0}, {"min_rounds": 0}, {"min_rounds": 9, "max_rounds": 8}])
def test_a_budget_is_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="measuring budget"):
        Budget(**bad)


def test_sessions_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match="threads=0"):
        open_session(b"", threads=0)
    with pytest.raises(InputError, match="onnxruntime cannot load the model"):
        open_session(b"nonsense")
    session = open_session(build_model(LINEAR, (3, 7)))
    with pytest.raises(InputError, match="cannot run the model on these inputs"):
        bind(session, {"input": np.ones((3, 8), "f")})
    assert session.get_session_options().intra_op_num_threads == physical_cores() >= 1


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """All sessions that latencies open from now on."""
    sessions: list[object] = []

    def count(*args: Any, **kwargs: Any) -> object:
        sessions.append(open_session(*args, **kwargs))
        return sessions[-1]

    monkeypatch.setattr(backend, "open_session", count)
    return sessions


def latencies(path: Path, **changes: Any) -> OnnxRuntime:
    return OnnxRuntime(**{"threads": 1, "budget": QUICK, "path": path, **changes})


def test_a_pair_is_measured_once_for_all_instances(tmp_path: Path, opened: list[object]) -> None:
    path = tmp_path / "new" / "latencies.sqlite3"
    first = latencies(path)
    comparison = first.compare(conv(), chain(conv()), (1, 6, 9, 8))
    assert comparison.low <= comparison.speedup <= comparison.high
    assert comparison.speedup == pytest.approx(comparison.dense_s / comparison.chain_s)
    assert len(opened) == 1
    assert first.compare(conv(), chain(conv()), (1, 6, 9, 8)) == comparison
    again = latencies(path)
    assert again.compare(conv(), chain(conv()), (1, 6, 9, 8)) == comparison
    assert (len(opened), first.measured, again.measured) == (1, 1, 0)


def test_a_skeleton_is_looked_up_like_the_real_chain(tmp_path: Path, opened: list[object]) -> None:
    once = latencies(tmp_path / "l")
    seconds = once.measure(chain(conv()), (1, 6, 9, 8))
    assert once.measure(named("tucker").skeleton(conv(), (2, 2)), (1, 6, 9, 8)) == seconds > 0
    assert len(opened) == 1


def key_of(base: OnnxRuntime, shape: Shape, *operators: Operator | Chain) -> str:
    return json.dumps(described(shape, *operators) | base.key, sort_keys=True)


def test_the_key_holds_all_that_matters_and_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 6, 9, 8)
    base = latencies(tmp_path / "l")
    key = key_of(base, shape, conv())
    scaled = replace(conv(), weight=3 * conv().weight)
    assert key_of(base, shape, scaled) == key_of(base, shape, conv().to(dtype=torch.float64)) == key
    others = [
        key_of(base, (2, *shape[1:]), conv()),
        key_of(base, shape, conv(groups=2)),
        key_of(base, shape, conv(stride=(2, 1))),
        key_of(base, shape, conv(padding_mode="reflect")),
        key_of(base, shape, conv(channels=(6, 5))),
        key_of(base, shape, conv().with_bias(None)),
        key_of(base, shape, Chain((conv(),))),
        key_of(base, shape, conv(), conv()),
        key_of(latencies(tmp_path / "l", threads=2), shape, conv()),
    ]
    for name in ("_PROTOCOL", "cpu_name"):
        with monkeypatch.context() as patch:
            patch.setattr(backend, name, 99 if name == "_PROTOCOL" else lambda: "another")
            others.append(key_of(base, shape, conv()))
    assert len({key, *others}) == len(others) + 1


@pytest.mark.parametrize("damage", [b"", b"garbage" * 500, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_broken_store_is_reported_once_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    path = tmp_path / "l"
    path.write_bytes(damage)
    once = latencies(path)
    assert once.measure(LINEAR, (3, 7)) == once.measure(LINEAR, (3, 7)) > 0
    once.measure(LINEAR, (4, 7))
    assert once.measured == 2
    assert len(caplog.records) == (1 if damage else 0)  # an empty file is an empty database


def test_an_unwritable_store_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert latencies(tmp_path / "file" / "l").measure(LINEAR, (3, 7)) > 0
    assert "cannot be used" in caplog.text


def _sql(*statements: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    return make


_ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT"
STRANGE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "full device": lambda path: path.symlink_to("/dev/full"),
    "link to itself": lambda path: path.symlink_to(path),
    "another table": _sql("CREATE TABLE latencies (x INTEGER)"),
    "endless view": _sql(f"CREATE VIEW latencies AS {_ENDLESS} x AS key, 'a' AS fields FROM c WHERE x < 0"),
    "endless trigger": _sql(
        "CREATE TABLE latencies (key TEXT PRIMARY KEY, fields TEXT)",
        f"CREATE TRIGGER t BEFORE INSERT ON latencies BEGIN {_ENDLESS} max(x) FROM c; END",
    ),
    "view of a gigabyte": _sql("CREATE VIEW latencies AS SELECT zeroblob(1000000000) AS key, 'a' AS fields"),
    "wide table": _sql("CREATE TABLE latencies (key TEXT PRIMARY KEY, fields TEXT, more TEXT)"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_stands_in_a_store_s_place_is_done_without(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "l"
    STRANGE[name](path)
    for _ in range(2):
        once = latencies(path)
        assert once.measure(LINEAR, (3, 7)) == once.measure(LINEAR, (3, 7)) > 0
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().isprintable()


def test_a_store_that_another_process_holds_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "l"
    latencies(path).measure(LINEAR, (3, 7))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        assert latencies(path).measure(LINEAR, (3, 7)) > 0
    assert "database is locked" in caplog.text


def test_without_a_home_there_is_no_store(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
    for chosen in ("", "~nobody-of-this-name/x"):
        monkeypatch.setenv("SURGERY_CACHE", chosen)
        assert cache_path() is cache_path() is None
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records) <= 2
    assert "~nobody-of-this-name/x" in caplog.text
    monkeypatch.setenv("SURGERY_CACHE", "off")
    assert cache_path() is None


NONSENSE = ["{", "[]", "{}", "[" * 100_000, b"\xff", "9" * 10_000, None]
NONSENSE += [f'{{"seconds": {value}}}' for value in ('"x"', "-1.0", "NaN", "Infinity", "5e-324", "1e308", "true", "{}")]


@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: repr(text)[:20])
def test_a_nonsensical_entry_is_measured_anew(tmp_path: Path, text: str | bytes | None) -> None:
    path = tmp_path / "l"
    latencies(path).measure(LINEAR, (3, 7))
    connection = sqlite3.connect(path)
    connection.execute("UPDATE latencies SET fields = ?", (text,))
    connection.commit()
    connection.close()
    again = latencies(path)
    assert again.measure(LINEAR, (3, 7)) > 0
    assert again.measured == 1
    assert latencies(path).measure(LINEAR, (3, 7)) > 0


def test_an_interrupted_measurement_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    once = latencies(tmp_path / "l")
    with monkeypatch.context() as patch:
        patch.setattr(backend, "interleave", interrupt)
        with pytest.raises(KeyboardInterrupt):
            once.measure(LINEAR, (3, 7))
    assert once.measure(LINEAR, (3, 7)) > 0
    assert once.measured == 2


def _put_many(path: Path, start: int) -> None:
    store = Store(path)
    for index in range(start, start + 50):
        store.put(str(index), {"seconds": 1.0 + index})


def test_processes_share_a_store(tmp_path: Path) -> None:
    path = tmp_path / "l"
    other = multiprocessing.get_context("spawn").Process(target=_put_many, args=(path, 50))
    other.start()
    while not path.exists():
        other.join(0.05)
    _put_many(path, 0)
    other.join()
    assert other.exitcode == 0
    store = Store(path)
    assert [store.get(str(i)) for i in range(100)] == [{"seconds": 1.0 + i} for i in range(100)]


def test_the_path_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SURGERY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "surgery" / "latencies.sqlite3"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_path() == Path("~/.cache/surgery/latencies.sqlite3").expanduser()
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "mine"))
    assert cache_path() == tmp_path / "mine" / "latencies.sqlite3"
    monkeypatch.setenv("SURGERY_CACHE", "off")
    assert cache_path() is None
    assert OnnxRuntime(threads=1, budget=QUICK).measure(LINEAR, (3, 7)) > 0


def test_the_machine_is_known() -> None:
    assert OnnxRuntime(keep=False).channel_multiple in (4, 8, 16)
    assert cpu_name()
    assert json.loads(key_of(OnnxRuntime(keep=False), (1,), LINEAR))["cpu"] == cpu_name()


def test_large_weights_stand_beside_the_model_that_is_timed(tmp_path: Path) -> None:
    operator, x = Linear(torch.randn(512, 1024), bias=torch.randn(512)), torch.randn(3, 1024)
    with open(tmp_path / BESIDE, "wb") as beside:
        raw = build_choice(operator, operator.with_bias(None), (3, 1024), beside)
    assert len(raw) < 10_000
    assert (tmp_path / BESIDE).stat().st_size >= 2 * 4 * operator.weight.numel()
    (tmp_path / "m.onnx").write_bytes(raw)
    session = open_session(tmp_path / "m.onnx", threads=1)
    for second, expected in ((False, operator(x)), (True, operator.with_bias(None)(x))):
        (found,) = session.run(None, {"input": x.numpy(), "second": np.array(second)})
        assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-3)
