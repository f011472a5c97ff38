"""Factored modules that come back: saved without a pickle, loaded into a fresh module; structures without numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import InputError, SurgeryError
from surgery.factorizations import FACTORIZATIONS
from surgery.files.save import RECORD_KEY
from tests.zoo import ZOO, call


class Net(nn.Module):
    """Packed attention, a recurrent layer, tied weights, two layers on one value, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.rnn = nn.MultiheadAttention(16, 2, batch_first=True), nn.LSTM(16, 16, batch_first=True)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.q, self.k, self.norm = nn.Linear(16, 16), nn.Linear(16, 12), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.rnn(self.attention(x, x, x, need_weights=False)[0])[0])
        x = self.second(self.first(x).relu())
        return self.q(x).sum(-1) + self.k(x).sum(-1)


X = torch.linspace(-1, 1, 240).view(3, 5, 16)
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"ranks": 3, "factorization": name} for name in FACTORIZATIONS},
    "joint": {"ranks": "energy=0.8", "joint": [("q", "k")]},
}


def parameters(model: nn.Module) -> int:
    return len(list(model.parameters()))


@pytest.fixture(params=WAYS)
def result(request: pytest.FixtureRequest) -> Any:
    return surgery.decompose(Net().eval(), X, **WAYS[request.param])


def test_a_plan_gives_a_fresh_model_the_structure(result: Any) -> None:
    fresh = Net()
    assert surgery.apply(result.plan, fresh) is fresh
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh.eval()(X), result.model(X))
    assert parameters(fresh) == parameters(result.model)
    with torch.device("meta"):
        empty = surgery.apply(result.plan, Net())
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}


@pytest.mark.law(4)
@pytest.mark.parametrize("given", ["factory", "module", "name"])
def test_a_saved_module_is_the_same_in_a_fresh_one(result: Any, given: str, tmp_path: Path) -> None:
    surgery.save(result.model, tmp_path / "net.safetensors")
    model: Any = {"factory": Net, "module": Net(), "name": "tests.test_structure:Net"}[given]
    loaded: Any = surgery.load(tmp_path / "net.safetensors", model=model)
    assert loaded is model or given != "module"
    assert torch.equal(loaded(X), result.model(X))
    assert parameters(loaded) == parameters(result.model)
    back = surgery.recompose(loaded, X).model
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in Net().state_dict().items()}


@pytest.mark.parametrize("name", ["resnet-basic", "cnn-1d", "unet", "tied", "two-names", "recurrent", "hf-gpt2"])
def test_modules_of_the_zoo_come_back(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name]()
    small = surgery.decompose(model, inputs, ranks="energy=0.9").model
    surgery.save(small, tmp_path / "net")
    loaded = surgery.load(tmp_path / "net", model=lambda: ZOO[name]()[0])
    expected, found = call(small, inputs), call(loaded, inputs)
    assert torch.equal(found.logits, expected.logits) if name == "hf-gpt2" else torch.equal(found, expected)


def test_flags_come_from_the_dense_layers(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        net[0].weight.requires_grad_(False)
        return net

    small = surgery.decompose(frozen(), torch.randn(2, 16), ranks=3, factorization="svd").model
    surgery.save(small, tmp_path / "net")
    loaded: Any = surgery.load(tmp_path / "net", model=frozen)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in small.named_parameters()
    }


def saved(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    surgery.save(surgery.decompose(net, torch.randn(2, 16), ranks=3, factorization="svd").model, tmp_path / "net")
    return tmp_path / "net"


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


SITE = {"factorization": "svd", "rank": [3]}
RECORDS: dict[str, Any] = {
    "no JSON": "{",
    "a list": [],
    "a version": {"version": 7},
    "sites": {"version": 1, "sites": [1]},
    "a method": {"version": 1, "sites": {"0": {"factorization": "__class__", "rank": [3]}}},
    "a list as method": {"version": 1, "sites": {"0": {"factorization": [], "rank": [3]}}},
    "a rank": {"version": 1, "sites": {"0": {"factorization": "svd", "rank": ["3"]}}},
    "a true rank": {"version": 1, "sites": {"0": {"factorization": "svd", "rank": [True]}}},
    "no rank": {"version": 1, "sites": {"0": {"factorization": "svd", "rank": []}}},
    "many ranks": {"version": 1, "sites": {"0": {"factorization": "svd", "rank": [3, 3]}}},
    "a huge rank": {"version": 1, "sites": {"0": {"factorization": "svd", "rank": [10**9]}}},
    "another rank": {"version": 1, "sites": {"0": {"factorization": "svd", "rank": [4]}, "2": SITE}},
    "no such layer": {"version": 1, "sites": {"7": SITE}},
    "no layer": {"version": 1, "sites": {"1": SITE}},
    "the root": {"version": 1, "sites": {"": SITE}},
    "a part": {"version": 1, "sites": {"0": SITE}},
    "ties": {"version": 1, "sites": {"0": SITE, "2": SITE}, "ties": "0.weight"},
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_damaged_record_is_one_error_and_changes_nothing(record: Any, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(saved(tmp_path))
    text = record if isinstance(record, str) else json.dumps(record)
    (tmp_path / "bad").write_bytes(safetensors.torch.save(tensors, {RECORD_KEY: text}))
    model = small_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError) as caught:
        surgery.load(tmp_path / "bad", model=model)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "bad") in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_ties_of_a_stranger_change_no_numbers(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(saved(tmp_path))
    record = {"version": 1, "sites": {"0": SITE, "2": SITE}, "ties": [["0.0.weight", "2.0.weight", "no.such"]]}
    (tmp_path / "tied").write_bytes(safetensors.torch.save(tensors, {RECORD_KEY: json.dumps(record)}))
    loaded: Any = surgery.load(tmp_path / "tied", model=small_net)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tensors.items())


WRONG: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "no model": (lambda plan, path: surgery.load(path), "model="),
    "another model": (lambda plan, path: surgery.load(path, model=lambda: nn.Linear(3, 3)), "does not have"),
    "another shape": (lambda plan, path: surgery.load(path, model=lambda: nn.Sequential(nn.Linear(9, 9))), "names"),
    "factored": (lambda plan, path: surgery.apply(plan, surgery.apply(plan, small_net())), "factored already"),
    "a graph": (lambda plan, path: surgery.apply(plan, torch.fx.symbolic_trace(small_net())), "a graph cannot"),
}


@pytest.mark.parametrize(("act", "says"), WRONG.values(), ids=WRONG)
def test_wrong_models_are_refused_in_one_line(act: Callable[[Any, Path], object], says: str, tmp_path: Path) -> None:
    plan = surgery.decompose(small_net(), torch.randn(2, 16), ranks=3, factorization="svd").plan
    with pytest.raises(InputError, match=says):
        act(plan, saved(tmp_path))


def test_a_dense_module_is_saved_and_loaded_too(tmp_path: Path) -> None:
    net = Net().eval()
    surgery.save(net, tmp_path / "dense")
    loaded: Any = surgery.load(tmp_path / "dense", model=Net)
    assert torch.equal(loaded(X), net(X))
