"""Weights and biases that a graph computes: sites as others are, and put back as they were."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from surgery.algebra import relative_error
from surgery.errors import Refusal, UnsafeFileError
from surgery.factorizations import FACTORIZATIONS, fitting
from surgery.files.load import load
from surgery.files.save import save
from surgery.kinds.fx.nodes import function_name
from surgery.passes.decompose import decompose
from surgery.passes.preview import find_sites
from surgery.passes.recompose import recompose
from surgery.sites import Site
from tests.cases import decaying
from tests.tolerances import assert_close, tolerance
from tests.zoo import GRAPH_KINDS, call, export

WIDTH = 12


# --- layers that compute their bias ---------------------------------------------------------------------------------


class Beit(nn.Module):
    """The projection of BEiT and EVA: one weight for query, key and value, and a bias for two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.k_bias: Tensor
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def bias(self) -> Tensor:
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.bias()).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Swin(Beit):
    """The projection of Swin V2, which makes its zeros as it runs."""

    def bias(self) -> Tensor:
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))


class ScaledBias(nn.Module):
    """A convolution whose bias is scaled, as a StyleGAN has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 6, 3, 3))
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias * 0.5, stride=2, padding=1)


class FromInput(nn.Module):
    """A bias that depends on the input, and a product that adds it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 20))
        self.shift = nn.Parameter(torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.shift * x.mean(), x, self.weight)


class TwoBiases(nn.Module):
    """One weight that is called twice, with a bias each; one of them is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.first, self.second = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight, self.first * 2).relu()
        return F.linear(x, self.weight, self.second * 3) + x


# --- layers that compute their weight -------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    """A convolution with a standardised weight, as in BiT."""

    def computed(self) -> Tensor:
        flat = self.weight.flatten(1)
        deviation = (flat.var(1, unbiased=False, keepdim=True) + 1e-8).sqrt()
        return ((flat - flat.mean(1, keepdim=True)) / deviation).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(), self.bias, self.stride, self.padding)


class ScaledStandardised(Standardised):
    """timm's, with a gain, by a batch norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def computed(self) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-8).view_as(self.weight)


class Equalised(nn.Module):
    """StyleGAN's linear layer: scaled weight, scaled bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(20, WIDTH) * 100), nn.Parameter(torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.01, self.bias * 0.1)


class Half(nn.Module):
    """A weight that is stored in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, WIDTH).half())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(torch.float32))


class Lora(nn.Module):
    """A weight with the product of an adapter, not merged."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, 20)
        self.base.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(20, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + 0.1 * (self.b @ self.a), self.base.bias)


class Turned(nn.Module):
    """A product with a weight that is turned, scaled and shifted first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, WIDTH))
        self.register_buffer("shift", torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.t() * 3 + self.shift)


class Shared(nn.Module):
    """A computed weight that two calls use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 0.3
        return F.linear(F.linear(x, weight, self.bias).relu(), weight, self.bias)


@dataclass(frozen=True)
class Case:
    """A layer with example inputs; ``exact`` if the nodes can give every weight, ``traced`` if torch.fx sees them."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    site: str
    surplus: int = 0
    exact: bool = True
    traced: bool = True
    stored: torch.dtype = torch.float32

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        model = nn.Sequential(self.build(), nn.ReLU()).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name.endswith(("weight", "original1", "original")):
                parameter.data = decaying(parameter.data.float()).to(parameter.dtype)
        model.train()(torch.randn(2, *self.shape))  # the vectors of spectral norm turn to the largest direction
        model.eval()
        return model, (torch.randn(2, *self.shape),)


def conv(kind: type[nn.Conv2d]) -> nn.Module:
    return kind(6, WIDTH, 3, padding=1)


