"""The epilogue of a site is found in every kind of graph, and timed together with the site."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.algebra import Chain, Conv, Geometry, Linear, Operator
from surgery.cost.onnxruntime.model import build_model
from surgery.passes.preview import find_sites
from surgery.plans.candidates import Candidate, candidates_of
from surgery.sites import Activation, BatchNorm, Site

KINDS = ("module", "graph", "program")


class Net(nn.Module):
    """One site for each case: norm and activation, activation, norm, read twice, called in two places, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.norm = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.tanh = nn.ReLU6(), nn.Tanh()
        self.twice, self.tied = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.both(x)))
        x = self.bn2(self.norm(x)) + x
        y = self.twice(x)
        x = functional.relu(y) + y
        x = self.tied(torch.sigmoid(self.tied(x)))
        return self.last(self.tanh(self.act(x.mean((2, 3)))))


def opened(kind: str, x: Tensor) -> Any:
    model = Net().eval()
    if kind == "graph":
        return torch.fx.symbolic_trace(model)
    return torch.export.export(model, (x,)) if kind == "program" else model


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_activations_are_seen(kind: str) -> None:
    x = torch.randn(2, 4, 5, 5)
    found = {site.name: site.epilogue for site in find_sites(opened(kind, x), x)[0]}
    assert found == {
        "both": (BatchNorm(), Activation("Clip")),
        "norm": (BatchNorm(),),
        "twice": (),
        "tied": (),
        "act": (Activation("Tanh"),),
        "last": (),
    }


@pytest.mark.parametrize("kind", ["Relu", "Clip", "Sigmoid", "Tanh"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (3, 4)])
def test_a_placed_operator_runs_with_its_epilogue(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    operator: Operator = Linear(torch.randn(6, 4), bias=torch.randn(6))
    if len(shape) == 4:
        geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), (0, 0))
        operator = Conv(torch.randn(6, 4, 3, 3), geometry, bias=torch.randn(6))
    placed = Site("site", operator, (shape,), epilogue=(BatchNorm(), Activation(kind))).placed(operator)
    assert isinstance(placed, Chain)
    x = 4 * torch.randn(shape)
    plain = operator(x) / (1 + 1e-5) ** 0.5
    functions = {"Relu": torch.relu, "Clip": functional.relu6, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
    (found,) = ort.InferenceSession(build_model(placed, shape)).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), functions[kind](plain), rtol=1e-4, atol=1e-4)


def test_both_sides_of_a_measurement_have_the_epilogue() -> None:
    operator = Linear(torch.randn(8, 8))
    site = Site("site", operator, ((2, 8),), epilogue=(Activation("Relu"),))
    candidates = candidates_of(site, "svd")
    assert isinstance(candidates, list)
    for dense, chain, shape, count in Candidate(site, candidates[0].factorization).pairs((2,)):
        assert isinstance(dense, Chain)
        assert isinstance(chain, Chain)
        assert dense.steps == (operator, Activation("Relu"))
        assert chain.steps[-1] == Activation("Relu")
        assert (shape, count) == ((2, 8), 1)
    bare = Site("site", operator, ((2, 8),))
    assert bare.placed(operator) is operator
