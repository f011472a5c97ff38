"""What hangs on a layer comes along, through decompose and through recompose, or the layer is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from surgery.factorizations import FACTORIZATIONS
from surgery.kinds.layers.carried import CARRIED
from tests.tolerances import tolerance

Model = Any
KINDS: dict[str, Callable[[nn.Module, Any], Model]] = {
    "module": lambda net, x: net,
    "graph": lambda net, x: torch.fx.symbolic_trace(net),
    "aten-graph": lambda net, x: torch.export.export(net, (x,)).module(),
    "program": lambda net, x: torch.export.export(net, (x,)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
with_modules = pytest.mark.parametrize("kind", ["module", "graph"])
ALLOWED = tolerance(torch.float32, length=16, steps=8)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def state(model: Model) -> dict[str, Tensor]:
    return dict(model.state_dict if isinstance(model.state_dict, dict) else model.state_dict())


def run(model: Model, x: Tensor) -> Tensor:
    return (model.module() if isinstance(model, torch.export.ExportedProgram) else model)(x)


def both_ways(model: Model, x: Tensor, **options: Any) -> tuple[Model, Model]:
    """The model with all sites factored, and that recomposed."""
    options = {"ranks": "full", "factorization": "svd"} | options
    small = surgery.decompose(model, x, **options).model
    return small, surgery.recompose(small, x).model


def test_the_table_has_all_that_a_module_has() -> None:
    assert set(vars(nn.Module())) == set(CARRIED), "torch has something new: say in CARRIED how it is carried"


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 16), (4, 16)),
    "conv": (lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 5, 5)),
    "lstm": (lambda: nn.LSTM(16, 12), (5, 2, 16)),
    "attention": (lambda: nn.MultiheadAttention(16, 2), (5, 2, 16)),
}


class Alone(nn.Module):
    """One layer, called as layers of its class are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def hook_everything(layer: nn.Module, seen: list[str]) -> None:
    layer.register_forward_hook(lambda m, a, o: seen.append("forward"))
    layer.register_forward_hook(lambda m, a, k, o: seen.append("forward with kwargs"), with_kwargs=True)
    layer.register_forward_hook(lambda m, a, o: seen.append("always"), always_call=True)
    layer.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    layer.register_forward_pre_hook(lambda m, a, k: seen.append("pre with kwargs"), with_kwargs=True)
    layer.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    layer.register_full_backward_pre_hook(lambda m, o: seen.append("backward pre"))
    layer.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append("state"))
    layer.register_state_dict_post_hook(lambda m, s, prefix, local: seen.append("state post"))
    layer.register_load_state_dict_pre_hook(lambda m, *rest: seen.append(f"load {len(list(m.children())) >= 0}"))
    layer.register_load_state_dict_post_hook(lambda m, keys: seen.append("load post"))


@with_modules
@pytest.mark.parametrize("name", LAYERS)
def test_every_hook_fires_before_and_after(name: str, kind: str) -> None:
    build, shape = LAYERS[name]
    net, x, seen = Alone(build()), torch.randn(shape, requires_grad=True), list[str]()
    if kind == "graph" and name in ("lstm", "attention"):
        pytest.skip("torch.fx does not trace into the layer in a way that gives its outputs")
    host = KINDS[kind](net, x)
    hook_everything(host.layer, seen)

    def fired(model: Model) -> list[str]:
        seen.clear()
        run(model, x).sum().backward()
        model.load_state_dict(model.state_dict())
        return sorted(seen)

    wanted = fired(host)
    assert len(wanted) == 11
    small, back = both_ways(host, x)
    assert fired(small) == wanted
    assert fired(back) == wanted


def test_handles_still_remove_hooks_after_work_in_place() -> None:
    net, x, seen = mlp(), torch.randn(4, 16), list[int]()
    handle = net[0].register_forward_hook(lambda m, a, o: seen.append(1))
    for change in (surgery.decompose, surgery.recompose):
        options: dict[str, Any] = {"ranks": 3, "factorization": "svd"} if change is surgery.decompose else {}
        change(net, x, inplace=True, **options)
        seen.clear()
        net(x)
        assert seen == [1]
    handle.remove()
    net(x)
    assert seen == [1]


@every_kind
@pytest.mark.parametrize("trained", ["weight", "bias", "neither"])
def test_flags_of_weight_and_bias_are_kept_apart(kind: str, trained: str) -> None:
    net, x = mlp(), torch.randn(4, 16)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    small, back = both_ways(KINDS[kind](net, x), x)
    for model in (small, back):
        flags = {name: tensor.requires_grad for name, tensor in dict(model.named_parameters()).items()}
        assert flags == {name: name.endswith(trained) for name in flags}


@every_kind
def test_shared_biases_stay_shared(kind: str) -> None:
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(4, 16)
    net[2].bias = net[0].bias
    small, back = both_ways(KINDS[kind](net, x), x, ranks=3)
    for model in (small, back):
        biases = [tensor for name, tensor in state(model).items() if name.endswith("bias")]
        assert len(biases) == 2
        assert len({tensor.data_ptr() for tensor in biases}) == 1
    assert set(state(back)) == set(net.state_dict())


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_the_memory_format_of_weights_is_kept(factorization: str) -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # of modules, torch types it for four axes by position alone
    small, back = both_ways(net, torch.randn(2, 8, 9, 9), ranks=4, factorization=factorization)
    maps = [parameter for parameter in small.parameters() if parameter.dim() == 4]
    assert all(parameter.is_contiguous(memory_format=torch.channels_last) for parameter in maps)
    for name, parameter in back.named_parameters():
        assert parameter.stride() == net.get_parameter(name).stride()


