"""What a run leaves alone, refuses or warns of: frozen weights, hooked gradients, optimizers with their own lists."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from surgery.errors import InputError
from surgery.training import ADMM, LowRankTraining
from surgery.training.optimizer import check_lists
from tests.covering import in_turns
from tests.training_cases import RANKS, Net, batch, make_run, train

# --- weights that do not train


def by_flag(model: Net) -> list[nn.Parameter]:
    model.second.requires_grad_(False)
    return list(model.parameters())


def by_absence(model: Net) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter is not model.second.weight]


SPECS: list[Any] = [RANKS, "keep_params=0.6", "energy=0.8", 3]


@pytest.mark.parametrize(("ranks", "frozen"), in_turns(SPECS, [by_flag, by_absence]))
def test_a_weight_that_does_not_train_stays_as_it_is(frozen: Any, ranks: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = SGD(frozen(model), lr=0.05, momentum=0.9)
    before, weight = model.second.weight.detach().clone(), model.second.weight
    settings: dict[str, Any] = {"decompose_at": (1, 2), "recompose_at": 3}
    run = LowRankTraining(model, optimizer, batch()[0], ranks=ranks, **settings)
    for epoch, kind in enumerate(("decompose", "redecompose", "recompose")):
        train(run)
        event = run.end_epoch(epoch)
        assert event is not None
        assert event.kind == kind
        assert model.second.weight is weight
        assert torch.equal(model.second.weight, before)
        assert "does not train" in str(run.plan["second"].reason)
        assert any(not decision.dense for decision in run.plan)
    assert any("second: its weight does not train" in note for note in run.history.events[0].notes)


def test_where_nothing_trains_nothing_is_factored() -> None:
    torch.manual_seed(0)
    model = Net().requires_grad_(False)
    model.norm.requires_grad_(True)
    run = LowRankTraining(
        model, SGD(model.norm.parameters(), lr=0.1), batch()[0], decompose_at=1, ranks="keep_macs=0.5", epochs=3
    )
    train(run)
    event = run.end_epoch(0)
    assert event is not None
    assert event.kind == "stay"
    assert "nothing can be trained in factors; first: its weight does not train" in event.reason


def test_what_is_frozen_in_mid_run_stays_composed() -> None:
    run = make_run(decompose_at=(1, 2), recompose_at=3)
    train(run)
    run.end_epoch(0)
    run.model.hidden.requires_grad_(False)
    x = batch(seed=5)[0]
    before = run.model.eval()(x).detach()
    event = run.end_epoch(1)
    assert event is not None
    assert "does not train" in str(run.plan["hidden"].reason)
    assert torch.allclose(run.model.eval()(x), before, atol=1e-5)
    frozen = run.model.get_parameter("hidden.weight").detach().clone()
    train(run)
    run.end_epoch(2)
    assert torch.equal(run.model.get_parameter("hidden.weight"), frozen)
    assert not run.model.hidden.weight.requires_grad


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_flags_of_weight_and_bias_are_kept_apart_both_ways(trained: str) -> None:
    torch.manual_seed(0)
    model = Net()
    for name, parameter in model.hidden.named_parameters():
        parameter.requires_grad_(name == trained)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = LowRankTraining(model, optimizer, batch()[0], decompose_at=1, ranks=RANKS, recompose_at=2)
    before = {name: value.clone() for name, value in model.hidden.state_dict().items()}
    for epoch in range(2):
        train(run)
        run.end_epoch(epoch)
    assert {name for name, p in model.hidden.named_parameters() if p.requires_grad} == {trained}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    other = "bias" if trained == "weight" else "weight"
    assert torch.equal(getattr(model.hidden, other), before[other])
    assert not torch.equal(getattr(model.hidden, trained), before[trained])


# --- gradients with hooks


def step_in_backward(model: Net) -> None:
    steps = {parameter: SGD([parameter], lr=0.05) for parameter in model.parameters()}

    def act(parameter: Tensor) -> None:
        steps[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(act)


def scale_gradients(model: Net) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)


def scale_one(model: Net) -> None:
    model.second.weight.register_hook(lambda gradient: 2 * gradient)


@pytest.mark.parametrize("hang", [step_in_backward, scale_gradients, scale_one])
@pytest.mark.parametrize("ranks", SPECS, ids=str)
def test_a_weight_with_a_hook_on_its_gradient_stays_dense_and_trains(hang: Callable[[Net], None], ranks: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    hang(model)
    run = LowRankTraining(
        model, SGD(model.parameters(), lr=0.05), batch()[0], decompose_at=1, ranks=ranks, recompose_at=None
    )
    train(run)
    event = run.end_epoch(0)
    assert event is not None
    assert event.kind == ("decompose" if hang is scale_one else "stay")
    assert "second: its weight has a hook on its gradient" in repr(event)
    before = model.second.weight.detach().clone()
    train(run)
    assert not torch.equal(model.second.weight, before)


def test_admm_leaves_such_weights_alone_too() -> None:
    torch.manual_seed(0)
    model = Net()
    model.first.requires_grad_(False)
    scale_one(model)
    run = ADMM(model, SGD(model.parameters(), lr=0.05), {"first": (4, 2), "hidden": 3}, example_inputs=batch()[0])
    assert [constraint.name for constraint in run.constraints] == ["hidden"]
    assert "does not train" in str(run.plan["first"].reason)


# --- optimizers with lists of their own


class Around(Optimizer):
    """An optimizer around another, as Lookahead and SAM are."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)


