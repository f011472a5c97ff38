"""Calibration on whole networks: moments and factors on every graph kind, batch norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from surgery.algebra import relative_error
from surgery.data.batch_norm import reestimate_batch_norm
from surgery.data.collect import collect, with_sensitivity
from surgery.data.moments import layout_bytes
from surgery.data.samples import read_calibration
from surgery.errors import InputError
from surgery.passes.decompose import decompose
from surgery.passes.preview import find_sites, plan
from surgery.runtime.compare import run_model
from tests.zoo import GRAPH_KINDS, ZOO, graph

NETWORKS = ["resnet-basic", "called-twice", "attention", "recurrent"]
KINDS = list(GRAPH_KINDS)


class Net(nn.Module):
    """Convolutions with batch norms, one of them used twice, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu_(self.twice(self.conv(x)) + x)
        return self.head(x.mean((2, 3)))


def net() -> Net:
    """The network, with batch norms that have seen data."""
    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        for _ in range(50):
            model(images(64, seed=1))
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    noise = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.cumsum(-1) + 0.5


def as_kind(model: nn.Module, kind: str, example: Tensor) -> Any:
    if kind == "program-dynamic":
        return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=2)},))
    return GRAPH_KINDS[kind](model, (example,))


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_all_graph_kinds_see_the_same(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    found = collect(model, read_calibration([inputs], model, inputs))
    expected_model, _ = graph(name, "module")
    expected = collect(expected_model, read_calibration([inputs], expected_model, inputs))
    assert set(found) == {site.name for site in find_sites(model, inputs)[0]}
    for site in set(found) & set(expected):
        assert found[site].count == expected[site].count
        assert relative_error(found[site].second, expected[site].second) < 1e-4
    if kind != "program-dynamic":
        sensitive = with_sensitivity(model, read_calibration([inputs], model, inputs), found)
        assert all(m.sensitivity is not None and bool(m.sensitivity.isfinite().all()) for m in sensitive.values())


def test_the_budget_bounds_all_moments() -> None:
    model = net()
    batches = read_calibration(images(8), model)
    whole = collect(model, batches)
    assert all(m.dense for m in whole.values())
    for budget in (sum(_bytes(m) for m in whole.values()) - 1, 8000):
        bounded = collect(model, batches, budget_bytes=budget)
        assert sum(_bytes(m) for m in bounded.values()) <= budget
    operator = find_sites(model, images(2))[0][1].operator
    assert layout_bytes(operator, 72) == _bytes(whole["conv"])


def _bytes(moments: Any) -> int:
    return sum(factor.nbytes for factor in moments.metric.factors)


def test_collecting_changes_nothing_and_reports_progress() -> None:
    model, steps = net().train(), []
    before = copy.deepcopy(model.state_dict())
    collect(
        model,
        read_calibration(images(8), model, batch_size=4),
        progress=lambda name, done, total: steps.append((done, total)),
    )
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_sensitivity_predicts_how_far_the_output_moves() -> None:
    """Of the last layer, whose output is the model's, the directions are independent: G is a multiple of 1."""
    model, x = net(), images(256)
    batches = read_calibration(x, model)
    moments = with_sensitivity(model, batches, collect(model, batches), samples=256)
    gradients = moments["head"].sensitivity
    assert gradients is not None
    scaled = gradients[0] / gradients[0].diagonal().mean()
    assert relative_error(scaled, torch.eye(6, dtype=torch.float64)) < 0.3
    energy = float(model(x).detach().square().sum(1).mean())
    assert float(gradients[0].diagonal().mean()) * energy == pytest.approx(1, rel=0.3)  # it is a relative error
    stem = moments["stem"].sensitivity
    assert stem is not None
    assert float(torch.linalg.eigvalsh(stem[0])[0]) > -1e-12 * float(stem[0].trace())


def test_what_few_gradients_have_not_shown_is_not_harmless() -> None:
    x, model = torch.randn(4, 8, dtype=torch.float64), nn.Sequential(nn.Linear(8, 12)).double()
    batches = read_calibration(x, model)
    found = with_sensitivity(model, batches, collect(model, batches))["0"].sensitivity
    assert found is not None
    values = torch.linalg.eigvalsh(found[0])
    assert float(values[0]) == pytest.approx(12 / 16 * float(values.mean()), rel=1e-6)  # 4 of 12 directions were seen


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_gets_a_gradient(kind: str) -> None:
    x = images(16)
    model = as_kind(net(), kind, x)
    batches = read_calibration(x, model)
    with_sensitivity(model, batches, collect(model, batches))
    state = model.state_dict if isinstance(model, ExportedProgram) else dict(model.named_parameters())
    parameters = [value for value in state.values() if isinstance(value, nn.Parameter)]
    assert parameters
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)


