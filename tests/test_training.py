"""The laws of training in low rank: what crosses the switch, what stays as it is, and what comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from surgery.algebra import relative_error
from surgery.training import LowRankTraining
from tests.tolerances import tolerance
from tests.training_cases import FULL, OPTIMIZERS, RANKS, Net, batch, make_run, train

EACH = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def counted(optimizer: Optimizer, model: nn.Module) -> None:
    """Each parameter of the model is in the optimizer exactly once, and nothing else is; so is its state."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in optimizer.state} <= set(held)


@EACH
def test_no_parameter_is_lost_or_doubled(optimizer: str) -> None:
    run = make_run(optimizer, recompose_at=2)
    model, kept = run.model, run.optimizer
    for epoch, phase in enumerate(["factored", "recomposed", "recomposed"]):
        train(run, seed=epoch)
        before = len(kept.param_groups)
        run.end_epoch(epoch)
        assert (run.phase, run.model is model, run.optimizer is kept) == (phase, True, True)
        assert len(kept.param_groups) == before
        counted(kept, model)
        for parameter in model.parameters():
            assert all(v.shape == parameter.shape for k, v in kept.state[parameter].items() if k != "step")
    assert [event.kind for event in run.history.events] == ["decompose", "recompose"]


def test_groups_keep_their_order_options_and_names() -> None:
    model = Net()
    decayed = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    rest = {n: p for n, p in model.named_parameters() if p.dim() == 1}
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.items()), "lr": 0.1, "weight_decay": 0.1},
        {"params": list(rest.items())},
    ]
    optimizer = SGD(groups, lr=0.2, momentum=0.5)
    scheduler = CosineAnnealingLR(optimizer, T_max=10)
    run = LowRankTraining(model, optimizer, batch()[0], decompose_at=1, ranks=RANKS, recompose_at=2)
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    for epoch in range(2):
        train(run)
        scheduler.step()
        run.end_epoch(epoch)
        by_name = dict(model.named_parameters())
        for group in optimizer.param_groups:
            assert [id(by_name[name]) for name in group["param_names"]] == [id(p) for p in group["params"]]
        if epoch == 0:
            firsts = optimizer.param_groups[0]["param_names"][:3]
            assert firsts == ["first.0.weight", "first.1.weight", "second.0.weight"]
    assert [list(group["param_names"]) for group in optimizer.param_groups] == names
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0]
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_schedulers_go_on_as_without_a_switch() -> None:
    rates = []
    for decompose_at in (2, 50):
        run = make_run(decompose_at=decompose_at, recompose_at=None)
        scheduler = OneCycleLR(run.optimizer, max_lr=0.1, total_steps=20)
        for epoch in range(5):
            for _ in range(3):
                train(run, steps=1)
                scheduler.step()
            run.end_epoch(epoch)
        rates.append((scheduler.get_last_lr(), [group["momentum"] for group in run.optimizer.param_groups]))
    assert rates[0] == rates[1]


def test_the_average_gradient_of_the_factors_is_the_chain_rule() -> None:
    """The moment that crosses is what the factors' own gradients would have averaged to."""
    run = make_run("adam", dtype=torch.float64, ranks={"hidden": 3}, decompose_at=1)
    train(run, steps=5)
    moment = run.optimizer.state[run.model.hidden.weight]["exp_avg"].clone()
    run.end_epoch(0)
    first, last = run.model.hidden[0].weight, run.model.hidden[1].weight
    allowed = tolerance(torch.float64, length=64, steps=2)
    assert relative_error(run.optimizer.state[last]["exp_avg"], moment @ first.detach().T) <= allowed
    assert relative_error(run.optimizer.state[first]["exp_avg"], last.detach().T @ moment) <= allowed


def test_the_velocity_of_the_product_goes_on_after_a_full_rank_switch() -> None:
    """A tiny step with a gradient of zero moves the product as it would have moved the weight."""
    run = make_run(dtype=torch.float64, ranks={"hidden": 8})
    train(run, steps=5)
    moment, rate = run.optimizer.state[run.model.hidden.weight]["momentum_buffer"].clone(), 1e-7
    run.end_epoch(0)
    for group in run.optimizer.param_groups:
        group.update(lr=rate, weight_decay=0.0, momentum=1.0)
    first, last = run.model.hidden[0].weight, run.model.hidden[1].weight
    before = (last @ first).detach()
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    assert relative_error((last @ first).detach() - before, -rate * moment) <= 1e-5


@EACH
def test_state_comes_back_from_full_rank(optimizer: str) -> None:
    """Down at full rank and up at once: first moments and counters as they were, second moments positive."""
    run = make_run(optimizer, dtype=torch.float64, ranks=FULL, recompose_at=2)
    train(run, steps=4)
    before = {n: copy.deepcopy(run.optimizer.state[p]) for n, p in run.model.named_parameters()}
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.end_epoch(0)
    run.end_epoch(1)
    for name, parameter in run.model.named_parameters():
        assert relative_error(parameter, weights[name]) <= tolerance(torch.float64, length=512, steps=8)
        for key, value in run.optimizer.state[parameter].items():
            if key in ("momentum_buffer", "exp_avg"):
                assert relative_error(value, before[name][key]) <= 1e-6
            elif key == "step":
                assert value == before[name][key]
            else:
                assert float(value.min()) >= 0
                assert 0.3 < float(value.mean() / before[name][key].mean()) < 3


