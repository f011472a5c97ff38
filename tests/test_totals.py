"""Totals are the whole model's, sites or not; and where most of it is left alone, the first line says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import surgery
from surgery.kinds.registry import open_model
from surgery.report import collect, render
from surgery.sites import Skip, left_alone
from surgery.sites.find import find


class Exponential(nn.Conv2d):
    """Computes its weight in a way that cannot be undone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.exp(), self.bias, self.stride, self.padding)


class Twice(nn.Linear):
    """Uses its weight twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight)


class Mixed(nn.Module):
    """Layers that are sites, and others that are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = Exponential(8, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.table = nn.Parameter(torch.randn(8, 8))
        self.twice = Twice(8, 8, bias=False)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.second(self.first(x)).relu()).mean((2, 3))
        return self.last(self.twice(x @ self.table))


class Branching(Mixed):
    """The same with a branch that torch.fx does not trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 100 else super().forward(x)


X = torch.randn(2, 3, 12, 12)


def counted(model: nn.Module) -> int:
    """Return what torch counts in one run."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(X)
    return int(counter.get_total_flops()) // 2


def forms(model: nn.Module) -> dict[str, Any]:
    return {"graph": torch.fx.symbolic_trace(model), "program": torch.export.export(model, (X,))}


@pytest.mark.parametrize("kind", ["module", "branching", "graph", "program"])
def test_totals_are_those_of_the_model(kind: str) -> None:
    torch.manual_seed(0)
    model = (Branching if kind == "branching" else Mixed)().eval()
    given: Any = model if kind in ("module", "branching") else forms(model)[kind]
    totals = find(open_model(given, ((X,), {})).flow).totals
    assert totals.macs == counted(model)
    assert totals.parameters == sum(p.numel() for p in model.parameters())


def test_a_recurrent_layer_and_attention_count_as_their_products_with_weights() -> None:
    lstm = nn.LSTM(8, 16, batch_first=True)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = lstm, nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(x)[0])

    model, x = Whole().eval(), torch.randn(2, 5, 8)
    matrices = sum(p.numel() for p in lstm.parameters() if p.dim() > 1)
    assert find(open_model(model, ((x,), {})).flow).totals.macs == 2 * 5 * (matrices + model.last.weight.numel())


def test_the_first_line_says_that_most_is_left_alone_and_what_to_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Exponential(8, 16, 3, padding=1)).eval()
    result = surgery.decompose(model, X, ranks={"0": 1}, factorization="svd")
    first, second, *_ = repr(result).splitlines()
    assert first.startswith("DecomposeResult: 98 % of the MACs are left alone: mostly because its weight is computed")
    assert "(1 layer)" in first
    assert "torch.export" in first
    assert second.startswith("1 factored, ")
    page = render(collect(result))
    assert "98 % of the MACs are left alone" in page


def test_nothing_is_said_where_most_is_factored_or_left_by_choice() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    x = torch.randn(2, 16)
    given: list[dict[str, Any]] = [{}, {"include": ["0"]}, {"exclude": ["*"]}]
    for more in given:
        result = surgery.decompose(model, x, ranks=2, factorization="svd", **more)
        assert "of the MACs are left alone" not in repr(result)


def test_the_reason_that_holds_most_comes_first_and_numbers_do_not_tell_reasons_apart() -> None:
    dense = [
        Skip(f"{i}", "Linear", f"rank {i} of svd would cost more than dense (MACs {i} -> {i + 1})", macs=30)
        for i in range(2)
    ]
    places = [*dense, Skip("other", "Conv2d", "its weight is rounded (quantization)", macs=40)]
    said = left_alone(places, 110)
    assert said is not None
    assert said.startswith("91 % of the MACs are left alone: mostly because rank 0 of svd would cost more than dense")
    assert "(2 layers); ask for lower ranks" in said
    assert left_alone(places, 300) is None
    assert left_alone(places, None) is None
    promises = {
        "every chain would cost more of the promise than it gains": "promise less",
        "no chain measured faster than dense": "try another factorization",
        "no chain costs less than dense": "try another factorization",
        "svd: no rank needs fewer MACs than dense": "try another factorization",
    }
    for reason, step in promises.items():  # a goal has no ranks that could be lower
        advice = left_alone([Skip("0", "Linear", reason, macs=40)], 50) or ""
        assert step in advice
        assert "ranks" not in advice
    quantized = left_alone([places[2]], 50)
    assert quantized is not None
    assert quantized.endswith("change the model before it is quantized")


def test_nobody_is_told_to_export_a_program() -> None:
    place = Skip(
        "conv", "Conv2d", "its weight is computed by the graph (weight norm, quantization, an adapter)", macs=9
    )
    assert "torch.export" in str(left_alone([place], 10))
    assert "export" not in str(left_alone([place], 10, exported=True))
