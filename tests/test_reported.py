"""What is reported happened: the returned model runs each chain that it lists, however the model reaches its layers.

And decompose works on every model that runs: where no graph can be captured, its calls are watched.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import surgery
from surgery.algebra import Chain, Linear, relative_error
from surgery.errors import CheckError, InputError, SurgeryError
from surgery.factorizations import FACTORIZATIONS
from surgery.kinds.registry import open_model
from surgery.sites import Entry, Replace
from surgery.sites.find import find
from tests.test_carried import KINDS, run, state
from tests.tolerances import tolerance

ALLOWED = tolerance(torch.float32, length=16, steps=16)
X = torch.linspace(-1, 1, 64).view(4, 16)


class Layers(nn.Module):
    """Layers that ``forward`` does not call by their registered names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)


class InLists(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.table, self.nest = [self.a], {"b": self.b}, (([self.b],),)

    def forward(self, x: Tensor) -> Tensor:
        for row in self.rows:
            x = row(x).relu()
        return self.table["b"](x) + self.nest[0][0][0](x)


class InAttributes(Layers):
    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "hidden", self.a)
        self.run, self.part = self.b.__call__, functools.partial(self.b)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x).relu()
        return self.run(x) + self.part(x)


class InClosure(Layers):
    def __init__(self) -> None:
        super().__init__()
        a = self.a
        self.run = lambda x: a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.run(x).relu())


class Both(Layers):
    """One layer, called by its name and from a closure."""

    def __init__(self) -> None:
        super().__init__()
        a = self.a
        self.run = lambda x: a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.run(x).relu() + self.a(x))


class Patched(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.a.forward = MethodType(lambda m, x: F.linear(x, m.weight, m.bias) * 2, self.a)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class PatchedAround(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16))
        vars(self.block)["forward"] = lambda x: F.linear(x, self.block.get_parameter("0.weight")) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.block(x)).relu())


class Writes(Layers):
    """A model that does not run once a layer is factored."""

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data.mul_(1.0)
        return self.b(self.a(x).relu())


class Depends(Layers):
    """Control flow that depends on data, which no graph has."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(int(x.abs().sum()) % 3 + 1):
            x = self.a(x).relu()
        return self.b(x) if float(x.sum()) > -1e9 else x


MODELS = [InLists, InAttributes, InClosure, Both, Patched, PatchedAround, Writes, Depends]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("build", MODELS)
def test_each_chain_runs_and_no_layer_beside_it(build: Callable[[], nn.Module], inplace: bool) -> None:
    model = build()
    with torch.no_grad():
        expected = model(X)
    result = surgery.decompose(model, X, ranks="full", factorization="svd", inplace=inplace)
    said = {change.site for change in result.changes} | {skip.name for skip in result.skips}
    assert {"a", "b"} <= said
    called = set[str]()
    for change in result.changes:
        chain = result.model.get_submodule(change.site)
        chain.register_forward_pre_hook(lambda m, i, name=change.site: called.add(name))
    with torch.no_grad():
        assert relative_error(result.model(X), expected) <= ALLOWED
    assert called == {change.site for change in result.changes}
    parameters = {p.data_ptr(): p.numel() for p in result.model.parameters()}
    assert sum(parameters.values()) == result.after.parameters
    back = surgery.recompose(result.model, X).model
    assert {k: v.shape for k, v in state(back).items()} == {k: v.shape for k, v in build().state_dict().items()}
    with torch.no_grad():
        assert relative_error(back(X), expected) <= ALLOWED


def test_references_come_back_with_the_layers() -> None:
    small = surgery.decompose(InLists(), X, ranks=2, factorization="svd").model
    assert small.rows[0] is small.a
    assert small.table["b"] is small.nest[0][0][0] is small.b
    back = surgery.recompose(small, X).model
    assert back.rows[0] is back.a
    assert type(back.a) is nn.Linear


def test_a_probe_leaves_buffers_and_random_numbers_as_they_were() -> None:
    class Counts(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.runs: Tensor
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.b(self.a(x + torch.rand(16)).relu())

    model, before = Counts(), torch.get_rng_state()
    result = surgery.decompose(model, X, ranks=2, factorization="svd")
    assert len(result.changes) == 2
    assert float(result.model.runs) == 0
    assert torch.equal(torch.get_rng_state(), before)


class Packs(nn.Module):
    """A recurrent layer that packs its batch."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(10, 16, batch_first=True, **options)
        self.head = nn.Linear(16 * (2 if self.rnn.bidirectional else 1), 5)

    def forward(self, x: Any, lengths: Tensor | None = None) -> Tensor:
        packed = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("kind", "options"), [(nn.LSTM, {}), (nn.GRU, {"bidirectional": True, "num_layers": 2})])
