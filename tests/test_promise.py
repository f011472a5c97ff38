"""``auto`` with calibration data keeps its promise on held-out samples, or says that it cannot."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import surgery
from surgery.cli.decompose import decompose as command
from surgery.data.batch_norm import NormWatch, Reference, reestimate_batch_norm
from surgery.data.collect import collect
from surgery.data.samples import read_calibration
from surgery.errors import InputError
from surgery.passes.evidence import HeldOut
from surgery.passes.metrics import drop_of
from surgery.plans.goal import Goal
from surgery.plans.plan import Plan
from tests.cases import decaying
from tests.covering import in_turns

KINDS = ("module", "graph", "program")
GOAL = Goal.error(0.2, cost="macs")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 40),
    )
    for parameter in model.parameters():
        parameter.data = decaying(parameter.data.double(), 0.6).float()
    return model.eval()


def samples(count: int = 160) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def opened(kind: str) -> Any:
    model = network()
    if kind == "graph":
        return torch.fx.symbolic_trace(model)
    if kind == "program":
        batch = torch.export.Dim("batch")
        return torch.export.export(model, (samples(4),), dynamic_shapes=({0: batch},))
    return model


@functools.cache
def kept(kind: str) -> surgery.DecomposeResult[Any]:
    """A model that keeps a promise, made once: do not change it."""
    return surgery.decompose(opened(kind), samples(4), calibration=samples(), ranks=GOAL)


def run(model: Any, x: Tensor) -> Tensor:
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    with torch.no_grad():
        return torch.cat([module(part) for part in x.split(4)])  # torch guards the batch size of some convolutions


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_error_is_kept_on_samples_never_seen(kind: str) -> None:
    model, result = opened(kind), kept(kind)
    assert result.promise is not None
    assert result.promise.kept
    assert result.after.macs < 0.8 * result.before.macs
    fresh = torch.randn(500, 3, 10, 10, generator=torch.Generator().manual_seed(2))
    before, after = run(model, fresh), run(result.model, fresh)
    assert float((after - before).norm() / before.norm()) <= 0.2
    back = surgery.recompose(result.model, samples(4))
    assert float((run(back.model, fresh) - after).norm() / after.norm()) <= 1e-5


def test_a_metric_falls_no_further_than_it_may() -> None:
    model, x = network(), samples()
    labels = run(model, x).argmax(1)

    def accuracy(module: nn.Module) -> float:
        return float((module(x).argmax(1) == labels).float().mean())

    result = surgery.decompose(model, x[:4], calibration=x, ranks=Goal.drop(0.1, accuracy, cost="macs"))
    assert result.promise is not None
    assert result.promise.kept
    assert result.search is not None
    assert result.search.metrics is not None
    assert result.search.metrics[0] == 1
    assert result.search.metrics[0] - result.search.metrics[1] == pytest.approx(result.promise.measured)
    assert accuracy(result.model) == pytest.approx(result.search.metrics[1])
    assert result.changes


def test_the_score_of_each_sample_makes_a_metric_hold_for_others() -> None:
    model, x = network(), samples(400)
    labels = run(model, x).argmax(1)

    def scores(module: nn.Module) -> Tensor:
        return (module(x).argmax(1) == labels).float()

    result = surgery.decompose(model, x[:4], calibration=x[:160], ranks=Goal.drop(0.1, scores, cost="macs"))
    assert result.promise is not None
    assert result.promise.kept
    assert result.changes
    drop = 1 - float(scores(result.model).mean())
    assert result.promise.measured == pytest.approx(drop)
    assert drop + 1.6 * (drop * (1 - drop) / len(x)) ** 0.5 <= 0.1
    fresh = samples(4000)[400:]
    wrong = run(result.model, fresh).argmax(1) != run(model, fresh).argmax(1)
    assert float(wrong.float().mean()) <= 0.1


@pytest.mark.parametrize("value", [float("nan"), torch.zeros(2, 2), torch.zeros(0)])
def test_a_metric_that_is_no_number_is_refused(value: Any) -> None:
    model, x = network(), samples(40)
    with pytest.raises(InputError, match="the metric returned"):
        surgery.decompose(model, x[:4], calibration=x, ranks=Goal.drop(0.1, lambda _: value, cost="macs"))


def test_a_promise_that_nothing_keeps_gives_the_original() -> None:
    model = network()
    result = surgery.decompose(model, samples(4), calibration=samples(), ranks=Goal.error(1e-9, cost="macs"))
    assert result.model is model
    assert not result.changes
    assert result.promise is not None
    assert result.promise.kept
    assert {skip.name: skip.reason for skip in result.skips}["3"].startswith("no change keeps the promise")


@pytest.mark.parametrize("kind", ["module", "graph"])
def test_a_model_can_be_changed_itself(kind: str) -> None:
    x, copied, model = samples(), kept(kind), opened(kind)
    result = surgery.decompose(model, samples(4), calibration=x, ranks=GOAL, inplace=True)
    assert result.model is model
    assert result.plan == copied.plan
    assert result.changes
    assert torch.equal(run(model, x), run(copied.model, x))


def test_given_ranks_are_fitted_to_the_data() -> None:
    model, x = network(), samples()
    plain = surgery.decompose(model, x[:4], ranks="keep_macs=0.4")
    fitted = surgery.decompose(model, x[:4], ranks="keep_macs=0.4", calibration=x)
    assert fitted.plan == plain.plan
    held = HeldOut(model, read_calibration(samples(300)[160:], model))
    assert held.error(fitted.model)[0] < held.error(plain.model)[0]


def test_the_upper_limit_is_above_the_error_and_falls_with_samples() -> None:
    model, x = network(), samples(400)
    other = surgery.decompose(model, x[:4], ranks="keep_macs=0.5").model
    few, many = (HeldOut(model, read_calibration(x[:n], model)).error(other) for n in (20, 400))
    assert few[0] < few[1]
    assert many[0] < many[1]
    assert many[1] - many[0] < few[1] - few[0]


def test_what_several_outputs_say_of_a_sample_is_not_several_samples() -> None:
    class Many(nn.Module):
        def __init__(self, model: nn.Module, count: int) -> None:
            super().__init__()
            self.model, self.count = model, count

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.model(x),) * self.count

    model, x = network(), samples(40)
    other = surgery.decompose(model, x[:4], ranks="keep_macs=0.5").model
    once, often = (
        HeldOut(Many(model, count), read_calibration(x, Many(model, count))).error(Many(other, count))
        for count in (1, 9)
    )
    assert often == pytest.approx(once)


def test_the_limit_holds_for_skewed_samples() -> None:
    """Squares of normal numbers: less than a hundredth of the limits is below the mean, as is asked for."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 48, generator=generator, dtype=torch.float64).square()
    limits = torch.tensor([drop_of(draw, torch.zeros_like(draw))[1] for draw in draws])
    assert float((limits < 1).double().mean()) < 0.01