@with_modules
def test_attributes_marks_and_bound_methods_come_along(kind: str) -> None:
    net, x = mlp(), torch.randn(4, 16)
    layer: Any = net[0]
    layer.group, layer._private, layer.weight.decay, layer.bias.decay = "first", {"a": 1}, 0.5, 0.0
    layer.area = (lambda self: self.in_features * self.out_features).__get__(layer)
    small, back = both_ways(KINDS[kind](net, x), x, ranks=3)
    for model in (small, back):
        new = model.get_submodule("0")
        assert (new.group, new._private, new.bias.decay, new.area()) == ("first", {"a": 1}, 0.0, 256)
        assert new.area.__self__ is new
        weights = [tensor for name, tensor in new.named_parameters() if name.endswith("weight")]
        assert all(tensor.decay == 0.5 for tensor in weights)


def test_marks_on_parameters_outside_of_sites_survive_the_copy() -> None:
    net, x = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), torch.randn(4, 16)
    net[1].weight.decay = 0.0
    assert surgery.decompose(net, x, ranks=3, factorization="svd").model[1].weight.decay == 0.0


def add_buffer(layer: nn.Module) -> None:
    layer.register_buffer("scale", torch.rand(16) + 0.5)
    layer.register_buffer("count", torch.zeros(()), persistent=False)
    layer.register_forward_pre_hook(lambda m, i: (i[0] / m.scale,))


def add_child(layer: nn.Module) -> None:
    layer.add_module("observer", nn.Linear(16, 16))
    layer.register_forward_hook(lambda m, i, o: m.observer(o))


def add_parameter(layer: nn.Module) -> None:
    layer.gain = nn.Parameter(torch.full((16,), 1.5))
    layer.register_forward_hook(lambda m, i, o: o * m.gain)


@with_modules
@pytest.mark.parametrize("add", [add_buffer, add_child, add_parameter])
def test_extras_of_a_layer_come_along_with_their_hooks(add: Callable[[nn.Module], None], kind: str) -> None:
    net, x = mlp(), torch.randn(4, 16)
    add(net[0])
    host = KINDS[kind](net, x)
    expected = run(host, x)
    small, back = both_ways(host, x, include=("0", "2"))
    assert relative_error(run(small, x), expected) <= ALLOWED
    assert relative_error(run(back, x), expected) <= ALLOWED
    assert set(state(back)) == set(state(host))
    surgery_layer = small.get_submodule("0")
    assert surgery_layer._non_persistent_buffers_set == net[0]._non_persistent_buffers_set


def patch(layer: Any) -> None:
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2


def hook_the_old_way(layer: nn.Module) -> None:
    layer.register_backward_hook(lambda m, i, o: None)


def hook_the_gradient(layer: nn.Module) -> None:
    layer.weight.register_hook(lambda g: g * 2)


def hook_after_the_gradient(layer: nn.Module) -> None:
    layer.weight.register_post_accumulate_grad_hook(lambda p: None)


def take_a_name(layer: nn.Module) -> None:
    layer.register_buffer("0", torch.zeros(1))


@pytest.mark.parametrize("add", [patch, hook_the_old_way, hook_the_gradient, hook_after_the_gradient, take_a_name])
def test_what_cannot_be_carried_is_a_skip(add: Callable[[nn.Module], None]) -> None:
    net, x = mlp(), torch.randn(4, 16)
    add(net[0])
    with torch.no_grad():
        expected = net(x)
    result = surgery.decompose(net, x, ranks={"0": 1, "2": 8}, factorization="svd", inplace=True)
    assert [change.site for change in result.changes] == ["2"]
    assert any(skip.name == "0" and skip.reason for skip in result.skips)
    with torch.no_grad():
        assert relative_error(net(x), expected) <= ALLOWED


@with_modules
@pytest.mark.parametrize("place", ["hook", "pre-hook", "forward"])
def test_layers_with_a_hook_between_them_are_not_one(place: str, kind: str) -> None:
    net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), torch.randn(4, 16)
    host = KINDS[kind](net, x)
    if place == "hook":
        host.get_submodule("0").register_forward_hook(lambda m, i, o: o.relu())
    elif place == "pre-hook":
        host.get_submodule("1").register_forward_pre_hook(lambda m, i: (i[0].relu(),))
    else:
        first = host.get_submodule("0")
        first.forward = lambda v: F.linear(v, first.weight, first.bias).relu()
    expected = run(host, x)
    result = surgery.recompose(host, x)
    assert not result.changes
    assert torch.equal(run(result.model, x), expected)
    small, back = both_ways(host, x)
    assert relative_error(run(small, x), expected) <= ALLOWED
    assert relative_error(run(back, x), expected) <= ALLOWED


def test_hooks_on_the_model_itself_are_dataflow() -> None:
    net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), torch.randn(4, 16)
    net.register_forward_pre_hook(lambda m, a: (a[0].relu(),))
    net.register_forward_hook(lambda m, a, o: o * 2)
    expected = net(x)
    for model in both_ways(net, x):
        assert relative_error(model(x), expected) <= ALLOWED