def test_packed_sequences(kind: type[nn.RNNBase], options: dict[str, Any], given: bool) -> None:
    model, x, lengths = Packs(kind, **options), torch.randn(3, 7, 10), torch.tensor([5, 7, 3])
    args = (pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False),) if given else (x, lengths)
    sites, _ = surgery.find_sites(model, args)
    recurrent = next(site for site in sites if site.name == "rnn.hh_l0")
    assert recurrent.macs == int(lengths.sum()) * recurrent.operator.weight.numel()
    result = surgery.decompose(model, args, ranks="full", factorization="svd")
    assert len(result.changes) == len(sites)
    with torch.no_grad():
        assert relative_error(result.model(*args), model(*args)) <= ALLOWED
    back = surgery.recompose(result.model, args).model
    assert set(back.state_dict()) == set(model.state_dict())


def test_a_packed_sequence_alone_is_one_input() -> None:
    model = Packs(nn.LSTM)
    packed = pack_padded_sequence(torch.randn(3, 7, 10), torch.tensor([5, 7, 3]), True, enforce_sorted=False)
    assert len(surgery.decompose(model, packed, ranks=2, factorization="svd").changes) == 3


def test_calibration_and_auto_work_on_what_is_watched() -> None:
    model, x = Depends().eval(), torch.randn(96, 16)
    fitted = surgery.decompose(model, X, ranks=4, factorization="svd", calibration=x)
    assert {change.site for change in fitted.changes} == {"a", "b"}
    kept = surgery.decompose(model, X, calibration=x, ranks=surgery.Goal.error(0.2, cost="params"))
    assert kept.promise is not None


def test_without_dataflow_nothing_is_fused_that_is_not_known() -> None:
    found = surgery.recompose(Depends(), X)
    assert not found.changes
    assert "dataflow" in found.skips[0].reason


