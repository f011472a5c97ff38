"""Joint sites over the networks and graph kinds of the zoo: shared factors are one parameter, and all laws hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.algebra import Chain, Conv, Geometry, Linear, Operator, relative_error, split
from surgery.cost.base import Comparison
from surgery.cost.onnxruntime.backend import OnnxRuntime
from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import FACTORIZATIONS, named
from surgery.passes.decompose import decompose
from surgery.passes.preview import find_sites, plan
from surgery.passes.recompose import recompose
from surgery.plans.plan import Plan
from surgery.runtime.export import export_onnx
from surgery.sites import JointSite, Site, joined
from tests.test_graphs import assert_same, counted_macs, every_graph, outputs, shapes, unique_parameters
from tests.tolerances import reduction, tolerance
from tests.zoo import graph


@pytest.mark.law(11)
@pytest.mark.parametrize("ranks", ["full", "energy=0.7"])
@every_graph
def test_the_laws_hold_for_sites_that_read_the_same_value(name: str, kind: str, ranks: str) -> None:
    model, inputs = graph(name, kind)
    sites, _ = find_sites(model, inputs)
    result = decompose(model, inputs, ranks=ranks, joint="inputs")
    if ranks == "full":
        assert_same(outputs(result.model, inputs), outputs(model, inputs), sites)
    assert unique_parameters(result.model) == result.after.parameters
    assert counted_macs(model, inputs) - counted_macs(result.model, inputs) == result.before.macs - result.after.macs
    back = recompose(result.model, inputs)
    assert shapes(back.model) == shapes(model)
    assert_same(outputs(back.model, inputs), outputs(result.model, inputs), sites)


def site(name: str, operator: Operator) -> Site:
    shape = (2, operator.in_channels, *([5] * (operator.weight.dim() - 2)))
    return Site(name, operator, (shape,))


def operators(kind: str, outs: list[int]) -> list[Site]:
    torch.manual_seed(sum(outs))
    if kind == "linear":
        return [site(f"s{i}", Linear(torch.randn(n, 12))) for i, n in enumerate(outs)]
    geometry = Geometry((2, 1), ((1, 1), (0, 0)), (1, 1), (0, 0), transposed=kind == "transposed")
    weights = [torch.randn(2, n, 3, 6, 3, 2) for n in outs]
    return [site(f"s{i}", Conv.from_kernel(w[..., 0], geometry)) for i, w in enumerate(weights)]


@pytest.mark.parametrize("method", FACTORIZATIONS)
@given(kind=st.sampled_from(["linear", "conv", "transposed"]), outs=st.lists(st.integers(2, 6), min_size=2, max_size=3))
def test_each_chain_has_its_rows_and_the_shared_factors(method: str, kind: str, outs: list[int]) -> None:
    sites = operators(kind, outs)
    joint = joined(sites)
    assert isinstance(joint, JointSite)
    factorization = named(method)
    if factorization.refuse(joint.operator) is not None:
        return
    full = factorization.max_ranks(joint.operator)
    chain = factorization.factor(joint.operator, full)
    assert not isinstance(chain, Refusal)
    chains = split(chain, [site.operator for site in sites])
    if isinstance(chains, Refusal):
        assert method == "depthwise" or kind == "linear", "only chains that end without a factor of the outputs refuse"
        return
    limit = tolerance(torch.float32, length=reduction(joint.operator), steps=len(chain.steps))
    for own, member in zip(chains, sites, strict=True):
        composed = own.compose()
        assert isinstance(composed, Operator)
        assert relative_error(composed.weight, member.operator.weight) <= limit
        assert all(mine is shared for mine, shared in zip(own.steps[:-1], chains[0].steps[:-1], strict=True))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12), nn.Linear(24, 24)
        self.c = nn.Conv1d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(x) + self.o(torch.cat([self.q(x) * 2, self.k(x), self.v(x)], -1)[..., :24])


def attention() -> tuple[Attention, torch.Tensor]:
    torch.manual_seed(0)
    return Attention().eval(), torch.randn(2, 6, 24)


def test_the_shared_basis_is_one_parameter_that_training_updates_once() -> None:
    model, x = attention()
    result = decompose(model, x, ranks={"[qkv]": 8}, factorization="svd", joint=[("q", "k", "v")])
    new = result.model
    assert new.q[0].weight is new.k[0].weight is new.v[0].weight
    assert len(list(new.parameters())) == 1 + 3 + 3 + 2 + 2  # the basis; three factors with their biases; o; c
    assert [c.parameters for c in result.changes] == [8 * 24 + 24 * 8 + 24, 12 * 8 + 12, 12 * 8 + 12]
    stacked = torch.cat([model.q.weight, model.k.weight, model.v.weight]).detach()
    found = torch.cat([new.get_submodule(name)[1].weight for name in "qkv"]) @ new.q[0].weight
    best = torch.linalg.svdvals(stacked.double())[8:].square().sum().sqrt() / torch.linalg.vector_norm(stacked.double())
    assert relative_error(found, stacked) == pytest.approx(float(best), rel=1e-3)


def test_a_joint_program_is_saved_loaded_exported_and_fused(tmp_path: Path) -> None:
    model, x = attention()
    program = torch.export.export(model, (x,))
    result = decompose(program, ranks={"[qkv]": 8}, factorization="svd", joint="inputs")
    surgery.save(result.model, tmp_path / "joint.pt2")
    loaded = surgery.load(tmp_path / "joint.pt2")
    assert_same(outputs(loaded, (x,)), outputs(result.model, (x,)), ())
    assert unique_parameters(loaded) == result.after.parameters
    assert export_onnx(loaded, tmp_path / "joint.onnx").relative_error < 1e-5
    assert shapes(recompose(loaded).model) == shapes(program)


class Fixed(OnnxRuntime):
    """Latencies that are known: 2 s for dense, 1 s for any chain, a quarter for what is timed alone."""

    def compare(self, dense: Operator | Chain, chain: Operator | Chain, shape: tuple[int, ...]) -> Comparison:
        return Comparison(2.0, 1.0, 2.0, 2.0, 2.0, "faster")

    def measure(self, operator: Operator | Chain, shape: tuple[int, ...]) -> float:
        assert isinstance(operator, Chain)
        assert len(operator.operators) == 1
        assert operator.out_shape(shape)[-1] == 64
        return 0.25


def test_what_is_shared_is_timed_once() -> None:
    joint = [("q", "k", "v")]
    found = plan(Heads(), torch.randn(4, 96), ranks=8, joint=joint, backend=Fixed(keep=False))
    assert [(decision.dense_latency, decision.latency) for decision in found] == [(2.0, 1.0), (2.0, 0.25), (2.0, 0.25)]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(96, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def test_the_plan_keeps_the_groups_through_a_file_and_through_edits() -> None:
    model, x = attention()
    made = plan(model, x, ranks={"[qkv]": 8}, factorization="svd", joint="inputs")
    again = Plan.from_json(made.to_json())
    assert again == made
    assert {d.site: d.joint for d in again} == {"q": "q", "k": "q", "v": "q", "o": None, "c": None}
    without = decompose(model, x, ranks=made.edit("q", rank=None))
    assert [(c.site, c.joint) for c in without.changes] == [("k", "k"), ("v", "k")]
    alone = decompose(model, x, ranks=made, exclude=["q", "k"])
    assert [(c.site, c.joint) for c in alone.changes] == [("v", None)]
    apart = made.edit("k", rank=4)
    assert [(c.site, c.rank, c.joint) for c in decompose(model, x, ranks=apart).changes] == [
        ("q", (8,), "q"),
        ("k", (4,), None),
        ("v", (8,), "q"),
    ]


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        ("outputs", "joint='outputs'; allowed: \"inputs\""),
        ([("q", "w")], "joint= names the site 'w'"),
        ([("q", "k"), ("k", "v")], "joint= names the site 'k' twice"),
        ([("q", "c")], r"c \(Conv1d 1, 6 in\) and q \(Linear, 24 in\) differ in more than their outputs"),
    ],
)
def test_wrong_groups_are_one_clear_error(joint: object, message: str) -> None:
    model, x = attention()
    with pytest.raises(InputError, match=message):
        decompose(model, x, ranks=4, joint=joint)  # type: ignore[arg-type]


def test_different_ranks_in_a_group_are_an_error() -> None:
    model, x = attention()
    with pytest.raises(RankError, match="the joint sites q, k have different ranks"):
        decompose(model, x, ranks={"q": 4, "k": 3}, joint=[("q", "k")])


def test_methods_that_have_nothing_to_share_say_so() -> None:
    model, x = attention()
    result = decompose(model, x, ranks=4, factorization="tt", joint=[("q", "k")])
    reasons = {skip.name: skip.reason for skip in result.skips}
    assert "nothing to share" in reasons["q"]
    assert "nothing to share" in reasons["k"]
