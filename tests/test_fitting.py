"""Fits to data: the bias that takes up the mean runs, groups never make it worse, and what is measured is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from surgery.errors import InputError
from surgery.kinds.inputs import normalise_inputs
from surgery.plans.goal import Goal
from surgery.runtime.compare import run_model
from tests.cases import decaying
from tests.covering import in_turns
from tests.test_calibration_models import as_kind

KINDS = ("module", "graph", "program", "program-dynamic")
LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(12, 9), torch.randn(64, 12, generator=torch.Generator().manual_seed(0)) + 2),
    "conv": (nn.Conv2d(6, 9, 1), torch.randn(32, 6, 4, 4, generator=torch.Generator().manual_seed(0)) + 2),
}


def outputs(model: Any, x: Tensor) -> Tensor:
    found: Tensor = run_model(model, normalise_inputs(x))
    return found


class Residual(nn.Module):
    """Layers with biases behind layer norms, on residual streams, as transformers have them."""

    def __init__(self, width: int = 24, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(blocks)])
        self.second = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(blocks)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(blocks)])
        for weight in [layer.weight for layer in (*self.first, *self.second)]:
            weight.data = decaying(3 * weight.data.double(), 0.8).float()

    def forward(self, x: Tensor) -> Tensor:
        for first, second, norm in zip(self.first, self.second, self.norms, strict=True):
            x = norm(x + second(torch.relu(first(x))))
        return x


def residual() -> tuple[Residual, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Residual().eval()
    mixing = torch.randn(24, 24) * torch.linspace(2, 0.1, 24)
    return model, torch.randn(160, 24) @ mixing + 1, torch.randn(500, 24) @ mixing + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_bias_that_takes_up_the_mean_is_in_the_model_that_runs(layer: str, kind: str) -> None:
    module, x = LAYERS[layer]
    batch = x[: len(x) // 4] if kind != "program-dynamic" else x[:4]
    model = as_kind(nn.Sequential(module).eval(), kind, batch)
    fit = surgery.decompose(
        model, batch, ranks=2, calibration=[x[i : i + len(batch)] for i in range(0, len(x), len(batch))]
    )
    bare = surgery.decompose(model, batch, ranks=2)
    assert [change.site for change in fit.changes] == ["0"]

    def seen(m: Any) -> Tensor:
        return torch.cat([outputs(m, part) for part in x.split(len(batch))]).transpose(0, 1).flatten(1)

    wanted, found, plain = (seen(m) for m in (model, fit.model, bare.model))
    off = float((found - wanted).mean(1).norm()), float((plain - wanted).mean(1).norm())
    assert off[0] < 0.3 * off[1]  # a quarter of the samples is held out of the fit
    back = surgery.recompose(fit.model, batch)
    assert relative_error(seen(back.model), found) <= 1e-5


@pytest.mark.parametrize("kind", ["module", "graph"])
def test_a_bias_that_two_layers_share_stays_shared(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)).eval()
    model[2].bias = model[0].bias
    x = torch.randn(64, 12) + 1
    result = surgery.decompose(as_kind(model, kind, x[:4]), x[:4], ranks=3, calibration=x)
    assert len(result.changes) == 2
    back = surgery.recompose(result.model, x[:4]).model
    biases = [tensor for name, tensor in back.state_dict().items() if name.endswith("bias")]
    assert all(torch.equal(bias, model.get_parameter("0.bias")) for bias in biases)


@pytest.mark.parametrize(("kind", "ranks"), in_turns(["module", "program-dynamic"], ["keep_params=0.5", 4]))
def test_no_number_of_groups_is_worse_than_no_data(kind: str, ranks: str | int) -> None:
    module, x, fresh = residual()
    model = as_kind(module, kind, x[:4])
    wanted = outputs(model, fresh)

    def error(**how: Any) -> float:
        result = surgery.decompose(model, x[:4], ranks=ranks, factorization="svd", **how)
        assert result.seen is not None
        assert result.changes
        return relative_error(outputs(result.model, fresh), wanted)

    plain = error()
    one, two, all_ = (error(calibration=x, groups=groups) for groups in (1, 2, None))
    assert one < 0.9 * plain
    assert max(two, all_) <= 1.02 * one  # judged on forty samples, so nearly


def test_what_is_seen_is_the_error_on_samples_that_were_held_out() -> None:
    model, x, fresh = residual()
    result = surgery.decompose(model, x[:4], ranks=6, calibration=x)
    assert result.seen is not None
    assert result.seen.what == "20 calibration samples"
    assert result.seen.error == pytest.approx(
        relative_error(outputs(result.model, fresh), outputs(model, fresh)), rel=0.15
    )
    assert str(result.seen) in repr(result)


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, "1 calibration sample that chains were fitted to, too few to hold any out"), (2, "1 calibration sample")],
)
def test_a_fit_that_is_judged_on_what_it_was_fitted_to_says_so(count: int, said: str) -> None:
    model, x, _ = residual()
    result = surgery.decompose(model, x[:4], ranks=6, calibration=x[:count])
    assert result.seen is not None
    assert result.seen.what == said


def test_a_rule_without_data_says_how_far_the_outputs_are() -> None:
    model, x, _ = residual()
    near, far = (surgery.decompose(model, x[:4], ranks=rank, factorization="svd") for rank in (23, 1))
    assert near.seen is not None
    assert far.seen is not None
    assert near.seen.error < 0.1
    assert "no longer" not in str(near.seen)
    assert far.seen.error > 0.3
    assert "the outputs are no longer those of the original" in repr(far)


class InPlace(nn.Module):
    """A residual connection in place, whose activation autograd would need as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 16)."""
        h = self.first(x).relu()
        return h.add_(self.second(h))


class Inferring(InPlace):
    """A model that turns gradients off for good."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 16)."""
        with torch.inference_mode():
            return super().forward(x)


@pytest.mark.parametrize("network", [InPlace, Inferring])
@pytest.mark.parametrize("asked", [{"ranks": 4}, {"ranks": Goal.error(0.5, cost="macs")}])
def test_what_cannot_be_differentiated_is_fitted_all_the_same(network: type[nn.Module], asked: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4) @ torch.randn(4, 16)
    assert surgery.decompose(network().eval(), x[:4], calibration=x, **asked).changes


def test_a_model_without_numbers_to_compare_is_refused() -> None:
    class Classes(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    x = torch.randn(64, 16)
    with pytest.raises(InputError, match="no floating-point output"):
        surgery.decompose(Classes().eval(), x[:4], calibration=x, ranks=Goal.error(0.3, cost="macs"))
