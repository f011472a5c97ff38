"""What "auto" decides: when, where and at what rank, and that it does not switch where that would not pay.

Times are made up, as functions of MACs, so that nothing depends on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surgery.algebra import Chain, Linear, Operator, Shape
from surgery.cost.timing import Samples
from surgery.errors import InputError, Refusal
from surgery.factorizations import named
from surgery.plans.candidates import Choice, candidates_of
from surgery.sites import Site
from surgery.training import LowRankTraining, make_forecast, propose
from surgery.training.measure import PassTimer, time_models
from surgery.training.ranks import TrainingRanks
from surgery.training.schedule import Schedule, SpectrumLog, stable_rank
from tests.tolerances import tolerance
from tests.training_cases import OPTIMIZERS, Net, batch, train

times = st.floats(1e-4, 10)


class MacTimer(PassTimer):
    """Seconds in proportion to MACs, with a cost for each operator."""

    overhead = 0.0

    def compare(self, dense: Operator, chains: Sequence[Chain], shape: Shape) -> tuple[Samples, ...]:
        steps = [Chain((dense,)), *chains]
        return tuple(Samples((1e-9 * s.macs(shape) + self.overhead * len(s.operators),) * 5) for s in steps)


class SlowTimer(MacTimer):
    overhead = 1.0


@given(times, times, times, st.integers(1, 500), st.none() | st.integers(0, 50), st.floats(0, 100))
def test_a_forecast_pays_only_if_it_saves(
    step: float, dense: float, factored: float, steps: int, left: int | None, cost: float
) -> None:
    forecast = make_forecast(
        dense_step=step, measured_dense=dense, measured_factored=factored, steps=steps, epochs_left=left, cost=cost
    )
    assert forecast.factored_step >= min(1.0, factored / dense) * step * (1 - 1e-12)
    assert forecast.reason
    if forecast.pays:
        assert factored < dense
        assert forecast.saved is None or forecast.saved > 0
        assert forecast.saved is None or forecast.break_even < (left or 0)
    elif forecast.gain <= 0:
        assert forecast.break_even == math.inf


def test_schedules_say_when_and_why() -> None:
    flat = SpectrumLog(({"a": 10.0}, {"a": 5.0}, {"a": 4.9}, {"a": 4.85}))
    steep = SpectrumLog(({"a": 10.0}, {"a": 8.0}, {"a": 6.0}, {"a": 4.0}))
    auto = Schedule("auto", "end", 80)
    assert flat.settled
    assert not steep.settled
    assert "settled" in (auto.decompose_reason(3, flat) or "")
    assert auto.decompose_reason(3, steep) is None
    assert "waiting" in (auto.decompose_reason(4, steep) or "")
    assert Schedule("auto", None, None).decompose_reason(4, steep) is None
    assert Schedule(2, "end", None).decompose_reason(1, flat) is None
    assert Schedule(2, "end", None).decompose_reason(2, steep) == "decompose_at=2"
    assert auto.recompose_reason(79) is None
    assert auto.recompose_reason(80) == "the training ends"
    assert Schedule(2, "end", None).recompose_reason(99) is None
    with pytest.raises(InputError):
        Schedule(5, 5, None)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_the_stable_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    expected = float(values.square().sum() / values[0].square())
    assert abs(stable_rank(Linear(weight)) / expected - 1) <= tolerance(torch.float64, length=81, steps=8)
    assert stable_rank(Linear(torch.zeros(shape))) == 0


def candidates(rows: int = 64, columns: int = 96) -> list[Any]:
    site = Site("layer", Linear(torch.randn(rows, columns)), ((16, columns),))
    found = candidates_of(site, "auto")
    assert not isinstance(found, Refusal)
    return found


@pytest.mark.parametrize(("relative", "rank"), [(1.0, 16), (0.9, 16), (0.6, 16), (0.3, 8), (0.01, 8)])
def test_ranks_follow_the_spectrum_within_bounds(relative: float, rank: int) -> None:
    log = SpectrumLog(({"layer": 50.0}, {"layer": 50.0 * relative}))
    choice = TrainingRanks(log, MacTimer(), 8).choose(candidates())
    assert isinstance(choice, Choice)
    assert choice.ranks == (rank,)
    assert (choice.latency or 0) < (choice.dense_latency or 0)


def test_a_site_that_would_not_train_faster_stays_dense() -> None:
    refusal = TrainingRanks(SpectrumLog(), SlowTimer(), 8).choose(candidates())
    assert isinstance(refusal, Refusal)
    assert "trains faster than dense" in refusal.reason


def auto_run(**options: Any) -> LowRankTraining:
    torch.manual_seed(0)
    model = Net(32)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    return LowRankTraining(model, optimizer, batch()[0], **{"memory_format": None, **options})


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, type[PassTimer]], None]:
    """Times of whole models: the first, dense, takes 30 s, and each factored one ``factor`` of it."""

    def patch(factor: float, timer: type[PassTimer] = MacTimer) -> None:
        def passes(models: Sequence[nn.Module], inputs: Any) -> tuple[Samples, ...]:
            return (Samples((30.0,) * 5), *(Samples((30 * factor,) * 5) for _ in models[1:]))

        monkeypatch.setattr(propose, "PassTimer", timer)
        monkeypatch.setattr(propose, "time_models", passes)

    return patch


def run_epoch(run: LowRankTraining, epoch: int, *, seconds: float = 100.0) -> Any:
    """An epoch that is said to have taken so long."""
    train(run)
    run._mark -= seconds
    run._ends = [end + i * seconds / len(run._ends) for i, end in enumerate(run._ends)]
    return run.end_epoch(epoch)


def test_what_is_between_epochs_is_no_part_of_a_step() -> None:
    run = auto_run(decompose_at=5, epochs=10)
    train(run)
    run._mark -= 1000.0  # an evaluation, say
    run.end_epoch(0)
    row = run.history[0]
    assert row.seconds > 1000
    assert row.step_seconds is not None
    assert row.step_seconds < 1000 / row.steps


def test_auto_switches_where_it_pays_and_tells_the_forecast(made_up: Callable[..., None]) -> None:
    made_up(0.25)
    run = auto_run(epochs=10)
    event = run_epoch(run, 0)
    assert event.kind == "decompose"
    assert "waiting costs more" in event.reason
    assert event.forecast.epochs_left == 9
    assert 2.5 < event.forecast.dense_step / event.forecast.factored_step < 4.1
    assert {change.site for change in event.changes} >= {"second"}
    assert run.phase == "factored"
    run_epoch(run, 1)
    assert "outcome" in repr(run.history)
    run.finish()


@pytest.mark.parametrize(("factor", "epochs", "seconds"), [(1.2, 10, 100.0), (0.99, 10, 100.0), (0.5, 2, 0.0)])
def test_auto_does_not_switch_where_it_would_not_pay(
    made_up: Callable[..., None], factor: float, epochs: int, seconds: float
) -> None:
    made_up(factor)
    run = auto_run(epochs=epochs)
    before = [id(parameter) for parameter in run.model.parameters()]
    event = run_epoch(run, 0, seconds=seconds)
    assert event.kind == "stay"
    assert ("would not pay" if factor < 0.9 else "would not train faster") in event.reason
    assert run_epoch(run, 1) is None
    assert [id(parameter) for parameter in run.model.parameters()] == before


def test_a_site_that_saves_next_to_nothing_stays_dense(made_up: Callable[..., None]) -> None:
    made_up(0.25)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 512), nn.Linear(512, 512))  # 256 of 270,592 MACs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = LowRankTraining(model, optimizer, torch.randn(4, 16), epochs=10, memory_format=None)
    optimizer.step()
    run._mark -= 100.0  # a long epoch
    event = run.end_epoch(0)
    assert event is not None
    assert [change.site for change in event.changes] == ["1", "2"]
    assert "less than 1 %" in (run.plan["0"].reason or "")
    assert run.plan["0"].dense_macs
    run.finish()


def test_auto_stays_where_no_site_trains_faster(made_up: Callable[..., None]) -> None:
    made_up(0.1, SlowTimer)
    run = auto_run(epochs=10)
    event = run_epoch(run, 0)
    assert event.kind == "stay"
    assert "no site would train faster" in event.reason
    assert run.finish() is None


def test_ranks_that_are_given_need_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(propose, "PassTimer", fail)
    monkeypatch.setattr(propose, "time_models", fail)
    run = auto_run(decompose_at=1, ranks={"second": (8, 8)}, recompose_at=None, memory_format="auto")
    assert run_epoch(run, 0).kind == "decompose"


def test_the_format_of_a_channels_last_model_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would never go back to the other one."""

    def fail(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(propose, "time_models", fail)
    model = Net(32).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # of modules, torch types it for four axes by position alone
    run = LowRankTraining(model, OPTIMIZERS["sgd"](model.parameters()), batch()[0], epochs=10)
    assert run._formats == [True]


def test_measuring_leaves_the_model_and_the_random_state_alone() -> None:
    run = auto_run(epochs=10, memory_format="auto")
    train(run)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in run.model.parameters()]
    random = torch.random.get_rng_state()
    settings: dict[str, Any] = {"log": SpectrumLog(), "formats": [False, True], "epoch": (1.0, 3), "epochs_left": 9}
    proposal = propose.propose(run.model, batch()[0], propose.Request(), **settings)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(run.model.state_dict()[name], value) for name, value in before.items())
    after = [p.grad for p in run.model.parameters()]
    assert all(a is None or torch.equal(a, g) for a, g in zip(after, gradients, strict=True) if g is not None)
    assert {decision.site for decision in proposal.plan} == {"first", "second", "hidden", "head"}


def test_models_with_mappings_as_outputs_and_whole_numbers_as_inputs_are_timed() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
            return {"logits": self.head(self.table(ids)), "none": None}

    (samples,) = time_models([Words()], ((torch.randint(10, (2, 3)),), {}))
    assert samples.median > 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_timer_runs_every_factorization(channels_last: bool) -> None:
    timer = PassTimer(channels_last)
    (found,) = propose.sites_of(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), torch.randn(2, 8, 6, 6))
    chains = [named(name).skeleton(found.operator, (4,) * count) for name, count in (("svd", 1), ("tucker", 2))]
    samples = timer.compare(found.operator, chains, found.input_shape)
    assert len(samples) == 3
    assert timer.compare(found.operator, chains, found.input_shape) is samples
