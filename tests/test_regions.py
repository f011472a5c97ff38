"""Weights that a graph uses in ways that are not handled: each is listed, and what is no layer is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.export import ExportedProgram

import surgery
from surgery.kinds.registry import open_model
from surgery.sites.find import find
from tests.covering import in_turns
from tests.zoo import export

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of scan
KINDS = ("program", "graph")
X = torch.ones(4, 16)


class Block(nn.Module):
    """Two layers in a region of some kind, and one behind it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(REGIONS[self.way][0](self, x).float())

    def both(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def _autocast(net: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.both(x)


def _no_grad(net: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.both(x)


def _cond(net: Block, x: Tensor) -> Tensor:
    found: Tensor = torch.cond(x.sum() > 0, net.a, net.b, (x,))
    return found


def _while(net: Block, x: Tensor) -> Tensor:
    start = (torch.zeros((), dtype=torch.long), x)
    last: Any = while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, net.both(v)), start)
    return last[1]


def _scan(net: Block, x: Tensor) -> Tensor:
    found: Any = scan(lambda state, v: (net.both(state) + v, state.clone()), x[0], x)
    return found[1]


REGIONS: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "autocast": (_autocast, "inside of an autocast region, which is not looked into; export without autocast"),
    "no_grad": (_no_grad, "inside of a no_grad or enable_grad region, which is not looked into; export without the"),
    "cond": (_cond, "inside of a branch of cond, which is not looked into; factor the module before it is exported"),
    "while_loop": (_while, "inside of a while_loop"),
    "scan": (_scan, "a loop over the steps of a recurrent layer uses it"),
}


def as_kind(program: ExportedProgram, kind: str) -> Any:
    return program if kind == "program" else program.module()


def names(found: Iterable[Any]) -> list[str]:
    return sorted(each.name for each in found)


@pytest.mark.parametrize(("way", "kind"), in_turns(sorted(REGIONS), KINDS))
def test_each_weight_in_a_region_is_listed(way: str, kind: str) -> None:
    sites, skips = surgery.find_sites(as_kind(export(Block(way), (X,)), kind), X)
    assert (names(sites), names(skips)) == (["head"], ["a", "b"])
    assert all(REGIONS[way][1] in skip.reason and skip.parameters == 256 for skip in skips)


def test_a_weight_that_is_used_outside_too_is_listed_once() -> None:
    class Both(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(_no_grad(self, x)))

    sites, skips = surgery.find_sites(export(Both("no_grad"), (X,)))
    assert (names(sites), names(skips)) == (["head"], ["a", "b"])


def test_a_decorated_forward() -> None:
    class Quiet(Block):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.both(x))

    sites, skips = surgery.find_sites(export(Quiet("no_grad"), (X,)))
    assert (names(sites), names(skips)) == ([], ["a", "b", "head"])


def test_parameters_that_a_branch_holds_itself() -> None:
    """The outer layer has the weight of a branch, which would go on reading it."""
    layer = nn.Linear(16, 16)
    root = nn.ModuleDict({"outer": layer, "yes": trace(layer), "no": trace(nn.Linear(16, 16))})
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    test = graph.call_function(torch.gt, (graph.call_function(torch.sum, (x,)), 0))
    branch = graph.call_function(torch.ops.higher_order.cond, (test, graph.get_attr("yes"), graph.get_attr("no"), (x,)))
    graph.output(graph.call_function(F.linear, (branch, graph.get_attr("outer.weight"))))
    flow = open_model(torch.fx.GraphModule(root, graph), ((X,), {})).flow
    shapes = dict.fromkeys(flow.users, (4, 16))  # torch has none of a branch that holds its own weights
    found = find(replace(flow, shapes=shapes, input_shapes=shapes, macs=dict.fromkeys(flow.users, 0)))
    assert not found.placements
    reasons = {skip.name: skip.reason for skip in found.skips}
    assert reasons.keys() == {"no", "outer"}
    assert REGIONS["cond"][1] in reasons["no"]
    assert reasons["outer"] == "its weight is also used by cond"


