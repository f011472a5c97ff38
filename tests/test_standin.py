"""Stand-in data, and what ``auto`` promises on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from surgery.cli.decompose import decompose as command
from surgery.data.batch_norm import NormDistances
from surgery.data.standin import Effort, StandIn, stand_in
from surgery.errors import Refusal
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.registry import observe, open_model
from surgery.passes.clock import Instruments
from surgery.passes.fitting import FitOptions
from surgery.passes.job import Selection, read_job
from surgery.passes.run import by_goal
from surgery.plans.goal import Goal
from surgery.runtime.compare import run_model
from surgery.sites.find import find
from tests.cases import decaying
from tests.covering import in_turns
from tests.test_calibration_models import KINDS, as_kind
from tests.test_search import ByMacs, Clock


def made(model: Any, example: Any, effort: Effort | None = None) -> StandIn | Refusal:
    inputs = normalise_inputs(example)
    return stand_in(model, inputs, find(open_model(model, inputs, copies=False).flow), effort=effort)


class Tokens(nn.Module):
    """Ids that are looked up, with a mask."""

    def __init__(self, known: int = 37) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(known, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.table(ids) * mask.unsqueeze(-1))


def normed() -> nn.Sequential:
    """Convolutions with batch norms that have seen images of another mean and deviation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    with torch.no_grad():
        for _ in range(60):
            model(3 * torch.randn(32, 3, 10, 10) + 5)
    return model.eval()


@pytest.mark.parametrize(("kind", "make"), in_turns(KINDS, [torch.zeros, torch.randn]))
def test_noise_is_moved_to_what_batch_norms_expect(kind: str, make: Callable[..., Tensor]) -> None:
    example = make(2, 3, 10, 10)
    model = as_kind(normed(), kind, example)
    found = made(model, example, Effort(samples=(16, 16), steps=(10, 60)))
    assert isinstance(found, StandIn)
    assert "batch norms" in found.what
    observed = observe(model, next(iter(found.samples)))
    distances = NormDistances(observed)

    def off(x: Tensor) -> float:
        for part in x.split(2):
            observed.run(((part,), {}))
        taken = distances.take()
        assert taken is not None
        return float(taken)

    others = torch.cat([args[0] for args, _ in found.samples])[2:]
    assert off(others) < 0.3 * off(torch.randn(32, 3, 10, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_their_table_and_masks_stay(kind: str) -> None:
    example = (torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 0]] * 2))
    model: Any = Tokens().eval()
    model = torch.export.export(model, example) if kind.startswith("program") else model
    found = made(model, example)
    assert isinstance(found, StandIn)
    assert "random ids" in found.what
    ids, masks = (torch.cat([args[at] for args, _ in found.samples]) for at in (0, 1))
    assert ids.min() >= 0
    assert 30 < ids.max() < 37
    assert torch.equal(masks, example[1][:1].expand_as(masks))


def test_inputs_without_tensors_are_refused() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, size: int) -> Tensor:
            return self.layer(torch.ones(size, 4))

    assert isinstance(made(Nothing().eval(), (3,)), Refusal)


def network(decay: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in (layer for layer in model if isinstance(layer, nn.Linear)):
        layer.weight.data = decaying(layer.weight.data.double(), decay).float()
    return model.eval()


@pytest.mark.parametrize(("kind", "decay"), in_turns(["module", "program-dynamic"], [0.7, 0.9, 0.97, 1.0]))
def test_auto_without_data_never_ruins_a_network(kind: str, decay: float, tmp_path: Path) -> None:
    example, fresh = torch.randn(2, 64), torch.randn(400, 64)
    model = as_kind(network(decay), kind, example)
    goal, backend = Goal.error(), ByMacs(threads=1, path=tmp_path / "l")
    job = read_job(model, example, goal, Selection(), FitOptions())
    result = by_goal(job, goal, Instruments(backend, Clock().apart))
    assert result.promise is not None
    assert result.promise.kept
    found, wanted = (run_model(m, normalise_inputs(fresh)) for m in (result.model, model))
    assert relative_error(found, wanted) <= 0.1
    if result.changes:
        assert result.seen is not None
        assert result.seen.error <= 0.05
        assert "noise" in result.promise.note
        again = surgery.decompose(model, example, ranks=result.plan)
        assert again.plan == result.plan
        assert torch.equal(run_model(again.model, normalise_inputs(fresh)), found)
    else:
        assert result.after == result.before


def test_without_a_promise_it_is_a_rule_like_any_other(tmp_path: Path) -> None:
    example = torch.randn(2, 64)
    plan = surgery.plan(network(1.0), example, backend=ByMacs(threads=1, path=tmp_path / "l"))
    assert plan.ranks == "measured"
    result = surgery.decompose(network(1.0), example, ranks=plan)
    assert result.promise is None
    assert result.changes
    assert result.seen is not None
    assert result.seen.error > 0.2


def test_the_first_command_keeps_a_promise_and_says_what_it_is_worth(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(network(1.0), (torch.randn(2, 64),)), file)
    ran = CliRunner().invoke(command, [str(file)])
    assert ran.exit_code == 0, ran.output
    assert "output error at most 0.05" in " ".join(ran.output.split())
    ruled = CliRunner().invoke(command, [str(file), "--ranks", "1", "--force", "--no-timing"])
    assert ruled.exit_code == 0, ruled.output
    assert "no longer those of the original" in " ".join(ruled.output.split())
