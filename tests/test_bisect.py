"""bisect: it finds the sites that cost the most, in few evaluations, and leaves both models as they are."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import surgery
from surgery.cli import cli
from surgery.errors import InputError
from surgery.passes.bisect import bisect
from tests.tolerances import tolerance

WIDTH, DEPTH = 24, 16
X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters() if name.endswith("weight")}


def nearness(model: nn.Module) -> Callable[[Any], float]:
    """Return a metric in which sites cost by themselves: minus the squared distance of all weights."""
    wanted = weights(model)
    return lambda module: -sum(float((w - wanted[name]).square().sum()) for name, w in weights(module).items())


def closeness(model: nn.Module, x: Tensor = X) -> Callable[[Any], float]:
    """Return a metric: minus the relative distance from the model's outputs."""
    with torch.no_grad():
        wanted = model(x)
        return lambda module: -float((module(x) - wanted).detach().norm() / wanted.norm())


def ranks(*bad: int) -> dict[str, int | None]:
    """Return ranks that hurt at the bad layers and are full at all others."""
    return {f"layers.{i}": 1 if i in bad else WIDTH for i in range(DEPTH)}


@pytest.mark.parametrize("kind", ["module", "program"])
@pytest.mark.parametrize("bad", [(5,), (0,), (7, 12), (14, 15)])
def test_it_names_the_sites_that_cost(kind: str, bad: tuple[int, ...]) -> None:
    model = Tower().eval()
    original: Any = model if kind == "module" else torch.export.export(model, (X,))
    done = surgery.decompose(original, X, ranks=ranks(*bad), factorization="svd")
    before = {name: tensor.clone() for name, tensor in done.model.state_dict().items()} if kind == "module" else {}
    found = bisect(original, done.model, X, metric=nearness(model))
    worst = found.blames[: len(bad)]
    assert {blame.sites for blame in worst} == {(f"layers.{i}",) for i in bad}
    assert sum(blame.gain for blame in worst) == pytest.approx(found.loss, rel=1e-4)
    assert {site for blame in found.blames for site in blame.sites} == {change.site for change in done.changes}
    assert found.evaluations <= 2 + 2 * 4 * len(bad)  # halving 16 sites
    for name, tensor in before.items():
        assert torch.equal(done.model.state_dict()[name], tensor)


def test_gains_are_those_of_a_model_with_the_site_dense() -> None:
    model = Tower().eval()
    metric = closeness(model)
    chosen: dict[str, int | None] = {f"layers.{i}": 12 if i in (3, 9) else None for i in range(DEPTH)}
    done = surgery.decompose(model, X, ranks=chosen, factorization="svd")
    found = bisect(model, done.model, X, metric=metric, least=0.0)
    for blame in found.blames:
        (site,) = blame.sites
        without = surgery.decompose(model, X, ranks={**chosen, site: None}, factorization="svd")
        gain = metric(without.model) - metric(done.model)
        assert blame.gain == pytest.approx(gain, abs=tolerance(torch.float32, length=WIDTH, steps=DEPTH))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


@pytest.mark.parametrize("kind", ["module", "program"])
def test_one_projection_of_attention(kind: str) -> None:
    x, model = torch.randn(2, 5, 16), Attention().eval()
    original: Any = model if kind == "module" else torch.export.export(model, (x,))
    names = [f"attention.{part}" for part in ("in_proj_q", "in_proj_k", "in_proj_v", "out_proj")]
    done = surgery.decompose(
        original, x, ranks={name: 1 if name.endswith("_v") else 16 for name in names}, factorization="svd"
    )
    found = bisect(original, done.model, x, metric=closeness(model, x))
    assert found.blames[0].sites == ("attention.in_proj_v",)
    assert found.blames[0].gain == pytest.approx(found.loss, abs=100 * tolerance(torch.float32))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


@pytest.mark.parametrize("kind", ["module", "program"])
def test_one_weight_of_a_recurrent_layer(kind: str) -> None:
    x, model = torch.randn(2, 5, 16), Recurrent().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about itself
        original: Any = model if kind == "module" else torch.export.export(model, (x,))
    done = surgery.decompose(original, x, ranks={"rnn.ih_l0": 16, "rnn.hh_l0": 1}, factorization="svd")
    found = bisect(original, done.model, x, metric=closeness(model, x))
    assert found.blames[0].sites == ("rnn.hh_l0",)
    assert found.blames[0].gain == pytest.approx(found.loss, abs=100 * tolerance(torch.float32))


def test_nothing_lost_means_nobody_to_blame() -> None:
    model = Tower().eval()
    done = surgery.decompose(model, X, ranks=ranks(2), factorization="svd")
    found = bisect(model, done.model, X, metric=lambda module: 1.0)
    assert (found.loss, found.blames, found.evaluations) == (0.0, (), 2)


def test_what_costs_only_together_is_named_together() -> None:
    model = Tower().eval()
    done = surgery.decompose(model, X, ranks=ranks(2, 9), factorization="svd")
    dense = dict(model.named_parameters())

    def both(module: nn.Module) -> float:
        return float(
            all(torch.equal(module.get_parameter(n), dense[n]) for n in ("layers.2.weight", "layers.9.weight"))
        )

    found = bisect(model, done.model, X, metric=both)
    assert set(found.blames[0].sites) >= {"layers.2", "layers.9"}
    assert found.blames[0].gain == 1


def test_errors_are_clear() -> None:
    model = Tower().eval()
    done = surgery.decompose(model, X, ranks=ranks(2), factorization="svd")
    with pytest.raises(InputError, match="no site that was factored"):
        bisect(model, model, X, metric=closeness(model))
    with pytest.raises(InputError, match="metric"):
        bisect(model, done.model, X, metric=lambda module: module.nothing)
    with pytest.raises(InputError, match="no site that was factored"):
        bisect(nn.Sequential(nn.Linear(WIDTH, 3)), done.model, X, metric=lambda module: 1.0)


def run(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = torch.export.export(Tower().eval(), (X,))
    done = surgery.decompose(program, ranks=ranks(6), factorization="svd")
    model, factored, plan = tmp_path / "a.pt2", tmp_path / "b.pt2", tmp_path / "plan.json"
    surgery.save(program, model)
    surgery.save(done.model, factored)
    plan.write_text(done.plan.to_json())
    threshold = 0.99 * float(program.state_dict["layers.6.weight"].detach().norm())
    (tmp_path / "bisect_metric.py").write_text(
        f"def big(module):\n    return float(dict(module.named_parameters())['layers.6.weight'].norm() > {threshold})\n"
        "\n\ndef same(module):\n    return 0.0\n"
    )
    monkeypatch.chdir(tmp_path)
    for second in ((factored,), ("--plan", plan)):
        shown = run("bisect", model, *second, "--eval", "bisect_metric:big", "--json")
        assert shown.exception is None, shown.exception
        assert json.loads(shown.output)["blames"][0]["sites"] == ["layers.6"]
    assert "--exclude layers.6" in run("bisect", model, factored, "--eval", "bisect_metric:big").output
    assert "has cost nothing" in run("bisect", model, factored, "--eval", "bisect_metric:same").output
    for words in ((factored, "--plan", plan), ()):
        assert isinstance(run("bisect", model, *words, "--eval", "bisect_metric:big").exception, InputError)
    assert isinstance(run("bisect", model, factored, "--eval", "bisect_metric:none").exception, InputError)
    sys.modules.pop("bisect_metric")
