"""Layers of classes of users' own: what they do around their operator stays, and they come back as themselves."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import surgery
from surgery.algebra import relative_error
from surgery.kinds.layers.factored import Factored
from surgery.passes.results import DecomposeResult
from tests.covering import in_turns

ROUNDING = 64 * torch.finfo(torch.float32).eps


class StaticSame(nn.Conv2d):
    """Pads by a module of its own, as EfficientNet-Lite does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class DynamicSame(nn.Conv2d):
    """Pads as TensorFlow's SAME does, by the shape of the input."""

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, k, s in zip(x.shape[-2:], self.weight.shape[-2:], self.stride, strict=True):
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            sides.append((total // 2, total - total // 2))
        if any(map(any, sides)):
            x = F.pad(x, [*sides[1], *sides[0]])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class OddSame(nn.Conv2d):
    """Gives the operator another padding with each size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        size, k, s = x.size(2), self.weight.size(2), self.stride[0]
        total = max(0, ((size + s - 1) // s - 1) * s + k - size)
        if total % 2:
            x = F.pad(x, [0, 1, 0, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=(total // 2, total // 2))


class Causal(nn.Conv1d):
    """Pads on the left alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Cropped(nn.Conv1d):
    """Pads on both sides and cuts the right off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : -int(self.padding[0])]


class Standardised(nn.Conv2d):
    """Gives each output channel of the weight mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        spread = centred.view(centred.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, centred / spread, self.bias, self.stride, self.padding)


class GainStandardised(nn.Conv2d):
    """The same with a learned gain, computed by a batch norm, as in timm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class EqualLinear(nn.Linear):
    """Scales its weight and its bias, as StyleGAN does."""

    def __init__(self, inputs: int, outputs: int, rate: float = 0.5) -> None:
        super().__init__(inputs, outputs)
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualConv(nn.Conv2d):
    """Scales its weight by a buffer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("factor", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.factor, self.bias, self.stride, self.padding)


class Named(nn.Linear):
    """Computes as nn.Linear does, and has a method and an attribute more, and other arguments."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 24)
        self.label = {"size": size}

    def describe(self) -> str:
        return str(self.label)


class Casting(nn.Linear):
    """Changes what comes in and what goes out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype) * 2).float() * 0.5 + 1


class ScaledOutput(nn.Linear):
    """Has a parameter that is no part of its operator."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.alpha = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.alpha


class Product(nn.Linear):
    """Multiplies by its transposed weight, and adds its bias itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class ScaledEmbedding(nn.Embedding):
    """Scales what it looks up."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * math.sqrt(self.embedding_dim)


class Trimmed(nn.ConvTranspose2d):
    """Cuts the first row and column off."""

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return super().forward(x)[..., 1:, 1:]


def old(make: Callable[..., nn.Module], *args: Any, name: str) -> nn.Module:
    with pytest.warns(FutureWarning) if name == "weight_norm" else contextlib.nullcontext():
        normed: nn.Module = getattr(nn.utils, name)(make(*args))
    return normed


IMAGE, SERIES, ROWS = (2, 8, 17, 17), (2, 8, 20), (3, 16)
# name -> the layer, the shape of its input, its full rank by svd, and the shape of its operator's input
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, tuple[int, ...]]] = {
    "static same": (lambda: StaticSame(8, 16, 3, stride=2), IMAGE, 16, (2, 8, 18, 18)),
    "dynamic same": (lambda: DynamicSame(8, 16, 3, stride=2), IMAGE, 16, (2, 8, 19, 19)),
    "odd same": (lambda: OddSame(8, 16, 5, stride=2), IMAGE, 16, (2, 8, 21, 21)),
    "causal": (lambda: Causal(8, 16, 3, dilation=2), SERIES, 16, (2, 8, 24)),
    "cropped": (lambda: Cropped(8, 16, 3, padding=2), SERIES, 16, SERIES),
    "standardised": (lambda: Standardised(8, 16, 3, padding=1), IMAGE, 16, IMAGE),
    "gain standardised": (lambda: GainStandardised(8, 16, 3, padding=1), IMAGE, 16, IMAGE),
    "equal linear": (lambda: EqualLinear(16, 24), ROWS, 16, ROWS),
    "equal conv": (lambda: EqualConv(8, 16, 3, padding=1), IMAGE, 16, IMAGE),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 16, 3)), IMAGE, 16, IMAGE),
    "weight norm of columns": (lambda: parametrizations.weight_norm(nn.Linear(16, 24), dim=1), ROWS, 16, ROWS),
    "weight norm, causal": (lambda: parametrizations.weight_norm(Causal(8, 16, 3)), SERIES, 16, (2, 8, 22)),
    "old weight norm": (lambda: old(nn.Conv1d, 8, 16, 3, name="weight_norm"), SERIES, 16, SERIES),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(8, 16, 3)), IMAGE, 16, IMAGE),
    "old spectral norm": (lambda: old(nn.Linear, 16, 24, name="spectral_norm"), ROWS, 16, ROWS),
    "named": (lambda: Named(16), ROWS, 16, ROWS),
    "casting": (lambda: Casting(16, 24), ROWS, 16, ROWS),
    "scaled output": (lambda: ScaledOutput(16, 24), ROWS, 16, ROWS),
    "product": (lambda: Product(16, 24), ROWS, 16, ROWS),
    "scaled embedding": (lambda: ScaledEmbedding(50, 16), (2, 5), 16, (2, 5)),
    "trimmed": (lambda: Trimmed(8, 16, 3, stride=2), IMAGE, 16, IMAGE),
}


class Net(nn.Module):
    """A layer between others."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = layer, nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class Branching(Net):
    """The same with a branch that torch.fx does not trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 100 else super().forward(x)


class Watched(Net):
    """The same with a branch that nothing captures."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.float().sum()) > 1e9 else super().forward(x)


