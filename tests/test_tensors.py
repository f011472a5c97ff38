"""Weights that cannot be computed with exactly are left alone with a reason, in every graph kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

import surgery
from surgery.errors import InputError
from surgery.kinds.layers.tensors import count, key_of, memory, refuse_tensor
from surgery.kinds.registry import open_model
from surgery.sites.find import find
from tests.zoo import export

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
]
KINDS = ("module", "graph", "program")


class Logged(Tensor):
    """A tensor that says itself what functions do with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Named(nn.Parameter):
    """A parameter that says nothing of its own."""


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3, 4)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "complex": (lambda: torch.ones(3, 4, dtype=torch.complex64), "is complex64"),
    "integers": (lambda: torch.ones(3, 4, dtype=torch.int8), "is int8, not floating point"),
    "bool": (lambda: torch.ones(3, 4, dtype=torch.bool), "is bool, not floating point"),
    "float8": (lambda: torch.ones(3, 4).to(torch.float8_e4m3fn), "is float8_e4m3fn, too coarse"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8), "is qint8"),
    "sparse": (lambda: torch.ones(3, 4).to_sparse(), "layout sparse_coo"),
    "sparse rows": (lambda: torch.ones(3, 4).to_sparse_csr(), "layout sparse_csr"),
    "mkldnn": (lambda: torch.ones(3, 4).to_mkldnn(), "layout mkldnn"),
    "lazy": (lambda: nn.LazyLinear(4).weight, "has no shape yet; run the model once"),
    "meta": (lambda: torch.ones(3, 4, device="meta"), "is on the meta device, without numbers; load"),
    "subclass": (lambda: torch.ones(3, 4).as_subclass(Logged), "is a Logged, not a plain tensor"),
}
PLAIN: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.ones(3, 4),
    "float16": lambda: torch.ones(3, 4, dtype=torch.float16),
    "bfloat16": lambda: torch.ones(3, 4, dtype=torch.bfloat16),
    "parameter": lambda: nn.Parameter(torch.ones(3, 4)),
    "subclass": lambda: Named(torch.ones(3, 4)),
    "buffer": lambda: nn.Buffer(torch.ones(3, 4)),
    "fake": fake,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, words = REFUSED[name]
    reason = refuse_tensor(make(), "bias")
    assert reason is not None
    assert reason.startswith("its bias ")
    assert words in reason


@pytest.mark.parametrize("name", PLAIN)
def test_not_refused(name: str) -> None:
    assert refuse_tensor(PLAIN[name]()) is None


@pytest.mark.parametrize("name", [*REFUSED, *PLAIN])
def test_all_can_be_counted_and_told_apart(name: str) -> None:
    tensor = REFUSED[name][0]() if name in REFUSED else PLAIN[name]()
    assert count([tensor]) == (0 if name == "lazy" else 12)
    assert key_of(tensor) == key_of(tensor)
    assert isinstance(memory(tensor), int)


def test_tied_parameters_have_one_identity() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    assert key_of(weight) == key_of(nn.Parameter(weight.data)) != key_of(weight.detach()[:2])


def test_a_lazy_module_counts_what_it_has() -> None:
    assert count(nn.Sequential(nn.LazyLinear(4), nn.Linear(3, 2))) == 8


def net(weight: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """Two layers in a row, of which the first has another weight."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    model[0].weight = nn.Parameter(weight(model[0].weight.detach()), requires_grad=False)
    return model


def as_kind(model: nn.Module, kind: str, x: Tensor) -> Any:
    if kind == "module":
        return model
    return torch.fx.symbolic_trace(model) if kind == "graph" else export(model, (x,))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "complex": lambda: (
        nn.Sequential(nn.Linear(16, 16, dtype=torch.complex64), nn.Linear(16, 8, dtype=torch.complex64)),
        torch.ones(4, 16, dtype=torch.complex64),
    ),
    "float8": lambda: (net(lambda w: w.to(torch.float8_e4m3fn)), torch.ones(4, 16)),
    "integers": lambda: (net(lambda w: w.to(torch.int8)), torch.ones(4, 16)),
    "meta": lambda: (
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).to("meta"),
        torch.ones(4, 16, device="meta"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_models_keep_such_layers(name: str, kind: str) -> None:
    module, x = MODELS[name]()
    model = as_kind(module, kind, x)
    sites, skips = surgery.find_sites(model, x)
    alone = {"0", "1"} if name in ("complex", "meta") else {"0"}
    assert {skip.name for skip in skips} == alone
    assert all(skip.reason.startswith("its weight is ") for skip in skips)
    assert {site.name for site in sites} == {"0", "1"} - alone
    assert not surgery.recompose(model, x).changes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["complex", "meta"])
def test_models_of_such_layers_alone_are_left_alone(name: str, kind: str) -> None:
    module, x = MODELS[name]()
    done = surgery.decompose(as_kind(module, kind, x), x, ranks=2, factorization="svd")
    assert not done.changes
    assert [skip.name for skip in done.skips] == ["0", "1"]


@pytest.mark.parametrize("kind", ["module", "graph"])
def test_a_bias_counts_as_well(kind: str) -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    module[0].bias = nn.Parameter(module[0].bias.detach().to(torch.complex64))
    x = torch.ones(4, 16)
    flow = open_model(as_kind(module, kind, x), ((x,), {})).flow
    shapes = dict.fromkeys(flow.users, (4, 16))  # torch does not run it
    found = find(replace(flow, shapes=shapes, input_shapes=shapes, macs=dict.fromkeys(flow.users, 0)))
    assert [placement.site.name for placement in found.placements] == ["1"]
    assert [skip.reason for skip in found.skips] == ["its bias is complex64; complex numbers are not handled"]


@pytest.mark.parametrize("kind", ["module", "graph"])
def test_a_sparse_layer_is_listed(kind: str) -> None:
    module = net(lambda w: w.relu().to_sparse_csr())
    sites, skips = surgery.find_sites(as_kind(module, kind, torch.ones(4, 16)), torch.ones(4, 16))
    assert [site.name for site in sites] == ["1"]
    assert [(skip.name, skip.operator, skip.parameters) for skip in skips] == [("0", "Linear", 272)]


def test_lazy_layers_stay_as_they_are() -> None:
    module = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 8))
    with pytest.raises(InputError, match="lazy layers without weights; run the model once"):
        surgery.find_sites(torch.fx.symbolic_trace(module), torch.ones(4, 16))
    assert type(module[0]) is nn.LazyLinear
    assert is_lazy(module.get_parameter("0.weight"))


def test_lazy_layers_of_modules_are_listed() -> None:
    module = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 8))
    sites, skips = surgery.find_sites(module, torch.ones(4, 16))
    assert [site.name for site in sites] == ["2"]
    assert [(skip.name, skip.operator, skip.parameters) for skip in skips] == [("0", "LazyLinear", 0)]
    assert "run the model once" in skips[0].reason
    assert is_lazy(module.get_parameter("0.weight"))