def test_batch_norms_of_a_deep_network_are_corrected_together() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(8)]
    model = nn.Sequential(*blocks)
    for parameter in model.parameters():
        parameter.data = decaying(parameter.data.double(), 0.8).float()
    x = torch.randn(96, 16, 8, 8)
    model.train()
    for _ in range(30):
        model(x[:32])
    model.eval()
    factored = surgery.decompose(model, x[:4], ranks="energy=0.7").model
    samples = read_calibration(x[:64], model)

    def reach(network: nn.Module) -> Reference:
        watch = NormWatch()
        collect(network, samples, sites=(), also_watch=watch)
        return watch.reference

    reference = reach(model)
    reestimate_batch_norm(factored, samples, reference=reference)
    for name, seen in reach(factored).items():
        old, new = (network.get_buffer(f"{name}.running_var") for network in (model, factored))
        assert torch.allclose(seen.variance / new, reference[name].variance / old, rtol=0.05)


def test_batch_norms_of_what_was_not_changed_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in "1234"))
    x = torch.randn(48, 8, 5, 5)
    model.train()(x)
    samples = read_calibration(x + 1, model.eval(), batch_size=16)
    watch = NormWatch()
    collect(model, samples, sites=(), also_watch=watch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_batch_norm(model, samples, reference=watch.reference)
    assert all(torch.allclose(value, before[name], rtol=1e-6) for name, value in model.state_dict().items())


def test_auto_is_the_promise_of_an_output_error() -> None:
    assert Goal.error() == Goal.error(0.05)
    x = samples(40)
    found, same = (
        surgery.decompose(network(), x[:4], calibration=x, ranks=ranks)
        for ranks in (Goal.error(0.05, cost="macs"), Goal.error(cost="macs"))
    )
    assert found.plan == same.plan
    assert found.plan.ranks == "max_error=0.05"


@pytest.mark.parametrize(
    ("goal", "kind"),
    in_turns([GOAL, Goal.drop(0.5, lambda m: 1.0, cost="params")], KINDS),
    ids=str,
)
def test_the_plan_of_a_promise_gives_the_same_model_again(goal: Goal, kind: str) -> None:
    x = samples()
    known = goal is GOAL
    result = kept(kind) if known else surgery.decompose(opened(kind), samples(4), calibration=x, ranks=goal)
    assert result.changes
    again = surgery.decompose(opened(kind), samples(4), calibration=x, ranks=Plan.from_json(result.plan.to_json()))
    assert again.plan == result.plan
    assert again.seen == result.seen
    assert torch.equal(run(again.model, x), run(result.model, x))


class Heads(nn.Module):
    """Two layers that read the same value, of which the first has nothing to leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.first.weight.data = torch.linalg.qr(torch.randn(48, 48)).Q
        self.second.weight.data = decaying(torch.randn(48, 48, dtype=torch.float64), 0.6).float()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_the_plan_of_a_promise_gives_the_same_model_where_sites_read_the_same_value() -> None:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q * torch.linspace(1.5, 0.9, 48)
    x = torch.randn(160, 60, 48, generator=generator) @ mixing  # more positions than are used
    result = surgery.decompose(Heads().eval(), x[:4], calibration=x, ranks=Goal.error(0.1, cost="macs"))
    assert [change.site for change in result.changes] == ["second"]
    again = surgery.decompose(Heads().eval(), x[:4], calibration=x, ranks=result.plan)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_the_plan_of_a_promise_is_known_before_the_model() -> None:
    made = surgery.plan(network(), samples(4), ranks=GOAL, calibration=samples())
    assert made == kept("module").plan


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
def test_the_command_line_takes_data_and_prints_the_promise(tmp_path: Path) -> None:
    surgery.save(opened("program"), tmp_path / "model.pt2")
    np.savez(tmp_path / "inputs.npz", input=samples().numpy())
    words = [str(tmp_path / "model.pt2"), "--calibration", str(tmp_path / "inputs.npz"), "--max-error", "0.2"]
    done = CliRunner().invoke(command, [*words, "--cost", "macs", "--no-timing"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "output error at most 0.2: measured" in done.output
    assert (tmp_path / "model.decomposed.pt2").exists()
    with pytest.raises(InputError, match="--dry-run with calibration or a promise"):
        CliRunner().invoke(command, [*words, "--dry-run", "-o", str(tmp_path / "b.pt2")], catch_exceptions=False)