def make(name: str, kind: type[Net] = Net) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    build, shape, *_ = CASES[name]
    model = kind(build()).eval()
    with torch.no_grad():
        x = torch.randint(0, 50, shape) if isinstance(model.layer, nn.Embedding) else torch.randn(shape)
    return model, x


def lower(model: nn.Module, x: Tensor, rank: int = 5) -> DecomposeResult[Any]:
    return surgery.decompose(model, x, ranks={"layer": rank}, factorization="svd")


@pytest.mark.parametrize("name", CASES)
def test_full_rank_is_the_identity_and_comes_back(name: str) -> None:
    model, x = make(name)
    result = lower(model, x, CASES[name][2])
    assert [c.site for c in result.changes] == ["layer"]
    assert relative_error(result.model(x), model(x)) <= ROUNDING
    back = surgery.recompose(result.model, x).model
    assert relative_error(back(x), model(x)) <= ROUNDING


@pytest.mark.parametrize("name", CASES)
def test_the_layer_comes_back_as_itself(name: str) -> None:
    model, x = make(name)
    small = lower(model, x).model
    assert isinstance(small.layer, Factored)
    result = surgery.recompose(small, x)
    back, fresh = result.model, make(name)[0]
    assert type(back.layer).__name__ == type(model.layer).__name__
    assert isinstance(back.layer, type(model.layer).__bases__[0])
    expected = {key: (value.shape, value.dtype) for key, value in fresh.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in back.state_dict().items()} == expected
    assert list(back.state_dict()) == list(expected)
    fresh.load_state_dict(back.state_dict(), strict=True)
    assert relative_error(fresh(x), small(x)) <= ROUNDING
    assert [change.note for change in result.changes] == [""]
    assert {k for k in vars(model.layer) if not k.startswith("_")} == {
        k for k in vars(back.layer) if not k.startswith("_")
    }


@pytest.mark.parametrize(("name", "kind"), in_turns(list(CASES), [Net, Branching, Watched]))
def test_sites_and_totals_are_right_however_the_model_is_captured(name: str, kind: type[Net]) -> None:
    model, x = make(name, kind)
    found = surgery.find_sites(model, x)[0]
    assert [site.name for site in found] == ["layer"]
    assert found[0].input_shapes == (CASES[name][3],)
    result = lower(model, x)
    assert result.before.parameters == sum(p.numel() for p in model.parameters())
    assert result.after.parameters == sum(p.numel() for p in result.model.parameters())
    back = surgery.recompose(result.model, x).model
    assert relative_error(back(x), result.model(x)) <= ROUNDING


@pytest.mark.parametrize("name", CASES)
def test_what_is_factored_exports_copies_pickles_and_trains(name: str) -> None:
    model, x = make(name)
    small = lower(model, x).model
    expected = small(x)
    assert relative_error(torch.export.export(small, (x,)).module()(x), expected) <= ROUNDING
    assert torch.equal(copy.deepcopy(small)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)
    small.train()
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("name", CASES)
def test_the_state_fits_a_fresh_model_with_the_plan(name: str) -> None:
    model, x = make(name)
    result = lower(model, x)
    fresh = surgery.apply(result.plan, make(name)[0])
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert torch.equal(fresh(x), result.model(x))


@pytest.mark.parametrize("name", ["static same", "weight norm", "equal linear", "old spectral norm", "odd same"])
def test_a_chain_is_cut_again(name: str) -> None:
    model, x = make(name)
    small = lower(model, x).model
    again = surgery.decompose(small, x, ranks={"layer": 3})
    assert [(c.site, c.rank) for c in again.changes] == [("layer", (3,))]
    assert again.after.parameters == sum(p.numel() for p in again.model.parameters())
    back = surgery.recompose(again.model, x).model
    assert relative_error(back(x), again.model(x)) <= ROUNDING