IMAGE = (6, 8, 8)
BIASES = {
    "beit": Case(Beit, (5, WIDTH), "0.qkv"),
    "swin": Case(Swin, (5, WIDTH), "0.qkv"),
    "scaled bias": Case(ScaledBias, IMAGE, "0"),
    "from input": Case(FromInput, (WIDTH,), "0"),
    "two biases": Case(TwoBiases, (WIDTH,), "0"),
}
WEIGHTS = {
    "standardised": Case(lambda: conv(Standardised), IMAGE, "0", exact=False),
    "scaled standardised": Case(lambda: conv(ScaledStandardised), IMAGE, "0", surplus=WIDTH, exact=False),
    "weight norm": Case(lambda: weight_norm(conv(nn.Conv2d)), IMAGE, "0", surplus=WIDTH, traced=False),
    "weight norm, linear": Case(lambda: weight_norm(nn.Linear(WIDTH, 20)), (WIDTH,), "0", surplus=20, traced=False),
    "weight norm, last axis": Case(
        lambda: weight_norm(nn.Conv1d(8, 8, 7, padding=3, groups=2), dim=2), (8, 9), "0", surplus=7, traced=False
    ),
    "spectral norm": Case(lambda: spectral_norm(nn.Linear(WIDTH, 20)), (WIDTH,), "0", exact=False, traced=False),
    "equalised": Case(Equalised, (WIDTH,), "0"),
    "half": Case(Half, (WIDTH,), "0", stored=torch.float16),
    "lora": Case(Lora, (WIDTH,), "0.base", surplus=2 * (WIDTH + 20)),
    "shared": Case(Shared, (WIDTH,), "0"),
    "turned": Case(Turned, (WIDTH,), "0"),
}
CASES = BIASES | WEIGHTS
KINDS = [kind for kind in GRAPH_KINDS if kind != "module"]
PAIRS = [(name, kind) for name in CASES for kind in KINDS if kind != "graph" or CASES[name].traced]


def of(name: str) -> pytest.MarkDecorator:
    """Mark a test for the process that takes all of a case."""
    return pytest.mark.xdist_group(f"computed {name}")


every_graph = pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*pair, id="-".join(pair), marks=[pytest.mark.law, of(pair[0])]) for pair in PAIRS]
)
every_program = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.law, of(n)]) for n in CASES])


