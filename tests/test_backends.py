"""Backends: one is a class and a row, and what it says of latencies decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import surgery
from surgery.algebra import Chain, Linear, Operator, Shape
from surgery.cost.base import BACKENDS, Backend, Comparison, ModelFile, ModelTimes, Seconds, make_backend
from surgery.cost.onnxruntime.backend import OnnxRuntime
from surgery.cost.timing import Samples, Speedup
from surgery.errors import InputError
from surgery.runtime.fresh import Apart, time_apart


class ByParameters(Backend):
    """A made-up clock: ``base`` seconds a step, and a microsecond for each parameter."""

    name = "toy"
    threads = 1
    channel_multiple = 2

    def __init__(self, *, base: float = 1e-6, path: Path | None = None, keep: bool = False) -> None:
        super().__init__(path=path, keep=keep)
        self.base, self.asked = base, 0

    @property
    def key(self) -> dict[str, Any]:
        return {"base": self.base}

    def time_one(self, operator: Operator | Chain, shape: Shape) -> Seconds:
        self.asked += 1
        steps = len(operator.steps) if isinstance(operator, Chain) else 1
        return Seconds(self.base * steps + 1e-6 * operator.parameters)

    def time_pair(self, dense: Operator | Chain, chain: Operator | Chain, shape: Shape) -> Comparison:
        before, after = (self.time_one(each, shape).seconds for each in (dense, chain))
        ratio = before / after
        return Comparison(before, after, ratio, ratio, ratio, "faster" if ratio > 1 else "slower")

    def time_models(
        self,
        models: Sequence[ModelFile],
        *,
        threads: int | None = None,
        seconds: float = 5.0,
        seed: int = 0,
        settled: Callable[[Sequence[Speedup]], bool] | None = None,
        patience: int = 1,
        progress: Callable[[float], None] | None = None,
    ) -> ModelTimes:
        medians = [1e-6 * _parameters(model.path) for model in models]
        ratios = [medians[0] / median for median in medians[1:]]
        return ModelTimes(
            tuple(Samples((median,)) for median in medians), tuple(Speedup(ratio, ratio, ratio) for ratio in ratios)
        )


def _parameters(path: Path) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(BACKENDS, "toy", ByParameters)
    return "toy"


def model() -> nn.Module:
    """Two linear layers of rank 4, of which the second is small."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64, bias=False), nn.Linear(64, 16, bias=False)]
    for layer in layers:
        rows, columns = layer.weight.shape
        layer.weight.data = torch.randn(rows, 4) @ torch.randn(4, columns)
    return nn.Sequential(*layers)


def auto(backend: Backend) -> list[str]:
    """Return the sites that ``ranks="measured"`` factors."""
    found = surgery.plan(model(), torch.ones(1, 64), ranks="measured", backend=backend)
    return [decision.site for decision in found if not decision.dense]


def test_the_choice_of_ranks_follows_the_backend(toy: str) -> None:
    assert auto(make_backend(toy, base=0.0)) == ["0", "1"]
    assert auto(make_backend(toy, base=1.5e-3)) == ["0"]  # saves 3.5 ms of parameters; the other saves 0.7
    assert auto(make_backend(toy, base=1.0)) == []


def test_whole_models_are_timed_by_the_backend(toy: str) -> None:
    backend = make_backend(toy)
    models = [nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False)]
    timing = time_apart(models, torch.ones(1, 8), backend=backend, seconds=0.0)
    assert timing.comparisons[0].speedup == pytest.approx(4)
    assert timing.comparisons[0].verdict == "faster"
    apart = Apart(models[0], torch.ones(1, 8), backend)
    assert apart.alone(seconds=0.0).median_s == pytest.approx(64e-6)
    assert apart.against(models[1], seconds=0.0).comparisons[0].speedup == pytest.approx(4)


def test_no_backend_sees_the_numbers_of_another(tmp_path: Path) -> None:
    operator, path = Linear(torch.ones(2, 3)), tmp_path / "numbers"
    first = ByParameters(path=path, keep=True)
    assert first.measure(operator, (1, 3)) == first.measure(operator, (1, 3)) == pytest.approx(7e-6)
    again, other = ByParameters(path=path, keep=True), ByParameters(base=1.0, path=path, keep=True)
    assert again.measure(operator, (1, 3)) == pytest.approx(7e-6)
    assert other.measure(operator, (1, 3)) > 1
    assert (first.asked, again.asked, other.asked) == (1, 0, 1)


def test_an_unknown_backend_lists_the_known_ones(toy: str) -> None:
    with pytest.raises(InputError, match="the backend 'abacus' is not known; allowed: onnxruntime, toy"):
        make_backend("abacus")
    assert isinstance(make_backend(), OnnxRuntime)
