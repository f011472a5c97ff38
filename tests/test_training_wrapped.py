"""Training in low rank under torch.compile and DistributedDataParallel."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from surgery.algebra import relative_error
from surgery.training import LowRankTraining
from surgery.training.wrappers import unwrap
from tests.tolerances import tolerance
from tests.training_cases import OPTIMIZERS, RANKS, Net, batch, loss_of, train
from tests.two_processes import WORLD, together, two_processes


def compiled_run() -> LowRankTraining:
    torch.manual_seed(0)
    model = Net(drop=0.0).double()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    wrapped: Any = torch.compile(model, backend="eager")
    return LowRankTraining(wrapped, optimizer, batch(torch.float64)[0], decompose_at=1, ranks=RANKS, recompose_at=2)


def test_a_compiled_model_is_compiled_again() -> None:
    run = compiled_run()
    wrapped = run.model
    torch.manual_seed(0)
    plain = Net(drop=0.0).double()
    beside = LowRankTraining(
        plain,
        OPTIMIZERS["sgd"](plain.parameters()),
        batch(torch.float64)[0],
        decompose_at=1,
        ranks=RANKS,
        recompose_at=2,
    )
    for epoch in range(3):
        for each in (run, beside):
            train(each, seed=epoch)
            each.end_epoch(epoch)
        assert run.model is wrapped
        x = batch(torch.float64, seed=8)[0]
        assert relative_error(run.model.eval()(x), plain.eval()(x)) <= tolerance(torch.float64, length=512, steps=64)
        assert run.phase == beside.phase


def test_wrappers_are_seen_through() -> None:
    model = nn.Linear(2, 2)
    assert unwrap(model) is model
    assert unwrap(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]


def work(rank: int, folder: Path) -> None:
    """One process, which leaves nothing that its process group's threads could still drop as it exits."""
    train_together(rank, folder)
    gc.collect()
    assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
    dist.barrier()


def train_together(rank: int, folder: Path) -> None:
    """Train on this process's half of each batch, from weights that differ until the wrapper makes them alike."""
    torch.manual_seed(rank)
    model = DistributedDataParallel(Net(drop=0.0).double(), bucket_cap_mb=1)
    run = LowRankTraining(
        model,
        OPTIMIZERS["adamw"](model.parameters()),
        batch(torch.float64)[0],
        decompose_at=1,
        ranks=RANKS,
        recompose_at=3,
    )
    phases = []
    for epoch in range(4):
        for step in range(3):
            run.optimizer.zero_grad()
            loss_of(run.model, batch(torch.float64, seed=1000 * rank + 10 * epoch + step)).backward()
            run.optimizer.step()
        run.end_epoch(epoch)
        phases.append(run.phase)
        state = {"model": unwrap(run.model).state_dict(), "optimizer": run.optimizer.state_dict()["state"]}
        torch.save(state, folder / f"{epoch}-{rank}.pt")
    assert isinstance(run.model, DistributedDataParallel)
    assert phases == ["factored", "factored", "recomposed", "recomposed"]
    assert model is not run.model


@two_processes
def test_all_processes_switch_to_the_same_weights_and_stay_together(tmp_path: Path) -> None:
    together(work, tmp_path)
    for epoch in range(4):
        first, second = (torch.load(tmp_path / f"{epoch}-{rank}.pt", weights_only=True) for rank in range(WORLD))
        trained = {
            name for name in first["model"] if not name.startswith("norm.")
        }  # batch statistics are each one's own
        assert all(torch.equal(first["model"][name], second["model"][name]) for name in trained)
        for index, state in first["optimizer"].items():
            assert all(torch.equal(value, second["optimizer"][index][key]) for key, value in state.items())
    assert "first.weight" in first["model"]