@pytest.mark.parametrize("name", ["dynamic same", "odd same"])
def test_padding_follows_the_input_after_surgery(name: str) -> None:
    model, x = make(name)
    full = lower(model, x, CASES[name][2]).model
    for size in (16, 17, 18, 23):
        other = torch.randn(1, 8, size, size)
        assert relative_error(full(other), model(other)) <= ROUNDING


@pytest.mark.parametrize("name", ["static same", "causal", "weight norm", "equal linear"])
def test_calibration_sees_what_the_operator_gets(name: str) -> None:
    model, x = make(name)
    batches = [torch.randn_like(x) for _ in range(8)]
    plain = lower(model, x).model
    fitted = surgery.decompose(model, x, ranks={"layer": 5}, factorization="svd", calibration=batches).model
    errors = [sum(relative_error(net(b), model(b)) for b in batches) for net in (plain, fitted)]
    assert errors[1] <= errors[0] * (1 + ROUNDING)


def test_hooks_and_flags_go_along_and_come_back() -> None:
    model, x = make("weight norm, causal")
    seen: list[tuple[int, ...]] = []
    model.layer.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    model.layer.get_parameter("parametrizations.weight.original0").requires_grad_(False)
    small = lower(model, x).model
    small(x)
    back = surgery.recompose(small, x).model
    back(x)
    assert len(seen) >= 2
    assert not back.layer.parametrizations.weight.original0.requires_grad
    assert back.layer.parametrizations.weight.original1.requires_grad


def test_a_model_goes_on_calling_the_methods_of_a_factored_layer() -> None:
    model, x = make("named")
    small = lower(model, x).model
    assert small.layer.describe() == model.layer.describe()
    assert not hasattr(small.layer, "reset_parameters")
    assert surgery.recompose(small, x).model.layer.label == {"size": 16}


class Returns(nn.Linear):
    """Gives the norm of its weight away."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.weight.norm()


class Twice(nn.Linear):
    """Uses its weight twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.weight)


class Regularised(nn.Linear):
    """Multiplies by the norm of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.norm()


class Modulated(nn.Linear):
    """Makes its weight of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean(), self.bias)


class Adapted(nn.Linear):
    """Has an adapter beside its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(4, inputs)), nn.Parameter(torch.randn(outputs, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.t() @ self.b.t()


class Merged(Adapted):
    """Has an adapter in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class Rounded(nn.Linear):
    """Quantizes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 127
        return F.linear(x, torch.round(self.weight / step) * step, self.bias)


class Dropping(nn.Linear):
    """Drops numbers of its weight in training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Clipped(nn.Linear):
    """Writes to its weight."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
        return super().forward(x)


class Keeping(nn.Linear):
    """Keeps what it computes of its weight for a loss."""

    def forward(self, x: Tensor) -> Tensor:
        self.penalty = self.weight.pow(2).sum()
        return super().forward(x)


class Exponential(nn.Linear):
    """Computes a weight that not every weight is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.exp(), self.bias)


class Borrowing(nn.Linear):
    """Uses the weight of another layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.others = [nn.Linear(inputs, outputs)]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.others[0].weight, self.bias)


@pytest.mark.parametrize(
    "kind",
    [
        *(Returns, Twice, Regularised, Modulated, Adapted, Merged),
        *(Rounded, Dropping, Clipped, Keeping, Exponential, Borrowing),
    ],
)
def test_what_cannot_be_factored_rightly_is_left_alone(kind: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(16, 24)).eval(), torch.randn(3, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = surgery.decompose(model, x, ranks=2)
    assert not result.changes
    assert result.skips
    assert type(result.model[0]) is kind
    if kind is not Clipped:  # which writes to its weight in each run
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_no_parameters_give_a_standardised_weight_of_another_mean_and_the_note_says_so() -> None:
    torch.manual_seed(0)
    model, x = Net(Standardised(8, 16, 3, padding=1)).eval(), torch.randn(IMAGE)
    small: Any = surgery.decompose(model, x, ranks={"layer": (3, 3)}, factorization="tucker").model
    result = surgery.recompose(small, x)
    words = result.changes[0].note
    assert "relative error" in words
    assert words in repr(result)
    assert float(words.split()[-1]) == pytest.approx(
        relative_error(weight_in(result.model.layer), small.layer.weight), rel=0.05
    )


def weight_in(layer: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    kept = F.conv2d

    class Seeing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is kept:
                seen.append(args[1])
            return func(*args, **(kwargs or {}))

    with Seeing(), torch.no_grad():
        layer(torch.randn(IMAGE))
    return seen[0]
