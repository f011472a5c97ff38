"""ADMM: its gradient is that of the penalty, weights come near their rank, and what follows loses less."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import surgery
from surgery.algebra import relative_error
from surgery.errors import InputError
from surgery.training.admm import ADMM
from tests.covering import in_turns
from tests.tolerances import assert_close, tolerance
from tests.training_cases import OPTIMIZERS, Net, batch, loss_of
from tests.two_processes import WORLD, together, two_processes

RANKS = {"tucker": {"second": (4, 3)}, "svd": {"hidden": 3}, "tt": {"second": (3, 4, 3)}, "tr": {"second": 2}}


def make(
    factorization: str = "auto", *, optimizer: str = "sgd", dtype: torch.dtype = torch.float32, **options: Any
) -> ADMM:
    torch.manual_seed(0)
    model = Net(drop=0.0).to(dtype)
    arguments = {"ranks": RANKS.get(factorization, {"second": (4, 3), "hidden": 3}), **options}
    made = OPTIMIZERS[optimizer](model.parameters())
    return ADMM(
        model, made, arguments.pop("ranks"), example_inputs=batch(dtype)[0], factorization=factorization, **arguments
    )


def train(run: ADMM, first: int, last: int, *, steps: int = 4) -> None:
    dtype = next(run.model.parameters()).dtype
    for epoch in range(first, last):
        for step in range(steps):
            run.optimizer.zero_grad()
            loss_of(run.model, batch(dtype, seed=10 * epoch + step)).backward()
            run.optimizer.step()
        run.end_epoch(epoch)


def gaps(run: ADMM) -> list[tuple[nn.Parameter, Tensor]]:
    """The weights, and ``Z - U`` as the state has them."""
    state = run.state_dict()
    names = state["targets"]
    return [(run.model.get_submodule(n).weight, state["targets"][n] - state["duals"][n]) for n in names]  # type: ignore[misc]


@settings(max_examples=10, deadline=None)
@given(rho=st.floats(1e-4, 10.0), factorization=st.sampled_from(sorted(RANKS)), epochs=st.integers(0, 2))
def test_a_step_follows_the_penalty_too(rho: float, factorization: str, epochs: int) -> None:
    """SGD on the loss under ADMM is SGD on the loss plus the penalty, weight decay and momentum included."""
    run = make(factorization, dtype=torch.float64, rho=rho)
    run.optimizer.param_groups[0]["lr"] = 1e-3
    train(run, 0, epochs)
    model = copy.deepcopy(run.model)
    plain = OPTIMIZERS["sgd"](model.parameters())
    plain.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    data = batch(torch.float64, seed=99)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    pairs = [(model.get_parameter(names[id(weight)]), wanted) for weight, wanted in gaps(run)]
    penalty = torch.stack([(weight - wanted).square().sum() for weight, wanted in pairs]).sum() * run.rho / 2
    assert run.penalty() == pytest.approx(float(penalty.detach()), rel=1e-12, abs=1e-30)
    for each, on, loss in ((plain, model, penalty), (run.optimizer, run.model, 0)):
        each.zero_grad()
        (loss_of(on, data) + loss).backward()
        each.step()
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        assert_close(ours, theirs, tolerance(torch.float64, length=1000, steps=10))


def test_a_closure_gets_the_penalty_after_its_gradients() -> None:
    plain, closed = (make(dtype=torch.float64, rho=1.0) for _ in range(2))
    data = batch(torch.float64)

    def closure() -> Tensor:
        closed.optimizer.zero_grad()
        loss = loss_of(closed.model, data)
        loss.backward()
        return loss

    step_of: Callable[..., object] = closed.optimizer.step  # torch says that a closure gives a float
    for step in range(4):
        plain.optimizer.zero_grad()
        loss = loss_of(plain.model, data)
        loss.backward()
        plain.optimizer.step()
        same = step_of(closure) if step % 2 else step_of(closure=closure)
        assert torch.equal(torch.as_tensor(same), loss)
        for run in (plain, closed):
            run.end_epoch(step)
    assert all(map(torch.equal, plain.model.parameters(), closed.model.parameters()))


@pytest.mark.parametrize(("factorization", "optimizer"), in_turns(sorted(RANKS), ["sgd", "adamw"]))
def test_weights_come_near_their_rank(factorization: str, optimizer: str) -> None:
    """The residual falls, and what finish() makes is nearer to the weights than without ADMM."""
    run, plain = (make(factorization, optimizer=optimizer, rho=rho, epochs=25) for rho in (0.05, 1e-12))
    data = batch(size=64)
    for each in (run, plain):
        each.optimizer.param_groups[0]["lr"] = 0.05 if optimizer == "sgd" else 0.01
        for epoch in range(12):
            for _ in range(10):
                each.optimizer.zero_grad()
                loss_of(each.model, data).backward()
                each.optimizer.step()
            each.end_epoch(epoch)
    first, last = run.residuals[0], run.residuals[-1]
    assert all(last[name] < 0.6 * first[name] for name in first)
    result, without = run.finish(), plain.finish()
    assert {change.site: (change.factorization, change.rank) for change in result.changes} == {
        d.site: (d.factorization, d.rank) for d in run.plan if not d.dense
    }
    for ours, theirs in zip(result.changes, without.changes, strict=True):
        assert ours.error < 0.75 * theirs.error
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in run.model.parameters())
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
    assert result.model(batch()[0]).shape == (12, 3)


def test_an_update_is_the_projection_and_the_dual_step() -> None:
    run = make("svd", dtype=torch.float64)
    (constraint,) = run.constraints
    assert torch.equal(constraint.target, constraint.weight.detach())
    for epoch in range(3):
        wanted = constraint.weight.detach() + constraint.dual
        train(run, epoch, epoch, steps=0)
        run.end_epoch(epoch)
        u, s, v = torch.linalg.svd(wanted)
        assert relative_error(constraint.target, u[:, :3] * s[:3] @ v[:3]) <= tolerance(
            torch.float64, length=64, steps=20
        )
        assert_close(constraint.dual, wanted - constraint.target, tolerance(torch.float64, length=4))
    assert len(run.residuals) == 3


def test_rho_grows_late_and_keeps_the_multiplier() -> None:
    run = make(rho=0.02, epochs=20)
    rhos = []
    for epoch in range(20):
        train(run, epoch, epoch + 1, steps=1)
        rhos.append(run.rho)
    assert rhos == [0.02] * 16 + [pytest.approx(0.1)] * 4
    late = make(rho=0.02, epochs=1)
    late.constraints[0].weight.data.mul_(2)
    wanted = late.constraints[0].weight.detach().clone()
    late.end_epoch(0)
    multiplier = 0.02 * (wanted - late.constraints[0].target)
    assert relative_error(late.rho * late.constraints[0].dual, multiplier) <= tolerance(torch.float32, steps=4)


@pytest.mark.law(3)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_is_the_same_run(optimizer: str, every: int | None, stop: int) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "rho": 0.1, "every": every, "epochs": 4}
    whole, part, again = (make(**options) for _ in range(3))
    train(whole, 0, 6)
    train(part, 0, stop)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    train(again, 7, 8)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(again, stop, 6)
    assert all(map(torch.equal, again.model.state_dict().values(), whole.model.state_dict().values()))
    assert again.residuals == whole.residuals
    assert again.rho == whole.rho
    assert [c.error for c in again.finish().changes] == [c.error for c in whole.finish().changes]


def test_updates_leave_the_random_state_alone() -> None:
    run = make("tr")
    before = torch.get_rng_state()
    run.end_epoch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gradient_scaler_does_not_scale_the_penalty() -> None:
    plain, scaled = (make(dtype=torch.float64, rho=1.0) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        for run in (plain, scaled):
            run.optimizer.zero_grad()
        loss_of(plain.model, batch(torch.float64, seed=step)).backward()
        plain.optimizer.step()
        scaler.scale(loss_of(scaled.model, batch(torch.float64, seed=step))).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        for run in (plain, scaled):
            run.end_epoch(step)
    for ours, theirs in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        assert_close(ours, theirs, tolerance(torch.float64, length=1000, steps=10))


def work(rank: int, folder: Path) -> None:
    """One process, on its own half of each batch."""
    torch.manual_seed(rank)
    model = DistributedDataParallel(Net(drop=0.0))
    run = ADMM(model, OPTIMIZERS["adamw"](model.parameters()), "keep_params=0.6", example_inputs=batch()[0], rho=0.1)
    for epoch in range(2):
        for step in range(2):
            run.optimizer.zero_grad()
            loss_of(run.model, batch(seed=100 * rank + 10 * epoch + step)).backward()
            run.optimizer.step()
        run.end_epoch(epoch)
    torch.save({**run.state_dict(), "small": run.finish().model.state_dict()}, folder / f"{rank}.pt")


@two_processes
def test_distributed_processes_stay_alike(tmp_path: Path) -> None:
    together(work, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first["plan"] == second["plan"]
    for key in ("model", "targets", "duals", "small"):
        alike = {name: torch.equal(value, second[key][name]) for name, value in first[key].items()}
        assert all(same for name, same in alike.items() if "running" not in name)  # each has statistics of its own


def test_a_compiled_model_is_seen_through() -> None:
    torch.manual_seed(0)
    model = Net(drop=0.0)
    wrapped: Any = torch.compile(model, backend="eager")
    run = ADMM(wrapped, OPTIMIZERS["sgd"](wrapped.parameters()), {"hidden": 3}, example_inputs=batch()[0])
    train(run, 0, 1)
    assert run.model is wrapped
    assert [change.site for change in run.finish().changes] == ["hidden"]


def test_a_frozen_weight_stays_dense_with_the_reason() -> None:
    torch.manual_seed(0)
    model = Net()
    model.second.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    run = ADMM(model, optimizer, {"second": (4, 3), "hidden": 3}, example_inputs=batch()[0])
    assert [constraint.name for constraint in run.constraints] == ["hidden"]
    assert "trains no parameter" in str(run.plan["second"].reason)
    run.optimizer.step()  # no gradient but the penalty's
    assert model.second.weight.grad is None


@pytest.mark.parametrize("ranks", ["keep_params=0.5", "energy=0.8", 3, {"hid*": 2}])
def test_ranks_are_those_of_a_plan(ranks: Any) -> None:
    run = make(ranks=ranks)
    plan = surgery.plan(run.model, batch()[0], ranks=ranks)
    assert [(d.site, d.factorization, d.rank) for d in run.plan] == [(d.site, d.factorization, d.rank) for d in plan]
    assert [c.name for c in run.constraints] == [d.site for d in plan if not d.dense]


def test_wrong_arguments_are_one_clear_error() -> None:
    for options in ({"rho": 0}, {"rho": float("inf")}, {"epochs": 0}, {"every": 1.5}, {"ranks": {"nowhere": 3}}):
        with pytest.raises(InputError):
            make(**options)
    with pytest.raises(InputError, match="nothing to constrain"):
        make(ranks={"hidden": None})
    for factorization in ("cp", "nothing"):
        with pytest.raises(InputError, match="projection"):
            make(factorization)
    model = Net()
    fused = SGD(model.parameters(), lr=0.1, fused=True)
    with pytest.raises(InputError, match="fused"):
        ADMM(model, fused, 3, example_inputs=batch()[0])
    run = make()
    with pytest.raises(InputError, match="not a state"):
        run.load_state_dict({"model": {}})
    state = run.state_dict()
    other = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(128, 8))
    wrong = ADMM(other, SGD(other.parameters(), lr=0.1), 3, example_inputs=batch()[0])
    with pytest.raises(InputError, match="other sites"):
        wrong.load_state_dict(state)


def test_a_weight_that_is_stored_transposed_and_packed_attention() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up = conv1d(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 5, 8)
    ranks = {"up": 3, "attention.in_proj_q": 2}
    run = ADMM(model, SGD(model.parameters(), lr=0.1), ranks, example_inputs=x, factorization="svd")
    assert [constraint.name for constraint in run.constraints] == ["up"]
    run.end_epoch(0)
    u, s, v = torch.linalg.svd(model.up.weight.detach())
    best = u[:, :3] * s[:3] @ v[:3]
    assert relative_error(run.constraints[0].target, best) <= tolerance(torch.float32, length=64, steps=20)
    assert [change.site for change in run.finish().changes] == ["up"]