class OwnList(SGD):
    """An optimizer that keeps its parameters where nobody looks."""

    def __init__(self, parameters: Any, *, keep: Callable[[list[nn.Parameter]], Any]) -> None:
        super().__init__(parameters, lr=0.1)
        self.kept = keep([parameter for group in self.param_groups for parameter in group["params"]])


class Helper:
    """An object of an optimizer that has its parameters."""

    def __init__(self, held: list[nn.Parameter]) -> None:
        self.rows = [{"held": tuple(held)}]


LISTS: dict[str, Callable[[Any], Optimizer]] = {
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters),
    "around": Around,
    "list": lambda parameters: OwnList(parameters, keep=list),
    "by-id": lambda parameters: OwnList(parameters, keep=lambda held: {id(p): k for k, p in enumerate(held)}),
    "flat": lambda parameters: OwnList(parameters, keep=lambda held: torch.cat([p.detach().flatten() for p in held])),
    "helper": lambda parameters: OwnList(parameters, keep=Helper),
    "method": lambda parameters: OwnList(parameters, keep=lambda held: SGD(held, lr=0.1).step),
    "module": lambda parameters: OwnList(parameters, keep=nn.ParameterList),
}


@pytest.mark.parametrize("name", LISTS)
def test_an_optimizer_with_a_list_of_its_own_is_refused_at_the_start(name: str) -> None:
    model = Net()
    optimizer = LISTS[name](model.parameters())
    with pytest.raises(InputError, match=type(optimizer).__name__) as caught:
        LowRankTraining(model, optimizer, batch()[0], decompose_at=1, ranks=RANKS, recompose_at=None)
    assert "\n" not in str(caught.value)
    assert not model._load_state_dict_pre_hooks


def torch_optimizers() -> Iterator[str]:
    for name in sorted(vars(torch.optim)):
        kind = getattr(torch.optim, name)
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind not in (Optimizer, torch.optim.LBFGS):
            yield name


@pytest.mark.parametrize("name", list(torch_optimizers()))
def test_all_other_optimizers_of_torch_go_on_training(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 6, bias=False))
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)  # which patches its step
    check_lists(optimizer)
    if name == "SparseAdam":
        return  # for sparse gradients only
    run = LowRankTraining(model, optimizer, torch.randn(4, 6), decompose_at=1, ranks=3, recompose_at=2)
    for epoch in range(3):
        for _ in range(2):
            optimizer.zero_grad()
            before = [parameter.detach().clone() for parameter in model.parameters()]
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
            moved = [not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True)]
            assert all(moved)
        run.end_epoch(epoch)
    assert run.phase == "recomposed"


# --- ends


def test_a_run_whose_end_is_not_known_warns_at_once_in_one_line() -> None:
    with pytest.warns(UserWarning, match=r"finish\(\)") as caught:
        run = make_run(recompose_at="end")
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename.endswith("training_cases.py")
    train(run)
    run.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_run(recompose_at="end", epochs=3)
        make_run(recompose_at=2)
        make_run(recompose_at=None)


def dropped(*, finish: bool, **options: Any) -> list[str]:
    """What is said when a run is dropped while its model is factored, and model and optimizer live on."""
    run = make_run(**options)
    model, optimizer = run.model, run.optimizer
    train(run)
    run.end_epoch(0)
    if finish:
        run.finish()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del run
        gc.collect()
    assert len(list(model.parameters())) >= len(optimizer.param_groups)
    return [str(warning.message) for warning in caught if "LowRankTraining" in str(warning.message)]


@pytest.mark.parametrize("recompose_at", ["end", 3])
def test_a_run_that_is_dropped_while_factored_warns_once(recompose_at: Any) -> None:
    said = dropped(finish=False, recompose_at=recompose_at, epochs=5)
    assert len(said) == 1
    assert "finish()" in said[0]
    assert not dropped(finish=True, recompose_at=recompose_at, epochs=5)


def test_a_run_that_is_to_stay_factored_does_not_warn() -> None:
    assert not dropped(finish=False, recompose_at=None)
