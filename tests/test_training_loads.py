"""States of the dense model are loaded exactly at any time of a run; what is due waits where it is asked to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.training import History, LowRankTraining
from tests.training_cases import Net, batch, make_run, train

State = dict[str, Tensor]


def plain(root: nn.Module, state: State) -> None:
    root.load_state_dict(state)


def not_strict(root: nn.Module, state: State) -> None:
    root.load_state_dict(state, strict=False)


def assigned(root: nn.Module, state: State) -> None:
    root.load_state_dict(state, assign=True)


def in_shards(root: nn.Module, state: State) -> None:
    for name, value in state.items():
        root.load_state_dict({name: value}, strict=False)


def from_above(root: nn.Module, state: State) -> None:
    whole = nn.ModuleDict({"above": nn.ModuleList([root])})
    whole.load_state_dict({f"above.0.{name}": value for name, value in state.items()})


def compiled(root: nn.Module, state: State) -> None:
    wrapped: Any = torch.compile(root, backend="eager")
    wrapped.load_state_dict({f"_orig_mod.{name}": value for name, value in state.items()})


LOADS = [plain, not_strict, assigned, in_shards, from_above, compiled]


def factored(optimizer: str = "adamw", **options: Any) -> tuple[LowRankTraining, State]:
    """A run in factors, and the state of its dense model of before."""
    run = make_run(optimizer, **{"recompose_at": "end", "epochs": 6, **options})
    train(run)
    state = copy.deepcopy(run.model.state_dict())
    run.end_epoch(0)
    train(run)
    assert run.phase == "factored"
    return run, state


@pytest.mark.parametrize("load", LOADS)
def test_a_dense_state_is_loaded_exactly_while_the_model_is_factored(load: Callable[..., None]) -> None:
    run, state = factored()
    load(run.model, state)
    assert run.phase == "recomposed"
    got = run.model.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], value) for name, value in state.items())
    assert [event.kind for event in run.history.events] == ["decompose", "recompose"]
    assert "dense model is loaded" in run.history.events[1].reason
    assert History.from_values(run.history.to_values()) == run.history
    if load is not assigned:  # which gives the module parameters that no optimizer has, as always
        held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in run.model.parameters())
        train(run)
    assert run.end_epoch(1) is None
    assert run.finish() is None


def test_the_state_of_the_factors_is_loaded_into_them() -> None:
    run, _ = factored()
    state = copy.deepcopy(run.model.state_dict())
    train(run, seed=3)
    run.model.load_state_dict(state)
    assert run.phase == "factored"
    assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())
    run.finish()


def test_a_state_without_the_factored_sites_changes_nothing_else() -> None:
    run, state = factored()
    run.model.load_state_dict({name: value for name, value in state.items() if name.startswith("head")}, strict=False)
    assert run.phase == "factored"
    assert torch.equal(run.model.get_parameter("head.weight"), state["head.weight"])
    run.finish()


def test_copies_of_a_model_know_nothing_of_its_run() -> None:
    """A copy of a bound method would copy the run; a pickle would have all of it."""
    run, state = factored()
    for other in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        other.load_state_dict(state, strict=False)
        assert run.phase == "factored"
        assert other.state_dict().keys() == run.model.state_dict().keys()
    run.finish()
    assert not run.model._load_state_dict_pre_hooks
    run.model.load_state_dict(state)


def test_a_switch_waits_for_the_next_epoch_and_for_a_resumed_run() -> None:
    """What is saved between an epoch and the switch after it goes on to the same end."""
    runs = [make_run("adamw", recompose_at=2), make_run("adamw", recompose_at=2, seed=4)]
    train(runs[0])
    runs[0].note_epoch(0)
    assert runs[0].phase == "dense"
    runs[1].load_state_dict(copy.deepcopy(runs[0].state_dict()))
    for run in runs:
        event = run.begin_epoch()
        assert event is not None
        assert event is run.history[0].event
        assert (event.kind, run.phase) == ("decompose", "factored")
        assert run.begin_epoch() is None
        torch.manual_seed(0)
        train(run)
        run.end_epoch(1)
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("recompose_at", "phase"), [("end", "dense"), (None, "factored")])
def test_a_switch_that_the_end_would_undo_is_left_out(recompose_at: Any, phase: str) -> None:
    run = make_run(recompose_at=recompose_at, epochs=1)
    train(run)
    before = copy.deepcopy(run.model.state_dict())
    run.note_epoch(0)
    run.finish()
    assert run.phase == phase
    if phase == "dense":
        assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_what_is_between_epochs_is_in_no_row() -> None:
    run = make_run(recompose_at=2)
    for epoch in range(2):
        run.begin_epoch()
        train(run)
        run.leave_out(0.0)
        run.note_epoch(epoch)
        run.leave_out(-1000.0)  # as if an evaluation took so long
    assert run.history.seconds < 100
    run.finish()


def test_dense_states_are_those_that_the_factors_compose_to() -> None:
    run, state = factored()
    copied = Net()
    copied.load_state_dict(run.dense_state(run.model), strict=True)
    x = batch(seed=2)[0]
    assert torch.allclose(copied.eval()(x), run.model.eval()(x), atol=1e-5)
    assert run.dense_state(run.model).keys() == state.keys()
    assert run.phase == "factored"
    run.finish()
