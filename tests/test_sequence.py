"""Sites fitted behind others: targets are regressions on what the changed network feeds them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.algebra import relative_error
from surgery.data.batch_norm import NormWatch
from surgery.data.collect import collect
from surgery.data.samples import read_calibration
from surgery.data.sequence import Originals, Target
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.observed import Additions
from surgery.kinds.registry import open_model
from surgery.passes.decompose import decompose
from surgery.passes.factoring import gather
from surgery.passes.original import Original
from surgery.passes.preview import find_sites
from surgery.runtime.compare import run_model
from tests.covering import ALL, in_turns
from tests.test_calibration_models import KINDS, as_kind, images, net
from tests.zoo import ZOO, graph

EXACT = 1e-10
FLOAT32 = 1e-5


def targets(model: nn.Module, changed: nn.Module, x: Tensor, *sites: str, centred: bool = True) -> Mapping[str, Target]:
    batches, norms = read_calibration(x, model, x[:16], batch_size=16), NormWatch()
    moments = collect(model, batches, also_watch=norms)
    found = Originals(model, batches, moments)
    return found.targets(changed, sites, norms.reference, sites if centred else ())


@pytest.mark.parametrize("kind", KINDS)
def test_behind_what_was_not_changed_a_site_is_its_own_target(kind: str) -> None:
    x = images(48)
    model = as_kind(net(), kind, x[:16])
    own = {site.name: site.operator for site in find_sites(model, x[:16])[0]}
    found = targets(model, open_model(model, ((x[:16],), {})).finish(), x, *own)
    assert set(found) == set(own)
    for name, operator in own.items():
        assert relative_error(found[name].operator.weight, operator.weight) <= EXACT
        if operator.bias is not None:
            corrected = found[name].operator.bias
            assert corrected is not None
            assert relative_error(corrected, operator.bias) <= EXACT


@pytest.mark.parametrize("bias", [True, False])
def test_what_can_be_told_from_the_inputs_is_taken_back(bias: bool) -> None:
    """A layer in front is turned and stretched: the next one undoes it, up to its ridge and few samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5, bias=bias)).double()
    changed = copy.deepcopy(model)
    turn = torch.eye(8, dtype=torch.float64) + 0.3 * torch.randn(8, 8, dtype=torch.float64)
    changed[0].weight.data = turn @ model[0].weight
    changed.get_parameter("0.bias").data += 1.0
    x = torch.randn(4096, 6, dtype=torch.float64)
    found = targets(model, changed, x[:512], "1", centred=bias)["1"].operator
    wanted, now = model(x), changed[0](x)
    assert relative_error(found(now), wanted) < relative_error(changed(x), wanted) / 10
    seen = x[:512]
    if bias:  # the mean is exact
        assert relative_error(found(changed[0](seen)).mean(0), model(seen).mean(0)) <= EXACT


def test_few_samples_move_it_little() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 5)).double()
    changed = copy.deepcopy(model)
    changed[0].weight.data += 0.2 * torch.randn(40, 40, dtype=torch.float64) / 40**0.5
    x = torch.randn(2000, 40, dtype=torch.float64)
    few, many = (targets(model, changed, x[:count], "1")["1"].operator for count in (20, 2000))
    moved = [relative_error(operator.weight, model.get_parameter("1.weight")) for operator in (few, many)]
    errors = [relative_error(operator(changed[0](x)), model(x)) for operator in (few, model[1], many)]
    assert moved[0] > 0
    assert errors[2] < errors[1]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(("kind", "scale"), in_turns(["module", "program"], [0.0, 1.0, 1e6]))
def test_samples_that_are_all_alike_are_no_trap(kind: str, scale: float) -> None:
    """Their covariance is what rounding leaves of it, of which some eigenvalues are negative."""
    for seed in range(2 if ALL else 1):
        torch.manual_seed(seed)
        x = torch.full((512, 8), scale)
        model = as_kind(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), kind, x[:2])
        result = decompose(model, x[:2], calibration=x, ranks=2)
        assert len(result.changes) == 2
        assert bool(torch.isfinite(run_model(result.model, ((x[:2],), {}))).all())


def test_a_stage_for_each_site_as_long_as_it_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = images(40), net()
    data = gather(Original(model, normalise_inputs(x[:2])), read_calibration(x, model), None, lambda *_: None)
    assert [list(group) for group in data.groups(3, None)] == [[0], [1], [2]]
    assert [list(group) for group in data.groups(5, 2)] == [[0, 1], [2, 3, 4]]
    assert data.groups(0, None) == data.groups(0, 3) == []
    monkeypatch.setattr("surgery.data.samples._PASSES", 1)
    monkeypatch.setattr("surgery.data.samples._WORK", 2.5 * data.macs * data.samples.count)
    assert len(data.groups(3, None)) == 2
    monkeypatch.setattr("surgery.data.samples._WORK", 1.0)
    assert len(data.groups(3, None)) == 1


