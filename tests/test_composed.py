"""The weight of a factored layer, as other code reads it: the right numbers, or an error, never other numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from surgery.errors import InputError
from surgery.factorizations import FACTORIZATIONS
from tests.tolerances import tolerance

ALLOWED = tolerance(torch.float32, length=16, steps=8)


class Net(nn.Module):
    """A layer whose weight is read beside ``forward``, and one whose dtype is read in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())

    def prototypes(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight, self.a.bias)


@pytest.fixture
def factored() -> tuple[Net, Any, Tensor]:
    net, x = Net(), torch.randn(4, 16)
    return net, surgery.decompose(net, x, ranks="full", factorization="svd").model, x


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_it_is_what_the_chain_stands_for(factorization: str) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 12))
    small = surgery.decompose(net, torch.randn(2, 8, 4, 4), ranks=2, factorization=factorization).model
    back = surgery.recompose(small, torch.randn(2, 8, 4, 4)).model
    for place in ("0", "2"):
        weight, whole = small.get_submodule(place).weight, back.get_submodule(place).weight
        assert (weight.shape, weight.dtype) == (whole.shape, whole.dtype)
        assert torch.equal(weight.detach() + 0, whole.detach())


def test_reads_are_right_and_differentiable(factored: tuple[Net, Any, Tensor]) -> None:
    net, small, x = factored
    assert relative_error(small.prototypes(x), net.prototypes(x)) <= ALLOWED
    small.prototypes(x).sum().backward()
    assert all(factor.grad is not None for factor in small.a.parameters())
    assert small.a.bias is dict(small.named_parameters())["a.1.bias"]
    weight = small.a.weight
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.device.type, weight.ndim) == (net.a.weight.shape, x.dtype, "cpu", 2)
    assert relative_error(weight.data.t()[3] * 1, net.a.weight.t()[3]) <= ALLOWED
    assert "weight" not in small.a.state_dict()


def test_its_numbers_can_be_taken_elsewhere(factored: tuple[Net, Any, Tensor]) -> None:
    net, small, x = factored
    other = nn.Linear(16, 16)
    other.weight.data = small.a.weight.data
    other.bias.data = small.a.bias.data
    assert relative_error(other(x), net.a(x)) <= ALLOWED
    copied = copy.deepcopy(small.a.weight)
    assert relative_error(copied, net.a.weight) <= ALLOWED
    copied.zero_()
    assert relative_error(small(x), net(x)) <= ALLOWED
    assert relative_error(torch.from_numpy(small.a.weight.detach().numpy()), net.a.weight) <= ALLOWED


WRITES: dict[str, Callable[[Any], object]] = {
    "add_ to data": lambda layer: layer.weight.data.add_(1),
    "in place": lambda layer: exec("layer.weight.data += 1", {"layer": layer}),
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(16, 16)),
    "a row": lambda layer: layer.weight[0].zero_(),
    "a view": lambda layer: layer.weight.t()[1].fill_(0),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(16, 16)),
    "item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "out": lambda layer: torch.add(torch.ones(16, 16), 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 1),
    "flag": lambda layer: layer.weight.requires_grad_(False),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(16, 16))),
    "bias": lambda layer: setattr(layer, "bias", None),
    "optimizer": lambda layer: torch.optim.SGD([layer.weight]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_are_refused(factored: tuple[Net, Any, Tensor], write: Callable[[Any], object]) -> None:
    _, small, x = factored
    before = small(x)
    with torch.no_grad(), pytest.raises(ValueError, match=r"factored|non-leaf"):
        write(small.a)
    assert torch.equal(small(x), before)


def test_a_factor_with_an_adapter_has_no_weight_to_read(factored: tuple[Net, Any, Tensor]) -> None:
    _, small, x = factored
    small.a.add_module("0", nn.Sequential(small.a[0], nn.Identity()))
    assert small.a.weight.dtype == torch.float32
    with pytest.raises(InputError, match="not a plain layer"):
        small.a.weight.sum()
    assert surgery.recompose(small, x).skips[0].reason.startswith("its factor 0 is Sequential")


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_that_is_loaded_is_the_one_that_is_read(factored: tuple[Net, Any, Tensor], assign: bool) -> None:
    _, small, x = factored
    other = surgery.decompose(Net(), x, ranks="full", factorization="svd").model
    small.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=assign)
    assert torch.equal(small(x), other(x))
    assert torch.equal(small.prototypes(x), other.prototypes(x))
    assert torch.equal(surgery.recompose(small, x).model(x), surgery.recompose(other, x).model(x))


def test_it_compiles_in_one_graph(factored: tuple[Net, Any, Tensor]) -> None:
    net, small, x = factored

    class Reads(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner: Any = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(self.inner.a.weight.dtype)) + self.inner.prototypes(x)[:, :8]

    compiled = torch.compile(Reads(small), backend="eager", fullgraph=True)
    assert relative_error(compiled(x), Reads(net)(x)) <= ALLOWED


def test_a_transformer_with_some_layers_factored_takes_no_fast_path_past_them() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    small = surgery.decompose(encoder, x, ranks="full", factorization="svd", include=("linear1",)).model
    with torch.no_grad():
        assert relative_error(small(x), encoder(x)) <= ALLOWED
