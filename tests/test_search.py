"""The search for a promise: damages of fitted chains, whole models timed once, and targets out of reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from surgery.algebra import Chain, Operator, Shape
from surgery.cost.base import Comparison
from surgery.cost.onnxruntime.backend import OnnxRuntime
from surgery.cost.timing import Samples
from surgery.data.samples import read_calibration
from surgery.kinds.inputs import normalise_inputs
from surgery.passes.choices import ChoicePlans, Pricing, list_options
from surgery.passes.clock import Instruments
from surgery.passes.damages import Damages
from surgery.passes.evidence import read_evidence
from surgery.passes.fitting import FitOptions, Fitter
from surgery.passes.job import Selection, read_job
from surgery.passes.original import Original
from surgery.passes.results import DecomposeResult
from surgery.passes.run import by_goal
from surgery.plans.choose import choose_least_cost
from surgery.plans.goal import Goal
from surgery.plans.options import Counted
from surgery.runtime.bench import ModelComparison, ModelTiming, Timing, environment
from surgery.system.progress import silent
from surgery.text import RUIN
from tests.cases import decaying
from tests.test_calibration_models import as_kind


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


class ByMacs(OnnxRuntime):
    """Sites take a nanosecond for each multiply-accumulate; ranks go in fine steps, on each processor."""

    channel_multiple = 1

    def compare(self, dense: Operator | Chain, chain: Operator | Chain, shape: Shape) -> Comparison:
        first, second = (1e-9 * (o if isinstance(o, Chain) else Chain((o,))).macs(shape) for o in (dense, chain))
        ratio = first / second
        return Comparison(first, second, ratio, ratio, ratio, "faster" if ratio > 1 else "slower")


class Clock:
    """Whole models take a microsecond for each parameter; how sure a timing is of that is ``width``."""

    def __init__(self, width: float = 1.0) -> None:
        self.calls = self.finals = 0
        self.width = width

    def apart(self, model: Any, *_: Any) -> Clock:
        self.model = model
        return self

    def alone(self, **_: Any) -> ModelTiming:
        return _timed(self.model)

    def against(self, model: Any, *, seconds: float, **_: Any) -> Timing:
        final = seconds > 3
        self.finals, self.calls = self.finals + final, self.calls + (not final)
        first, second = _timed(self.model), _timed(model)
        ratio = first.median_s / second.median_s
        found = ModelComparison("", ratio, ratio / self.width, ratio * self.width, "faster")
        return Timing((first, second), (found,), environment(1))


def _timed(model: Any) -> ModelTiming:
    state = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    return ModelTiming("", Samples((1e-6 * sum(tensor.numel() for tensor in state.values()),) * 11))


def decompose(
    path: Path, clock: Clock, target: float = 1.5, *, best_effort: bool = False, **how: float
) -> DecomposeResult[nn.Module]:
    goal = Goal.speedup(target, best_effort=best_effort)
    job = read_job(network(), samples(2), goal, Selection(), FitOptions(), calibration=samples())
    return by_goal(job, goal, Instruments(ByMacs(threads=1, path=path), clock.apart, **how))


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> DecomposeResult[nn.Module]:
    """What a target out of reach gives."""
    return decompose(tmp_path_factory.mktemp("beyond") / "l", Clock(), target=1000.0)


def test_whole_models_are_timed_once_and_the_finished_one_each_time(tmp_path: Path) -> None:
    first, second = Clock(), Clock()
    found = [decompose(tmp_path / "l", clock) for clock in (first, second)]
    assert first.calls >= 1
    assert second.calls == 0
    assert first.finals == second.finals >= 1
    for result in found:
        assert result.promise is not None
        assert result.promise.kept
        assert result.search is not None
        assert result.search.predicted == pytest.approx(result.promise.measured, rel=0.1)  # of a step further, perhaps
    assert found[0].plan == found[1].plan


def test_what_a_timing_leaves_open_is_not_kept_for_another_time(tmp_path: Path) -> None:
    clocks = Clock(width=1.02), Clock(), Clock(width=1.2), Clock()
    for clock, name in zip(clocks, "aabb", strict=True):
        decompose(tmp_path / name, clock)
    sure, after_sure, unsure, after_unsure = (clock.calls for clock in clocks)
    assert sure >= 1
    assert after_sure < sure
    assert unsure >= 1
    assert after_unsure >= 1


@pytest.mark.parametrize("target", [1.3, 2.5])
def test_the_target_is_met_with_little_to_spare(target: float, tmp_path: Path) -> None:
    result = decompose(tmp_path / "l", Clock(width=1.01), target)  # a tenth of the sites' own seconds
    assert result.promise is not None
    assert result.promise.kept
    assert 1.02 * target <= result.promise.measured < 1.15 * target


def test_out_of_reach_the_least_damaged_of_the_equally_fast_is_given(tmp_path: Path) -> None:
    margin = 0.5  # wide enough for a choice among so few options
    result = decompose(tmp_path / "l", Clock(), target=1000.0, best_effort=True, margin=margin)
    assert result.promise is not None
    assert not result.promise.kept
    assert result.search is not None
    assert result.search.chosen is not None
    damage, cost = result.search.chosen
    most, least = result.search.frontier[-1]
    assert least < cost <= 1.5 * least
    assert damage < 0.9 * most


def test_unsure_timings_ask_for_a_little_more_and_not_for_the_fastest(tmp_path: Path) -> None:
    found = [decompose(tmp_path / str(width), Clock(width), target=1.1) for width in (1.0, 1.4)]
    fastest = decompose(tmp_path / "most", Clock(), target=1000.0, best_effort=True)
    promises = [result.promise for result in (*found, fastest)]
    sure, unsure, most = (promise.measured for promise in promises if promise is not None)
    assert promises[1] is not None
    assert promises[1].kept
    assert sure < unsure < 1.1 * 1.4 * 1.2 < most / 10


@pytest.mark.parametrize("kind", ["module", "graph", "program"])
def test_damages_are_corrected_by_what_chains_do_to_the_outputs(kind: str) -> None:
    x = samples()
    model = as_kind(network(), kind, x[:2])
    original = Original(model, normalise_inputs(x[:2]))
    evidence = read_evidence(original, read_calibration(x, model), list(original.sites), silent)
    assert evidence.data is not None
    fitter = Fitter(original, evidence, FitOptions(), silent)
    listed = list_options(original.sites.values(), evidence.data, Pricing(Counted("macs")), silent)
    plans = ChoicePlans(original.sites, listed.sites, listed.reasons, Goal.error(0.2, cost="macs"), None)
    damages = Damages(listed.sites, evidence, fitter, progress=silent)
    budget = 0.1 * sum(max(option.damage for option in site.options) for site in damages.sites)
    damages.settle(lambda: choose_least_cost(damages.sites, budget))
    after = [option for option in choose_least_cost(damages.sites, budget) if option.factorization is not None]
    assert after
    for option in after:
        alone = evidence.held_out.error(fitter.build(plans.plan([option])))[0] ** 2
        assert option.damage / 1.5 <= alone <= option.damage * 1.5  # on other samples, of another rank, perhaps


def test_a_target_out_of_reach_gives_the_original_and_says_what_is_within(beyond: DecomposeResult[nn.Module]) -> None:
    result = beyond
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


def test_a_speed_up_that_ruins_the_model_is_out_of_reach_without_best_effort(
    beyond: DecomposeResult[nn.Module], tmp_path: Path
) -> None:
    found = beyond.search
    assert found is not None
    speedup, error = found.reached[-1]
    assert error > RUIN
    result = decompose(tmp_path / "l", Clock(), target=0.97 * speedup)
    assert result.promise is not None
    assert not result.changes
    assert not result.promise.kept
    assert "which ruins a model" in result.promise.note
    taken = decompose(tmp_path / "l", Clock(), target=0.97 * speedup, best_effort=True)
    assert taken.changes
    assert taken.promise is not None
    assert taken.promise.kept


def test_a_target_that_no_timing_is_sure_of_says_so(tmp_path: Path) -> None:
    result = decompose(tmp_path / "l", Clock(width=100.0))
    assert not result.changes
    assert result.promise is not None
    assert "no timing was sure of the target" in result.promise.note