@pytest.mark.law(16)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(ZOO) - {"functional"}))  # a module of which has no sites
def test_every_site_of_the_zoo_gets_a_stage(name: str, kind: str) -> None:
    """Also where a module is called twice, and where packed projections are taken apart; full ranks change nothing."""
    model, inputs = graph(name, kind)
    sites = find_sites(model, inputs)[0]
    found = decompose(model, inputs, ranks="full", factorization="svd", calibration=[inputs] * 4, groups=len(sites))
    assert len(found.changes) > 1
    pairs = zip(*(tensors(run_model(one, normalise_inputs(inputs))) for one in (found.model, model)), strict=True)
    assert all(relative_error(now, before) <= FLOAT32 for now, before in pairs)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.law(3)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_pay_on_a_deep_network(kind: str) -> None:
    torch.manual_seed(1)
    layers = [layer for _ in range(5) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    model = as_kind(nn.Sequential(nn.Conv2d(3, 8, 1), *layers).eval(), kind, images(16).float())
    x, test = images(64).float(), images(16, seed=9).float()
    errors = []
    for groups in (1, None):
        found = decompose(model, x[:16], ranks=(4, 4), factorization="tucker", calibration=x, groups=groups).model
        errors.append(relative_error(run_model(found, ((test,), {})), run_model(model, ((test,), {}))))
    assert errors[1] < 0.95 * errors[0]


HOW = ["added", "in place", "into the branch", "in another shape", "twice", "returned", "not itself"]


class Residual(nn.Module):
    """Two layers, the second beside a branch; ``how`` says what becomes of its output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(6, 8), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Any:
        """Return (N, 8), or two of that."""
        x = self.first(x)
        y = self.second(x)
        if self.how == "added":
            return F.relu(F.dropout(y, 0.5, self.training) + x)
        if self.how == "in place":
            y += x
            return y.relu()
        if self.how == "into the branch":
            z = x * 1
            z += y
            return z
        if self.how == "in another shape":
            return (y.view(-1, 2, 4) + x.view(-1, 2, 4)).relu().view(-1, 8)
        if self.how == "twice":
            return y + x + y
        if self.how == "returned":
            return y, y + x
        return y.relu() + x


@pytest.mark.law(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", ["added", "in place", "into the branch", "in another shape", "twice", "returned", "not itself"]
)
def test_an_operator_makes_up_for_the_branch_that_is_added_to_its_output(how: str, kind: str) -> None:
    """If all that becomes of its output is the sum: then that comes back, up to a ridge, and else its output."""
    torch.manual_seed(0)
    model = Residual(how).double().eval()
    other = copy.deepcopy(model)
    other.first.weight.data += 0.3 * torch.randn(8, 6, dtype=torch.float64)
    x = torch.randn(4096, 6, dtype=torch.float64)
    now, changed = (as_kind(one, kind, x[:16]) for one in (model, other))
    found = targets(now, changed, x[:1024], "second")["second"].operator
    alone = how in ("twice", "returned", "not itself")  # of more than its sum
    output = model.second(model.first(x)) + (0 if alone else model.first(x) - other.first(x))
    assert relative_error(found(other.first(x)), output) < 0.01


class Beside(nn.Module):
    """Layers beside each other, or one after another, on one stream."""

    def __init__(self, *, parallel: bool) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 8)."""
        x = self.first(x)
        if self.parallel:
            return self.one(x) + self.two(x)
        x = x + self.one(x)
        return x + self.two(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", [True, False])
def test_what_two_sites_could_make_up_for_is_not_made_up_for_twice(kind: str, *, parallel: bool) -> None:
    torch.manual_seed(0)
    model = Beside(parallel=parallel).double().eval()
    changed = copy.deepcopy(model)
    changed.first.weight.data /= 2
    x = torch.randn(4096, 6, dtype=torch.float64)
    before, now = (as_kind(one, kind, x[:16]) for one in (model, changed))
    found = targets(before, now, x[:1024], "one", "two")
    then, here = model.first(x), changed.first(x)
    branch = 0 if parallel else then - here
    assert relative_error(found["one"].operator(here), model.one(then) + branch) < 0.01
    if not parallel:
        then, here = then + model.one(then), here + changed.one(here)
    assert relative_error(found["two"].operator(here), model.two(then)) < 0.01


def test_a_site_that_is_called_on_other_rows_has_no_target() -> None:
    class Halt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.loop, self.last = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            for _ in range(1 + int(h.abs().mean() * 37) % 4):
                h = torch.tanh(self.loop(h) + h)
            return self.last(h[h.sum(1) > 0]).sum(0)

    torch.manual_seed(0)
    x = torch.randn(64, 16)
    result = decompose(Halt().eval(), x[:8], ranks=4, calibration=x)
    assert len(result.changes) == 3


def test_additions_see_one_reading_alone() -> None:
    seen: list[str] = []
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    cases: dict[str, Callable[[], Any]] = {
        "sum": lambda: x + y,
        "more": lambda: y.add(x, alpha=2),
        "wider": lambda: y + torch.ones(5, 2, 3),
        "itself": lambda: y + y,
        "nothing": lambda: x + x,
        "paused": lambda: _paused(additions, lambda: y * 2),
        "number": lambda: y + 1,
    }
    expected = {"sum": ["added"], "itself": ["added", "spoiled"], "nothing": [], "paused": []}
    for name, call in cases.items():
        seen.clear()
        additions = Additions()
        with additions:
            additions.follow(y, lambda *_: seen.append("added"), lambda: seen.append("spoiled"))
            call()
        assert seen == expected.get(name, ["spoiled"]), name


def _paused(additions: Additions, call: Callable[[], Any]) -> None:
    with additions.paused():
        call()
