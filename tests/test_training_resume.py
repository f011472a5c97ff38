"""A run that is stopped and resumed is the run that was not, bit for bit, wherever it was stopped."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from surgery.errors import InputError
from surgery.training import LowRankTraining
from tests.covering import in_turns
from tests.training_cases import OPTIMIZERS, RANKS, Net, batch, make_run, train

EPOCHS = 4


def fresh(optimizer: str, seed: int, *, channels_last: bool, **options: Any) -> tuple[LowRankTraining, Any]:
    torch.manual_seed(seed)
    model: nn.Module = Net()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    made = OPTIMIZERS[optimizer](model.parameters())
    settings: dict[str, Any] = {"decompose_at": 1, "recompose_at": 3, "ranks": RANKS, **options}
    run = LowRankTraining(model, made, batch()[0], **settings)
    return run, CosineAnnealingLR(made, T_max=EPOCHS)


def advance(run: LowRankTraining, scheduler: Any, first: int, last: int) -> None:
    for epoch in range(first, last):
        torch.manual_seed(epoch)  # dropout
        train(run, seed=epoch)
        scheduler.step()
        run.end_epoch(epoch, accuracy=0.1 * epoch)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as plain tensors and values: nothing pickled runs."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return bool(torch.equal(first, second)) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@pytest.mark.parametrize(
    ("how", "stop"),
    in_turns(
        [("sgd", False, {}), ("amsgrad", True, {}), ("adamw", False, {"frobenius_decay": True})],
        range(EPOCHS),
    ),
)
def test_a_resumed_run_is_the_same_run(how: tuple[str, bool, dict[str, Any]], stop: int) -> None:
    optimizer, channels_last, options = how
    whole, schedule = fresh(optimizer, 0, channels_last=channels_last, **options)
    advance(whole, schedule, 0, EPOCHS)

    part, schedule = fresh(optimizer, 0, channels_last=channels_last, **options)
    advance(part, schedule, 0, stop)
    state = saved({"run": part.state_dict(), "schedule": schedule.state_dict()})
    again, schedule = fresh(optimizer, 5, channels_last=channels_last, **options)
    part.finish()
    again.load_state_dict(state["run"])
    schedule.load_state_dict(state["schedule"])
    assert again.phase == state["run"]["phase"]
    advance(again, schedule, stop, EPOCHS)

    assert same(again.model.state_dict(), whole.model.state_dict())
    assert same(again.optimizer.state_dict(), whole.optimizer.state_dict())
    assert [row.phase for row in again.history] == [row.phase for row in whole.history]
    assert [row.accuracy for row in again.history] == [row.accuracy for row in whole.history]
    assert [event.kind for event in again.history.events] == ["decompose", "recompose"]
    assert again.history.events[0].changes == whole.history.events[0].changes


def test_a_factorization_that_fell_back_is_rebuilt_as_it_was() -> None:
    ranks = {"second": (6, 5)}
    run = make_run(ranks=ranks, factorization="tucker")
    train(run)
    run.end_epoch(0)
    again = make_run(ranks=ranks, factorization="tucker", seed=3)
    again.load_state_dict(saved(run.state_dict()))
    x = batch(seed=4)[0]
    assert torch.equal(again.model.eval()(x), run.model.eval()(x))


@pytest.mark.parametrize("factorization", ["spatial", "cp", "tt", "tr", "depthwise", "svd"])
def test_every_factorization_is_rebuilt(factorization: str) -> None:
    fits = {"second": 3, "hidden": 3} if factorization in ("svd", "cp") else {"second": 3}
    settings: dict[str, Any] = {"ranks": fits, "factorization": factorization}
    if factorization in ("tt", "tr"):
        settings["ranks"] = "keep_params=0.6"
    run = make_run(recompose_at=2, **settings)
    train(run)
    run.end_epoch(0)
    assert run.phase == "factored"
    again = make_run(recompose_at=2, seed=3, **settings)
    again.load_state_dict(saved(run.state_dict()))
    for each in (run, again):
        torch.manual_seed(0)
        train(each, seed=1)
        each.end_epoch(1)
    assert same(again.model.state_dict(), run.model.state_dict())
    assert same(again.optimizer.state_dict(), run.optimizer.state_dict())


def test_a_state_of_something_else_is_refused() -> None:
    run = make_run()
    with pytest.raises(InputError):
        run.load_state_dict({"model": {}})
    train(run)
    run.end_epoch(0)
    state = run.state_dict()
    with pytest.raises(InputError):
        run.load_state_dict(state)
    torch.manual_seed(0)
    other = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    settings: dict[str, Any] = {"decompose_at": 1, "ranks": 3, "recompose_at": None}
    wrong = LowRankTraining(other, torch.optim.SGD(other.parameters(), lr=0.1), batch()[0], **settings)
    with pytest.raises(InputError):
        wrong.load_state_dict(state)
