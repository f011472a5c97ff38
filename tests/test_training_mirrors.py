"""Averages of the weights go along: near their own weights at a switch, and averaged on after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import surgery
from surgery.algebra import relative_error
from surgery.errors import InputError
from surgery.training import LowRankTraining
from tests.covering import ALL
from tests.training_cases import OPTIMIZERS, Net, batch, loss_of, make_run, train

RANKS: dict[str, int | tuple[int, ...] | None] = {"first": (4, 2), "second": (4, 3), "hidden": 3}
Update = Callable[[nn.Module], None]


def averaged(average: AveragedModel) -> tuple[nn.Module, nn.Module, Update]:
    return average, average.module, average.update_parameters


def by_hand(decay: float) -> Callable[[nn.Module], tuple[nn.Module, nn.Module, Update]]:
    def make(model: nn.Module) -> tuple[nn.Module, nn.Module, Update]:
        mine = copy.deepcopy(model).requires_grad_(False)

        def update(current: nn.Module) -> None:
            for own, new in zip(mine.parameters(), current.parameters(), strict=True):
                own.lerp_(new.detach(), 1 - decay)

        return mine, mine, update

    return make


def kept_by_torch(decay: float | None, *, buffers: bool) -> Callable[[nn.Module], Any]:
    rule = None if decay is None else get_ema_multi_avg_fn(decay)
    return lambda model: averaged(AveragedModel(model, multi_avg_fn=rule, use_buffers=buffers))


AVERAGES = {
    "ema": kept_by_torch(0.9, buffers=False),
    "slow-ema-with-buffers": kept_by_torch(0.99, buffers=True),
    "swa": kept_by_torch(None, buffers=False),
    "swa-with-buffers": kept_by_torch(None, buffers=True),
    "by-hand": by_hand(0.9),
}


def weights_of(root: nn.Module, *, into: nn.Module) -> dict[str, Tensor]:
    """The dense weights of a network: a copy of it is recomposed."""
    dense = surgery.recompose(root, batch()[0]).model
    into.load_state_dict(dense.state_dict(), strict=True)
    return {name: value.detach().clone() for name, value in into.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor], site: str) -> float:
    return float(torch.linalg.vector_norm((one[f"{site}.weight"] - other[f"{site}.weight"]).double()))


@pytest.mark.parametrize("kind", AVERAGES if ALL else ["slow-ema-with-buffers", "swa", "by-hand"])
def test_an_average_is_averaged_on_across_all_switches(kind: str) -> None:
    """The learning rate is high, so that the average lags far behind."""
    torch.manual_seed(0)
    model = Net(drop=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    outer, inner, update = AVERAGES[kind](model)
    settings: dict[str, Any] = {"decompose_at": (1, 2), "recompose_at": 3}
    run = LowRankTraining(model, optimizer, batch()[0], ranks=RANKS, **settings)
    run.mirror(outer)
    for epoch in range(4):
        for seed in range(20):
            train(run, steps=1, seed=seed)
            update(run.model)
        before = weights_of(inner, into=Net(drop=0.0))
        event = run.end_epoch(epoch)
        assert (event.kind if event else None) == ["decompose", "redecompose", "recompose", None][epoch]
        now, models = weights_of(inner, into=Net(drop=0.0)), weights_of(model, into=Net(drop=0.0))
        for site in RANKS:
            if epoch < 2:  # its factors are no farther from its weights than the model's, from which they started
                assert distance(now, before, site) <= distance(models, before, site) * (1 + 1e-5)
            else:
                assert distance(now, before, site) <= 1e-5 * torch.linalg.vector_norm(before[f"{site}.weight"])
        assert float(loss_of(outer.train(), batch(seed=3)).detach()) < 1.5
        assert max(float(p.detach().abs().max()) for p in inner.parameters()) < 10
    if "swa" not in kind:
        for _ in range(1000):
            update(run.model)
        models = dict(model.named_parameters())
        assert all(relative_error(mine, models[name]) <= 1e-3 for name, mine in inner.named_parameters())


def test_an_average_may_have_another_dtype() -> None:
    run = make_run("adamw", recompose_at=2)
    average = AveragedModel(run.model).double()
    run.mirror(average)
    for epoch, sites in enumerate((7, 4)):
        train(run)
        average.update_parameters(run.model)
        run.end_epoch(epoch)
        average.update_parameters(run.model)
        assert len([parameter for parameter in average.parameters() if parameter.dim() > 1]) == sites + (epoch == 0)
        assert all(parameter.dtype == torch.float64 for parameter in average.parameters())


def test_what_is_no_copy_is_no_mirror() -> None:
    run = make_run()
    for other in (Net(16), nn.Linear(2, 2), run.model):
        with pytest.raises(InputError, match="copy"):
            run.mirror(other)
    twice = copy.deepcopy(run.model)
    run.mirror(twice)
    run.mirror(AveragedModel(run.model))
    run.mirror(twice)
    assert len(run.roots) == 3


def test_an_average_that_is_no_number_breaks_nothing() -> None:
    torch.manual_seed(0)
    model = Net()
    run = LowRankTraining(
        model, OPTIMIZERS["sgd"](model.parameters()), batch()[0], decompose_at=1, ranks=RANKS, recompose_at=None
    )
    average = AveragedModel(model)
    with torch.no_grad():
        average.module.hidden.weight.fill_(float("nan"))
    run.mirror(average)
    train(run)
    run.end_epoch(0)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    factors = [parameter for name, parameter in average.module.named_parameters() if name.startswith("hidden")]
    assert len(factors) == 3