# --- whole networks --------------------------------------------------------------------------------------------------


@pytest.mark.law(2)
@pytest.mark.parametrize("kind", KINDS)
def test_factors_for_the_data_give_nearer_outputs(kind: str) -> None:
    x = images(48)
    model = as_kind(net(), kind, x[:16])
    batches = read_calibration(x, model, batch_size=16)
    chosen = plan(model, x[:16], ranks={"stem": 4, "conv": 4, "head": 3}, factorization="svd")
    test = images(16, seed=9)
    original = run_model(model, ((test,), {}))
    plain = run_model(decompose(model, x[:16], ranks=chosen).model, ((test,), {}))
    errors = []
    for groups in (1, 3, None):
        fitted = decompose(model, x[:16], ranks=chosen, calibration=batches, groups=groups)
        assert [change.site for change in fitted.changes] == ["stem", "conv", "head"]
        assert fitted.plan == chosen
        assert type(fitted.model) is type(model) or not isinstance(model, ExportedProgram)
        output = run_model(fitted.model, ((test,), {}))
        errors.append(relative_error(output, original))
    assert errors[1] == errors[2]
    assert errors[1] < errors[0] < relative_error(plain, original)
    assert torch.equal(run_model(model, ((test,), {})), original)


@pytest.mark.law(2)
@pytest.mark.parametrize("kind", KINDS)
def test_all_is_computed_on_the_device_of_the_model(kind: str) -> None:
    """What was made on the default device instead could not meet the activations, as on a GPU."""
    data = images(40)
    model = as_kind(net(), kind, data[:2])
    with torch.device("meta"):
        result = decompose(model, data[:2], ranks="keep_macs=0.5", calibration=data, groups=2)
    assert result.changes


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_without_changes_leaves_the_model_as_it_is(kind: str) -> None:
    x = images(24)
    model = as_kind(net(), kind, x[:8])
    for groups in (1, 2):
        result = decompose(model, x[:8], ranks={"*": None}, calibration=x, groups=groups)
        assert not result.changes
        assert torch.equal(run_model(result.model, ((x[:8],), {})), run_model(model, ((x[:8],), {})))


def test_groups_need_data() -> None:
    given: list[dict[str, Any]] = [{"ranks": 2}, {"calibration": images(4), "groups": 0}]
    for settings in given:
        with pytest.raises(InputError, match="groups="):
            decompose(net(), images(2), **{"groups": 2, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_gives_the_statistics_of_training(kind: str) -> None:
    x = images(12)
    expected = net()
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model = as_kind(net(), kind, x)
    names = reestimate_batch_norm(model, read_calibration(x, model, batch_size=12), passes=1)
    assert names == ("bn", "twice")
    with torch.no_grad():
        expected.train()(x)
    found = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    for name, value in expected.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            assert torch.allclose(found[name], value)
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(found[name], value)


def test_later_passes_settle_and_normalise_what_inference_sees() -> None:
    x, model = images(32), net()
    batches = read_calibration(x, model, batch_size=8)
    reestimate_batch_norm(model, batches, passes=4)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        value = model.conv(F.relu(model.bn(model.stem(x))))
    assert torch.allclose(value.mean((0, 2, 3)), before["twice.running_mean"], atol=1e-6)
    assert torch.allclose(value.transpose(0, 1).flatten(1).var(1), before["twice.running_var"], rtol=1e-6)


def test_without_batch_norms_nothing_happens() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    assert reestimate_batch_norm(model, read_calibration(torch.randn(4, 3), model)) == ()


def test_every_network_of_the_zoo_can_be_calibrated() -> None:
    for name in ZOO:
        if not name.startswith("hf-"):
            model, inputs = graph(name, "module")
            moments = collect(model, read_calibration([inputs], model, inputs))
            assert all(m.count > 0 for m in moments.values()), name
