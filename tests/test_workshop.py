"""What ``auto`` with calibration data measures: damages of fitted chains, whole models once, disturbed ones twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import surgery
from surgery.allocation.choose import choose_least_cost
from surgery.benchmark import ModelComparison, ModelTiming, Ready, Timing, environment
from surgery.calibration import read_calibration
from surgery.chain import Chain
from surgery.cost.latency import Comparison, Latencies
from surgery.cost.timing import Samples
from surgery.inputs import normalise_inputs
from surgery.operators import Operator, Shape
from surgery.passes import clock as clocks
from surgery.passes import promise
from surgery.passes.decompose import DecomposeResult
from surgery.passes.goals import Goal
from surgery.passes.terms import Asked, Terms
from surgery.passes.workshop import Workshop
from tests.cases import decaying


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3)
    )
    for parameter in model.parameters():
        parameter.data = decaying(parameter.data.double(), 0.6).float()
    return model.eval()


def samples(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class ByMacs(Latencies):
    """Sites take a nanosecond for each multiply-accumulate."""

    def compare(self, dense: Operator | Chain, chain: Operator | Chain, shape: Shape) -> Comparison:
        first, second = (1e-9 * (o if isinstance(o, Chain) else Chain((o,))).macs(shape) for o in (dense, chain))
        ratio = first / second
        return Comparison(first, second, ratio, ratio, ratio, "faster" if ratio > 1 else "slower")


PAUSES = (1.0, 2.0, 3.0)


class Clock:
    """Whole models take a microsecond for each parameter, and longer in the calls that are said to be disturbed."""

    def __init__(self, disturbed: Sequence[int] = ()) -> None:
        self.calls = self.alone = 0
        self.waits: list[float] = []
        self.disturbed = disturbed

    def make_ready(self, models: Sequence[Any], *_: Any, **__: Any) -> list[Ready]:
        states = (m.state_dict if isinstance(m, ExportedProgram) else m.state_dict() for m in models)
        return [Ready(str(sum(tensor.numel() for tensor in state.values())), lambda: None) for state in states]

    def time_ready(self, ready: Sequence[Ready], **_: Any) -> Timing:
        slow = 2.0 if self.calls in self.disturbed else 1.0
        self.calls += 1
        return self._timing(ready, slow)

    def apart(self, model: Any, *_: Any) -> Clock:
        self.model = model
        return self

    def against(self, model: Any, **_: Any) -> Timing:
        self.alone += 1
        return self._timing(self.make_ready([self.model, model]), 1.0)

    def _timing(self, ready: Sequence[Ready], slow: float) -> Timing:
        seconds = [1e-6 * float(model.path) for model in ready]
        seconds = [slow * seconds[0], *(slow**2 * s for s in seconds[1:])]
        models = tuple(ModelTiming(m.path, Samples((s,) * 11)) for m, s in zip(ready, seconds, strict=True))
        ratios = [seconds[0] / s for s in seconds[1:]]
        return Timing(models, tuple(ModelComparison("", r, r, r, "faster") for r in ratios), environment(1))


def decompose(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, target: float = 1.5, **others: Any
) -> DecomposeResult:
    monkeypatch.setattr(clocks, "make_ready", clock.make_ready)
    monkeypatch.setattr(clocks, "time_ready", clock.time_ready)
    monkeypatch.setattr(clocks, "Apart", clock.apart)
    monkeypatch.setattr(clocks, "sleep", clock.waits.append)
    monkeypatch.setattr(clocks, "_PAUSES", PAUSES)
    others |= {"target_speedup": target, "latencies": ByMacs(threads=1, path=path)}
    return surgery.decompose(network(), samples(2), calibration=samples(), **others)


def test_whole_models_are_timed_once_and_the_finished_one_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Clock(), Clock()
    found = [decompose(tmp_path / "l", clock, monkeypatch) for clock in (first, second)]
    assert first.calls > 3
    assert second.calls == 0
    assert first.alone == second.alone >= 1
    for result in found:
        assert result.promise is not None
        assert result.promise.kept
        assert result.search is not None
        assert result.search.predicted == pytest.approx(result.promise.measured, rel=0.1)  # of a step further, perhaps
    assert found[0].plan == found[1].plan


def test_a_disturbed_timing_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = decompose(tmp_path / "a", Clock(), monkeypatch)
    clock = Clock(disturbed=(1, 2))  # 0 times the original alone
    disturbed = decompose(tmp_path / "b", clock, monkeypatch)
    assert quiet.search is not None
    assert disturbed.search is not None
    assert disturbed.search.trials == quiet.search.trials
    assert len(clock.waits) == 2


def test_a_machine_that_stays_slow_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(disturbed=range(1, 1000))
    result = decompose(tmp_path / "l", clock, monkeypatch)
    assert clock.waits == sorted(clock.waits)
    assert len(clock.waits) == len(PAUSES)
    assert result.search is not None
    assert len(result.search.trials) > 1


def test_what_was_disturbed_to_the_end_is_not_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decompose(tmp_path / "l", Clock(disturbed=range(1, 1000)), monkeypatch)
    again = Clock()
    result = decompose(tmp_path / "l", again, monkeypatch)
    assert again.calls > 1
    assert result.search is not None
    assert result.promise is not None
    assert result.search.predicted == pytest.approx(result.promise.measured, rel=0.1)  # of a step further, perhaps


def test_out_of_reach_the_least_damaged_of_the_equally_fast_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promise, "MARGIN", 0.5)  # wide enough for a choice among so few options
    result = decompose(tmp_path / "l", Clock(), monkeypatch, target=1000.0, best_effort=True)
    assert result.promise is not None
    assert not result.promise.kept
    assert result.search is not None
    assert result.search.chosen is not None
    damage, cost = result.search.chosen
    most, least = result.search.frontier[-1]
    assert least < cost <= 1.5 * least
    assert damage < 0.9 * most


def test_damages_are_corrected_by_fitted_chains() -> None:
    model, x = network(), samples()
    asked = Asked(Goal.of(0.2, None, None, metric=False), cost="macs")
    terms = Terms(asked, Latencies(threads=1, keep=False))
    work = Workshop(model, normalise_inputs(x[:2]), read_calibration(x, model), terms, lambda *_: None)
    budget = 0.1 * sum(max(option.damage for option in site.options) for site in work.sites)
    before = choose_least_cost(work.sites, budget)
    work.settle(lambda: choose_least_cost(work.sites, budget))
    after = [option for option in choose_least_cost(work.sites, budget) if option.factorization is not None]
    sites = {options.site.name: options.site for options in work.sites}
    assert after
    assert sum(option.cost for option in after) < sum(option.cost for option in before)  # bounds are too high
    for option in after:
        found = work._data.damage(sites[option.site], work.chains([option])[option.site])
        assert found <= option.damage * 1.5  # of another rank, perhaps, than the one that was fitted


def test_a_target_out_of_reach_gives_the_original_and_says_what_is_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = decompose(tmp_path / "l", Clock(), monkeypatch, target=1000.0)
    assert not result.changes
    assert result.after == result.before
    assert result.promise is not None
    assert not result.promise.kept
    assert "out of reach" in result.promise.note
    assert result.search is not None
    assert result.search.timing is None  # the original has no speed-up of its own to report
    (speedup, error), *_ = result.search.reached
    assert 1 < speedup < 1000
    assert error > 0