@functools.cache
def graph(name: str, kind: str) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the case as this graph kind, made once a session: what it gives is not to be changed."""
    model, inputs = CASES[name].make()
    return GRAPH_KINDS[kind](model, inputs), inputs


def state(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict if isinstance(model, ExportedProgram) else model.state_dict())


def form(model: Any) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(t.shape), t.dtype, t.requires_grad) for name, t in state(model).items()}


def nodes(model: Any) -> list[str]:
    """What the nodes call; one name for a function of torch and its operator."""
    return [function_name(node) for node in model.graph.nodes if node.op not in ("placeholder", "get_attr")]


def allowed(model: Any, inputs: tuple[Tensor, ...]) -> float:
    longest = max(site.operator.kernel[0, 0].numel() for site in find_sites(model, inputs)[0])
    return tolerance(torch.float32, length=longest, steps=12)


def ranks(site: Site, factorization: str, share: float) -> tuple[int, ...] | None:
    fits = fitting(site.operator, factorization)
    if isinstance(fits, Refusal):
        return None
    return tuple(max(1, int(rank * share)) for rank in fits[0].max_ranks(site.operator))


def site_of(name: str, model: Any, inputs: tuple[Tensor, ...]) -> Site:
    return next(site for site in find_sites(model, inputs)[0] if site.name == CASES[name].site)


@every_graph
def test_it_is_a_site_with_its_true_costs(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    site = site_of(name, model, inputs)
    case = CASES[name]
    bias = 0 if site.operator.bias is None else site.operator.bias.numel()
    assert site.parameters == site.operator.weight.numel() + bias + case.surplus
    assert site.macs == sum(site.operator.macs(shape) for shape in site.input_shapes)
    result = decompose(model, inputs, ranks={site.name: ranks(site, "auto", 0.5)})
    for given, counted in ((model, result.before), (result.model, result.after)):
        unique = {t.data_ptr(): t.numel() for t in given.parameters()}
        assert sum(unique.values()) == counted.parameters


@every_graph
def test_full_rank_is_the_identity_and_comes_back(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    site, before, limit = site_of(name, model, inputs), call(model, inputs), allowed(model, inputs)
    old_form, old_nodes = form(model), nodes(model)
    for factorization in FACTORIZATIONS:
        full = ranks(site, factorization, 1)
        if full is None:
            continue
        result = decompose(model, inputs, ranks={site.name: full}, factorization=factorization)
        assert len(result.changes) == 1
        assert_close(call(result.model, inputs), before, limit)
        back = recompose(result.model)
        assert form(back.model) == old_form, "names, shapes and dtypes of the original"
        assert sorted(nodes(back.model)) == sorted(old_nodes), "and its nodes"
        assert_close(call(back.model, inputs), before, limit)
        assert back.changes[0].note == ""
    assert (form(model), nodes(model)) == (old_form, old_nodes), "the given model is as it was"
    assert torch.equal(call(model, inputs), before)


@every_graph
def test_a_low_rank_is_that_of_the_weight_and_comes_back_or_says_its_error(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    site, case = site_of(name, model, inputs), CASES[name]
    for factorization in FACTORIZATIONS:
        half = ranks(site, factorization, 0.5)
        if half is None:
            continue
        result = decompose(model, inputs, ranks={site.name: half}, factorization=factorization)
        found = call(result.model, inputs)
        back = recompose(result.model)
        assert form(back.model) == form(model)
        assert sorted(nodes(back.model)) == sorted(nodes(model))
        error = relative_error(call(back.model, inputs), found)
        (change,) = back.changes
        if change.note:
            assert not case.exact or case.stored is not torch.float32
            assert "relative weight error of" in change.note
            assert change.note in repr(back)
            assert error < (1 if case.stored is torch.float32 else tolerance(torch.float16, steps=4))
        else:
            assert error <= allowed(model, inputs)


@every_graph
def test_nothing_else_changes(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    site = site_of(name, model, inputs)
    result = decompose(model, inputs, ranks={site.name: ranks(site, "auto", 0.5)})
    before, after = state(model), state(result.model)
    kept = [key for key in before if key in after]
    assert all(torch.equal(before[key], after[key]) for key in kept)
    gone = [key for key in before if key not in after]
    moved = {f"{site.name}.bias"} & set(gone)
    own = {key for key in gone if key not in moved}
    assert sum(before[key].numel() for key in own) == site.operator.weight.numel() + CASES[name].surplus
    assert all(key.startswith(f"{site.name}.") for key in after if key not in before)
    used = {n for n in result.model.graph.nodes if n.op in ("call_function", "call_method")}
    assert all(n.users for n in used), "no node is left over"


@every_program
def test_a_saved_program_comes_back(name: str, tmp_path: Path) -> None:
    model, inputs = graph(name, "program-dynamic")
    site = site_of(name, model, inputs)
    result = decompose(model, inputs, ranks={site.name: ranks(site, "auto", 0.5)})
    save(result.model, tmp_path / "factored.pt2")
    loaded = load(tmp_path / "factored.pt2")
    assert torch.equal(call(loaded, inputs), call(result.model, inputs))
    larger = (torch.cat([inputs[0]] * 3),)
    assert call(loaded, larger).shape[0] == 6, "the batch is dynamic"
    back, own = recompose(loaded), recompose(result.model)
    assert form(back.model) == form(model)
    assert sorted(nodes(back.model)) == sorted(nodes(model))
    assert torch.equal(call(back.model, larger), call(own.model, larger))
    save(back.model, tmp_path / "back.pt2")
    assert torch.equal(call(load(tmp_path / "back.pt2"), larger), call(back.model, larger))
    assert "surgery" not in back.model.graph_module.meta


@every_program
def test_the_original_class_takes_what_comes_back(name: str) -> None:
    original, inputs = CASES[name].make()
    model = export(original, inputs)
    site = site_of(name, model, inputs)
    back = recompose(decompose(model, inputs, ranks={site.name: ranks(site, "auto", 0.5)}).model)
    fresh, _ = CASES[name].make()
    fresh.load_state_dict({k: v for k, v in state(back.model).items() if k in fresh.state_dict()}, strict=True)
    assert_close(call(fresh, inputs), call(back.model, inputs), allowed(model, inputs))


@every_graph
def test_a_chain_is_cut_again(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    site = site_of(name, model, inputs)
    fits = fitting(site.operator, "svd")
    method = "tt" if isinstance(fits, Refusal) else "svd"
    first = decompose(model, inputs, ranks={site.name: ranks(site, method, 0.75)}, factorization=method)
    second = decompose(first.model, inputs, ranks={site.name: ranks(site, method, 0.5)}, factorization=method)
    once = decompose(model, inputs, ranks={site.name: ranks(site, method, 0.5)}, factorization=method)
    assert form(second.model) == form(once.model)
    assert form(recompose(second.model).model) == form(model)


@every_graph
def test_calibration_sees_its_inputs(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    torch.manual_seed(1)
    batches = [tuple(torch.randn_like(x) for x in inputs) for _ in range(4)]
    result = decompose(
        model, inputs, ranks={CASES[name].site: ranks(site_of(name, model, inputs), "auto", 0.5)}, calibration=batches
    )
    assert len(result.changes) == 1
    assert torch.isfinite(call(result.model, inputs)).all()


# --- what is left alone ---------------------------------------------------------------------------------------------


class Left(nn.Module):
    """A linear layer whose weight is computed by a function of the layer and its input."""

    def __init__(self, weight: Callable[[Left, Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.other = nn.Parameter(torch.randn(width, width))
        self.register_buffer("count", torch.ones(1))
        self.width, self.compute = width, weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.compute(self, x)), self.other.sum()


def counted(layer: Left, x: Tensor) -> Tensor:
    layer.count.add_(1)
    return layer.weight / layer.count


def used_twice(layer: Left, x: Tensor) -> Tensor:
    return layer.weight * F.linear(x, layer.weight * 3).mean()


LEFT: dict[str, tuple[Callable[[Left, Tensor], Tensor], int, str]] = {
    "random": (lambda layer, x: F.dropout(layer.weight, 0.5, training=True), WIDTH, "random numbers"),
    "updated": (counted, WIDTH, "which the model updates"),
    "from the input": (lambda layer, x: layer.weight * x.mean(), WIDTH, "is computed by the graph"),
    "shared": (lambda layer, x: layer.other * 2, WIDTH, "also used by"),
    "two calls": (used_twice, WIDTH, "also used by"),
    "two large": (lambda layer, x: layer.weight + layer.other.abs(), 80, "also used by"),
    "a part": (lambda layer, x: layer.weight[:5] * 2, WIDTH, "parameters of other sizes"),
}
GRAPHS = [kind for kind in KINDS if kind != "program-dynamic"]


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize(("weight", "width", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left_alone_has_its_reason(
    weight: Callable[[Left, Tensor], Tensor], width: int, reason: str, kind: str
) -> None:
    if weight is counted and kind == "graph":
        return  # torch.fx runs it while it traces
    torch.manual_seed(0)
    inputs = (torch.randn(2, width),)
    model = GRAPH_KINDS[kind](Left(weight, width).eval(), inputs)
    sites, skips = find_sites(model, inputs)
    assert not sites
    assert any(reason in skip.reason for skip in skips), skips


def test_several_large_parameters_are_left_alone() -> None:
    class Two(nn.Linear):
        def __init__(self) -> None:
            super().__init__(80, 80)
            self.second = nn.Parameter(torch.randn(80, 80))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight + self.second)

    _, skips = find_sites(export(Two(), (torch.randn(2, 80),)))
    assert [skip.reason for skip in skips] == ["its weight is computed from several large parameters: weight, second"]


def test_a_bias_of_another_form_is_left_alone() -> None:
    class Rows(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(x * 2, x, self.weight)

    for kind in GRAPHS:
        inputs = (torch.randn(2, WIDTH),)
        _, skips = find_sites(GRAPH_KINDS[kind](Rows(WIDTH, WIDTH), inputs), inputs)
        assert "not one number for each output" in skips[0].reason


# --- beside others, and in other hands ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["aten-graph", "program"])
def test_a_site_that_stays_dense_is_as_it_was(kind: str) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(weight_norm(conv(nn.Conv2d)), nn.ReLU(), weight_norm(nn.Conv2d(WIDTH, 9, 3))).eval()
    inputs = (torch.randn(2, *IMAGE),)
    model = GRAPH_KINDS[kind](layers, inputs)
    result = decompose(model, inputs, ranks={"0": (3, 3)}, factorization="tucker")
    assert {name: shape for name, shape in form(result.model).items() if name.startswith("2.")} == {
        name: shape for name, shape in form(model).items() if name.startswith("2.")
    }
    assert nodes(result.model).count("_weight_norm") == 1
    back = recompose(result.model).model
    assert (form(back), sorted(nodes(back))) == (form(model), sorted(nodes(model)))


@pytest.mark.parametrize("kind", ["aten-graph", "program"])
def test_a_packed_projection_that_is_computed_is_left_alone(kind: str) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = weight_norm(nn.MultiheadAttention(WIDTH, 2, batch_first=True), "in_proj_weight")

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    inputs = (torch.randn(2, 5, WIDTH),)
    model = GRAPH_KINDS[kind](Attends().train(), inputs)
    result = decompose(model, inputs, ranks="full")
    assert [change.site for change in result.changes] == ["attention.out_proj"]
    assert any("packed weight" in skip.reason for skip in result.skips)
    assert_close(call(result.model, inputs), call(model, inputs), allowed(model, inputs))
    assert form(recompose(result.model).model) == form(model)


def test_layers_in_a_row_with_computed_weights_are_no_chain() -> None:
    model = export(
        nn.Sequential(weight_norm(nn.Linear(9, 7)), weight_norm(nn.Linear(7, 5))).eval(), (torch.randn(2, 9),)
    )
    result = recompose(model, everything=True)
    assert not result.changes
    assert nodes(result.model) == nodes(model)


def test_gradients_reach_the_factors_and_a_frozen_weight_stays_frozen() -> None:
    model, inputs = graph("weight norm", "aten-graph")
    model.get_parameter("0.parametrizations.weight.original1").requires_grad_(False)
    model.get_parameter("0.parametrizations.weight.original0").requires_grad_(False)
    result = decompose(model, inputs, ranks="full")
    assert not any(p.requires_grad for name, p in result.model.named_parameters() if name.endswith("weight"))
    assert form(recompose(result.model).model) == form(model)


def factored_program() -> tuple[ExportedProgram, dict[str, Any]]:
    model, inputs = graph("weight norm", "program")
    program = decompose(model, inputs, ranks="full").model
    record = program.graph_module.meta["surgery"]
    assert json.loads(json.dumps(record)) == record, "the record is JSON"
    own = copy.deepcopy(record)
    program.graph_module.meta["surgery"] = own
    return program, own["sites"]["0"]["computed"]


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.pop("recipe"),
        lambda kept: kept.update(main="nothing"),
        lambda kept: kept["recipe"].append({"op": "call_method", "target": "numpy", "args": {"tuple": [{"step": 0}]}}),
        lambda kept: kept["recipe"][-1]["args"].update(tuple=[{"step": 99}]),
        lambda kept: kept["parameters"][kept["main"]].update(shape=[10**9, 10**9]),
        lambda kept: kept["parameters"]["0.parametrizations.weight.original0"].update(value="AAAA"),
        lambda kept: kept["parameters"][kept["main"]].update(dtype="hub"),
    ],
)
def test_a_record_that_cannot_be_used_leaves_the_weight_as_a_parameter(change: Callable[[Any], Any]) -> None:
    program, kept = factored_program()
    before = call(program, CASES["weight norm"].make()[1])
    change(kept)
    back = recompose(program)
    assert "cannot be used" in back.changes[0].note
    assert "0.weight" in state(back.model)
    assert_close(
        call(back.model, CASES["weight norm"].make()[1]), before, tolerance(torch.float32, length=54, steps=12)
    )


@pytest.mark.parametrize("target", ["torch.ops.aten.save.default", "torch.hub.load", "_operator.methodcaller"])
def test_a_record_cannot_call_what_a_program_cannot(target: str) -> None:
    program, kept = factored_program()
    kept["recipe"][-1]["target"] = target
    with pytest.raises(UnsafeFileError):
        recompose(program)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["turned", "equalised", "lora", "weight norm, linear"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    model, inputs = CASES[name].make()
    model, inputs = model.to(dtype), tuple(x.to(dtype) for x in inputs)
    program = export(model, inputs)
    site = site_of(name, program, inputs)
    result = decompose(program, inputs, ranks={site.name: ranks(site, "svd", 0.5)}, factorization="svd")
    back = recompose(result.model)
    assert form(back.model) == form(program)
    assert_close(call(back.model, inputs), call(result.model, inputs), tolerance(dtype, length=WIDTH, steps=16))
    assert back.changes[0].note == ""


def test_a_model_without_numbers_is_looked_at() -> None:
    with FakeTensorMode():
        model = weight_norm(nn.Linear(WIDTH, 20))
        program = export(model, (torch.randn(2, WIDTH),))
    sites, _ = find_sites(program)
    assert [site.name for site in sites] == ["weight"]