def heads(layer: Callable[[], nn.Module]) -> nn.Module:
    class Heads(nn.Module):
        """Two layers on one value, whose outputs the model adds."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = layer(), layer(), layer()

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x).relu()
            return (self.first(x) + self.second(x)) / 2

    return Heads()


HEADS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(8, 8), torch.randn(2, 8)),
    "conv": (lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.randn(2, 8, 5, 5)),
}


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEADS)
def test_chains_that_the_model_adds_come_back_each_for_itself(name: str, kind: str, factorization: str) -> None:
    layer, x = HEADS[name]
    net = heads(layer)
    result = surgery.decompose(KINDS[kind](net, x), x, ranks=2, factorization=factorization)
    back = surgery.recompose(result.model, x).model
    assert {k: v.shape for k, v in state(back).items()} == {k: v.shape for k, v in net.state_dict().items()}
    with torch.no_grad():
        assert relative_error(run(back, x), run(result.model, x)) <= ALLOWED


@pytest.mark.parametrize("capture", ["symbolic", "program"])
def test_a_graph_that_was_captured_of_a_factored_module_knows_its_chains(capture: str) -> None:
    layer, x = HEADS["linear"]
    net = heads(layer)
    small = surgery.decompose(net, x, ranks=2, factorization="svd").model
    host: Any = torch.fx.symbolic_trace(small) if capture == "symbolic" else torch.export.export(small, (x,))
    back = surgery.recompose(host, x).model
    assert {k: v.shape for k, v in state(back).items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_a_chain_that_no_node_calls_is_a_bug_and_said_so() -> None:
    graph: Any = open_model(torch.export.export(Layers2(), (X,)), ((), {}))
    chain = FACTORIZATIONS["svd"].factor(nn_linear(), (2,))
    assert isinstance(chain, Chain)
    graph.apply(Replace(find(graph.flow).placements[0], chain))
    assert graph.verify() == {}
    graph.add_parameter(["ghost.0.weight"], nn.Parameter(torch.zeros(2, 16)))
    graph.record = graph.record.with_site("ghost", Entry(weight="ghost.weight"))
    with pytest.raises(CheckError, match="ghost"):
        graph.verify()


def nn_linear() -> Linear:
    return Linear(torch.randn(16, 16), bias=torch.zeros(16))


class Layers2(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_what_cannot_be_copied_is_said_and_can_be_changed_in_place() -> None:
    net = Layers2()
    net.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"cannot be copied.*inplace"):
        surgery.decompose(net, X, ranks=2, factorization="svd")
    assert len(surgery.decompose(net, X, ranks=2, factorization="svd", inplace=True).changes) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about its quantized modules
@pytest.mark.filterwarnings("ignore")  # of torch, about its quantized modules
def test_a_quantized_layer_is_a_skip() -> None:
    quantized = torch.ao.nn.quantized.dynamic.Linear(16, 16)
    result = surgery.decompose(nn.Sequential(quantized, nn.ReLU(), nn.Linear(16, 8)), X, ranks=2, factorization="svd")
    assert [change.site for change in result.changes] == ["2"]
    assert [(skip.name, skip.reason) for skip in result.skips] == [
        ("0", "it is quantized; change the model before it is quantized")
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about TorchScript
def test_torchscript_says_what_to_do() -> None:
    with pytest.raises(SurgeryError, match=r"TorchScript.*export"):
        surgery.decompose(torch.jit.script(Layers2()), X, ranks=2)


def test_a_model_without_numbers_is_skips_alone() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.LSTM(16, 8))
    x = torch.empty(5, 2, 16, device="meta")
    result = surgery.decompose(model, x, ranks=2, factorization="svd")
    assert not result.changes
    assert all("meta" in skip.reason for skip in result.skips)
    assert len(result.skips) >= 6
    surgery.recompose(model, x)


def test_nothing_but_own_errors_leaves_a_public_function() -> None:
    class Odd(Layers2):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError

    with pytest.raises(CheckError, match="decompose failed: RuntimeError") as caught:
        surgery.decompose(Odd(), X, ranks=2)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(TypeError):
        surgery.decompose(Layers2(), X, rank=2)  # type: ignore[call-arg]


class Keeps(Layers2):
    """A model that keeps what it has seen: in an attribute, a list and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None
        self.seen: list[Any] = []
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.last = x.detach()
        self.mean = self.mean * 0.9 + x.detach().mean(0)
        self.seen.append(self.last)
        return self.b(x)


@pytest.mark.parametrize("act", [surgery.find_sites, surgery.recompose, surgery.decompose])
def test_a_model_that_keeps_state_is_as_it_was(act: Callable[..., Any]) -> None:
    model = Keeps()
    options = {"ranks": 2, "factorization": "svd"} if act is surgery.decompose else {}
    result = act(model, X, **options)
    for kept in [model, *([result.model] if hasattr(result, "model") else [])]:
        assert kept.last is None
        assert kept.seen == []
        assert torch.equal(kept.mean, torch.zeros(16))
        assert type(kept(X)) is Tensor


def test_weights_that_are_held_elsewhere_are_skips() -> None:
    listed, aliased = Layers2(), Layers2()
    listed.decay = [listed.a.weight]  # type: ignore[assignment]
    aliased.w = aliased.a.weight
    for model in (listed, aliased):
        result = surgery.decompose(model, X, ranks=2, factorization="svd")
        assert [change.site for change in result.changes] == ["b"]


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_on_gradients_survive_the_copy(inplace: bool) -> None:
    model = Layers2()
    for parameter in (model.a.weight, model.a.bias, model.b.bias):
        parameter.register_hook(torch.zeros_like)
    result = surgery.decompose(model, X, ranks=2, factorization="svd", inplace=inplace)
    assert [change.site for change in result.changes] == ["b"]
    result.model(X).sum().backward()
    assert not result.model.a.weight.grad.any()
    assert not result.model.b.bias.grad.any()


def test_a_model_that_differentiates_in_forward() -> None:
    class Force(Layers2):
        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.b(self.a(x).tanh()).sum(), x)[0]

    model = Force()
    result = surgery.decompose(model, X, ranks="full", factorization="svd")
    assert len(result.changes) == 2
    assert relative_error(result.model(X), model(X)) <= ALLOWED