def test_state_that_nobody_knows_starts_anew_and_is_told() -> None:
    model = Net()
    run = LowRankTraining(
        model, Adagrad(model.parameters()), batch()[0], decompose_at=1, ranks=RANKS, recompose_at=None
    )
    train(run)
    event = run.end_epoch(0)
    assert event is not None
    assert any("Adagrad's sum" in note for note in event.notes)
    train(run)
    counted(run.optimizer, model)


@pytest.mark.parametrize(
    "packed", [lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: nn.LSTM(8, 8)], ids=["attention", "lstm"]
)
def test_modules_with_packed_weights_stay_dense_and_keep_their_state(packed: Callable[[], nn.Module]) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed, self.head = packed(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attends = isinstance(self.packed, nn.MultiheadAttention)
            return self.head((self.packed(x, x, x, need_weights=False) if attends else self.packed(x))[0])

    model, x = Packed(), torch.randn(2, 3, 8)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    run = LowRankTraining(model, optimizer, x, decompose_at=1, ranks=3, recompose_at=2)
    for epoch in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        event = run.end_epoch(epoch)
        assert event is not None
        assert {change.site for change in event.changes} <= {"head"}
        assert type(model.packed) is type(packed())
        counted(optimizer, model)
        assert len(optimizer.state) == len(list(model.parameters()))


def test_frozen_parameters_stay_frozen_and_out() -> None:
    model = Net()
    model.second.weight.requires_grad_(False)
    model.first.bias.requires_grad_(False)
    before = model.second.weight.detach().clone()
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    run = LowRankTraining(model, optimizer, batch()[0], decompose_at=1, ranks=RANKS, recompose_at=2)
    for epoch in range(2):
        train(run)
        run.end_epoch(epoch)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"second.weight", "first.1.bias" if epoch == 0 else "first.bias"}
        assert torch.equal(model.second.weight, before)
    assert "does not train" in str(run.plan["second"].reason)


def test_the_original_class_takes_the_weights_and_gives_the_outputs_of_the_factors() -> None:
    run = make_run(dtype=torch.float64, recompose_at="end", epochs=3)
    for epoch in range(2):
        train(run, seed=epoch)
        run.end_epoch(epoch)
    train(run, seed=2)
    x = batch(torch.float64, seed=9)[0]
    factored = run.model.eval()(x).detach()
    event = run.end_epoch(2)
    assert event is not None
    assert event.kind == "recompose"
    original = Net().double()
    original.load_state_dict(run.model.state_dict(), strict=True)
    assert relative_error(original.eval()(x), factored) <= tolerance(torch.float64, length=512, steps=12)
    assert run.finish() is None


def test_finish_recomposes_where_the_number_of_epochs_is_not_known() -> None:
    with pytest.warns(UserWarning, match=r"finish\(\)"):
        run = make_run(recompose_at="end")
    train(run)
    run.end_epoch(0)
    assert run.phase == "factored"
    event = run.finish()
    assert event is not None
    assert (event.kind, run.phase) == ("recompose", "recomposed")
    assert run.history.events[-1] is event
    assert run.history.seconds >= event.seconds
    assert type(run.history).from_values(run.history.to_values()) == run.history


def test_ranks_are_lowered_on_the_way_where_they_fell() -> None:
    run = make_run("adamw", ranks="energy=0.7", decompose_at=(1, 2, 3), recompose_at=4)
    train(run)
    run.end_epoch(0)
    before = {decision.site: decision.macs for decision in run.plan if not decision.dense}
    for index, parameter in enumerate(run.model.parameters()):
        if parameter.dim() > 1:  # as if training had left one direction
            parameter.data = torch.ones_like(parameter) * 0.1 + 1e-3 * index
    outputs = run.model.eval()(batch(seed=3)[0]).detach()
    train(run, steps=1)
    event = run.end_epoch(1)
    assert event is not None
    assert event.kind == "redecompose"
    assert all((run.plan[site].macs or 0) <= (macs or 0) for site, macs in before.items())
    assert run.plan["second"].rank == (1, 1)
    assert outputs.shape == run.model(batch(seed=3)[0]).shape
    counted(run.optimizer, run.model)
    again = run.end_epoch(2)
    assert again is not None
    assert "no site needs less" in again.reason
    train(run, seed=5)
    run.end_epoch(3)
    Net().load_state_dict(run.model.state_dict(), strict=True)


def test_factors_are_balanced_and_batch_norm_is_untouched() -> None:
    run = make_run(dtype=torch.float64)
    train(run)
    before = {name: value.clone() for name, value in run.model.state_dict().items() if name.startswith("norm")}
    run.end_epoch(0)
    assert all(torch.equal(run.model.state_dict()[name], value) for name, value in before.items())
    for site in (run.model.first, run.model.second, run.model.hidden):
        norms = torch.stack([torch.linalg.vector_norm(layer.weight.detach()) for layer in site])
        assert float(norms.max() / norms.min()) < 1 + 1e-9