def trace(layer: nn.Module) -> torch.fx.GraphModule:
    """A graph that reads the parameters itself."""
    graph = torch.fx.Graph()
    read = (graph.placeholder("x"), graph.get_attr("weight"), graph.get_attr("bias"))
    graph.output(graph.call_function(F.linear, read))
    return torch.fx.GraphModule(layer, graph)


@torch.fx.wrap
def homemade(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


FUNCTIONS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], str]] = {
    "bmm": ((2, 16, 8), lambda x, w: torch.bmm(x.expand(2, 4, 16), w), "a batch of weight matrices"),
    "baddbmm": ((2, 16, 8), lambda x, w: torch.baddbmm(x[:, :8], x.expand(2, 4, 16), w), "a batch of weight matrices"),
    "bmm of a transpose": ((2, 8, 16), lambda x, w: torch.bmm(x.expand(2, 4, 16), w.transpose(1, 2)), "a batch"),
    "bilinear": ((8, 16, 16), lambda x, w: F.bilinear(x, x, w), "bilinear maps"),
    "embedding_bag": ((5, 8), lambda x, w: F.embedding_bag(x.long(), w), "bags of embeddings"),
    "einsum": ((16, 8), lambda x, w: torch.einsum("bi,ij->bj", x, w), "einsum"),
    "left": ((8, 4), lambda x, w: w @ x, "not as the weight of a layer"),
    "tensordot": ((16, 8), lambda x, w: torch.tensordot(x, w, 1), "not as the weight of a layer"),
}


class Uses(nn.Module):
    """A function of the input and of one parameter."""

    def __init__(self, size: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.ones(size)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


@pytest.mark.parametrize("kind", ["traced", *KINDS])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_of_other_functions_are_listed(name: str, kind: str) -> None:
    size, function, words = FUNCTIONS[name]
    model = Uses(size, function)
    host = torch.fx.symbolic_trace(model) if kind == "traced" else as_kind(export(model, (X,)), kind)
    sites, skips = surgery.find_sites(host, X)
    assert (names(sites), names(skips)) == ([], ["w"])
    assert words in skips[0].reason


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, w: homemade(x, w), "homemade uses it, which is not handled"),
        (lambda x, w: x.matmul(w), "it is multiplied, but not as the weight"),
    ],
)
def test_functions_and_methods_of_traced_graphs(function: Callable[[Tensor, Tensor], Tensor], words: str) -> None:
    sites, skips = surgery.find_sites(torch.fx.symbolic_trace(Uses((16, 8), function)), X)
    assert (names(sites), names(skips)) == ([], ["w"])
    assert words in skips[0].reason


def test_custom_operators() -> None:
    @torch.library.custom_op("surgery_tests::product", mutates_args=())
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @product.register_fake
    def shape_of(x: Tensor, weight: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[1])

    _, skips = surgery.find_sites(export(Uses((16, 8), product), (X,)))
    assert [(skip.name, skip.reason) for skip in skips] == [("w", "product uses it, which is not handled")]


@pytest.mark.parametrize("kind", ["traced", *KINDS])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x + w,
        lambda x, w: x * w.t().t(),
        lambda x, w: torch.cat([x, w]),
        lambda x, w: torch.where(x > 0, x, w[:4]),
        lambda x, w: F.layer_norm(x, (4, 16), w),
    ],
    ids=["add", "scale", "cat", "where", "norm"],
)
def test_what_is_no_layer_is_not_listed(function: Callable[[Tensor, Tensor], Tensor], kind: str) -> None:
    model = Uses((4, 16), function)
    host = torch.fx.symbolic_trace(model) if kind == "traced" else as_kind(export(model, (X,)), kind)
    assert surgery.find_sites(host, X) == ((), ())
