"""Chains that are factored already are sites that can be cut to lower ranks, without composing what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import Goal, OnnxRuntime
from surgery.algebra import Chain, relative_error
from surgery.errors import CheckError, RankError, Refusal
from surgery.factorizations import FACTORIZATIONS, Factorization, Ranks
from surgery.factorizations.recut import Cut, chain_spectra, recut
from surgery.passes.decompose import decompose
from surgery.passes.preview import find_sites
from surgery.passes.recompose import recompose
from surgery.sites import FactoredSite
from tests.cases import Case
from tests.fitted import EXACT, composed, each, factor, halved, slack
from tests.test_calibration_models import as_kind
from tests.test_graphs import assert_same, counted_macs, every_graph, lower_ranks, outputs, shapes, unique_parameters
from tests.zoo import graph

NESTED = ("svd", "spatial", "depthwise")  # truncated SVDs, of which each lower one is part of a higher one


def dense_net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24)).eval()


def cut(method: Factorization, case: Case, chain: Chain, ranks: Ranks) -> Cut:
    found = recut(method, case.operator.to(device="meta"), chain, ranks)
    if isinstance(found, Refusal):
        assert method.name == "cp"
        pytest.skip(found.reason)
    return found


@each(EXACT)
def test_a_cut_at_its_own_ranks_changes_nothing(case: Case, method: Factorization) -> None:
    chain = factor(case, method, halved(method.max_ranks(case.operator)))
    assert chain.origin is not None
    again = cut(method, case, chain, chain.origin[1])
    assert again.chain is chain
    assert again.error == 0


@each(EXACT)
def test_the_error_of_a_cut_is_measured_and_what_is_possible(case: Case, method: Factorization) -> None:
    chain = factor(case, method, halved(method.max_ranks(case.operator)))
    assert chain.origin is not None
    lower = halved(chain.origin[1])
    found = cut(method, case, chain, lower)
    before, after = composed(chain).weight, composed(found.chain).weight
    assert found.error == pytest.approx(relative_error(after, before), abs=slack(case, chain))
    direct = factor(case, method, lower)
    if method.name in NESTED:
        assert relative_error(after, composed(direct).weight) <= 1e-6  # a gap between singular values may be small
    assert found.chain.parameters == direct.parameters or direct.origin != found.chain.origin


@each(EXACT)
def test_spectra_are_those_of_the_composed_weight(case: Case, method: Factorization) -> None:
    chain = factor(case, method, halved(method.max_ranks(case.operator)))
    expected = method.spectra(composed(chain))
    for found, whole in zip(chain_spectra(method, case.operator, chain), expected, strict=True):
        assert (found.rows, found.columns) == (whole.rows, whole.columns)
        # singular values from Gram matrices are good to the root of eps
        assert torch.allclose(found.values, whole.values, rtol=0, atol=1e-7 * float(whole.values.max()))


@pytest.mark.law(11)
@every_graph
def test_factored_models_are_cut_and_recomposed(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    once = decompose(model, inputs, ranks="energy=0.95")
    sites, _ = find_sites(once.model, inputs)
    factored = {site.name: site for site in sites if isinstance(site, FactoredSite)}
    known = {c.site: (c.factorization, c.rank) for c in once.changes}
    assert {name: site.made_by for name, site in factored.items()} == known
    ranks = {name: halved(site.made_by[1]) for name, site in factored.items() if site.made_by[1] != (1,)}
    twice = decompose(once.model, inputs, ranks=ranks)
    assert {c.site for c in twice.changes} == set(ranks)
    assert unique_parameters(twice.model) == twice.after.parameters
    macs = counted_macs(once.model, inputs) - counted_macs(twice.model, inputs)
    assert macs == twice.before.macs - twice.after.macs
    back = recompose(twice.model, inputs)
    assert shapes(back.model) == shapes(model)
    assert_same(outputs(back.model, inputs), outputs(twice.model, inputs), find_sites(model, inputs)[0])


def test_cutting_composes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = graph("resnet-basic", "module")
    once = decompose(model, inputs, ranks="energy=0.9")

    def fail(self: Chain) -> Any:
        raise CheckError("composed")

    monkeypatch.setattr(Chain, "compose", fail)
    assert decompose(once.model, inputs, ranks="energy=0.8").changes


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_saved_program_is_cut_after_loading(factorization: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2))
    inputs = (torch.randn(2, 3, 8, 8),)
    program = torch.export.export(nn.Sequential(*layers).eval(), inputs)
    ranks = lower_ranks(find_sites(program, inputs)[0], factorization)
    once = decompose(program, inputs, ranks=ranks, factorization=factorization)
    surgery.save(once.model, tmp_path / "once.pt2")
    loaded = surgery.load(tmp_path / "once.pt2")
    site = next(s for s in find_sites(loaded)[0] if isinstance(s, FactoredSite) and min(s.made_by[1]) > 1)
    twice = decompose(loaded, ranks={site.name: halved(site.made_by[1])})
    assert [c.site for c in twice.changes] == [site.name]
    surgery.save(twice.model, tmp_path / "twice.pt2")
    again = surgery.load(tmp_path / "twice.pt2")
    assert_same(outputs(again, inputs), outputs(twice.model, inputs), ())
    assert shapes(recompose(again).model) == shapes(program)


def test_another_method_says_why_it_leaves_a_chain_alone() -> None:
    model, inputs = graph("resnet-basic", "module")
    once = decompose(model, inputs, ranks={"1.body.0.0": 4}, factorization="svd")
    other = decompose(once.model, inputs, ranks=2, factorization="tucker", include=["1.body.0.0"])
    assert {s.name: s.reason for s in other.skips}["1.body.0.0"] == (
        "it is factored by svd already; recompose it first for another method"
    )


class Joined(nn.Module):
    """Two sites that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x) * self.k(x)
        return y


def test_joint_sites_of_a_program_are_recomposed_before_they_are_cut() -> None:
    x = torch.linspace(-1, 1, 64).view(4, 16).sin()
    program = torch.export.export(Joined().eval(), (x,))
    joined = surgery.decompose(program, ranks=4, joint=[("q", "k")]).model
    cut = surgery.decompose(joined, ranks=2)
    assert not cut.changes
    assert all("recompose" in skip.reason for skip in cut.skips)
    assert set(surgery.recompose(cut.model).model.state_dict) == set(program.state_dict)


def test_a_program_of_a_factored_module_comes_back_whatever_is_asked_of_it() -> None:
    """Its graph does not say what made the chains: they are left alone, and are no layers to be factored again."""
    x = torch.linspace(-1, 1, 64).view(4, 16).sin()
    small = surgery.decompose(Joined().eval(), x, ranks=4).model
    program = torch.export.export(small, (x,))
    again = surgery.decompose(program, ranks=2)
    assert not again.changes
    assert {name.partition(".")[0] for name in surgery.recompose(again.model).model.state_dict} == {"q", "k"}
    assert set(surgery.recompose(again.model).model.state_dict) == set(Joined().state_dict())


@pytest.mark.parametrize("read", ["trace", "program"])
def test_a_graph_of_a_factored_module_is_factored_again_once_it_is_recomposed(read: str) -> None:
    """Its nodes still record that they were made in factored layers."""
    x = torch.linspace(-1, 1, 64).view(4, 16).sin()
    small = surgery.decompose(Joined().eval(), x, ranks=4).model
    graph: Any = torch.fx.symbolic_trace(small) if read == "trace" else torch.export.export(small, (x,))
    dense = surgery.recompose(graph).model
    found = surgery.decompose(dense, (x,), ranks=2)
    assert [change.site for change in found.changes] == ["q", "k"]
    names = [name for name, _ in surgery.recompose(found.model).model.named_parameters()]
    assert names == [name for name, _ in dense.named_parameters()]


@pytest.mark.parametrize("kind", ["module", "program"])
@pytest.mark.parametrize("asked", [{"ranks": 2}, {"ranks": 2, "include": ["0"]}], ids=["all", "chain"])
def test_calibration_cuts_chains_and_fits_the_other_sites(kind: str, asked: dict[str, Any]) -> None:
    x = torch.randn(64, 16)
    part = surgery.decompose(as_kind(dense_net(), kind, x[:8]), x[:8], ranks=8, include=["0"]).model
    result = surgery.decompose(part, x[:8], calibration=x, **asked)
    assert {c.site: c.rank for c in result.changes} == dict.fromkeys(["0"] if "include" in asked else ["0", "2"], (2,))
    assert result.seen is not None


@pytest.mark.parametrize("goal", [Goal.error(0.9, cost="macs"), Goal.error(0.9, cost="params")], ids=str)
def test_a_goal_leaves_chains_and_factors_the_other_sites(goal: Goal) -> None:
    x = torch.randn(64, 16)
    part = surgery.decompose(dense_net(), x[:8], ranks=8, include=["0"]).model
    result = surgery.decompose(part, x[:8], ranks=goal, calibration=x)
    assert [c.site for c in result.changes] == ["2"]
    assert result.plan["0"].reason == "it is factored already; give it ranks to cut it further"
    whole = surgery.decompose(part, x[:8], ranks=2).model  # without a site that could be fitted
    assert not surgery.decompose(whole, x[:8], ranks=goal, calibration=x).changes


def test_the_latency_of_a_chain_that_stands_there_is_its_own() -> None:
    timed: list[Any] = []

    class Known(OnnxRuntime):
        def compare(self, dense: Any, chain: Any, shape: Any) -> Any:
            timed.append(dense)
            return surgery.Comparison(2.0, 1.0, 2.0, 2.0, 2.0, "faster")

    part = surgery.decompose(dense_net(), torch.randn(8, 16), ranks=8).model
    found = surgery.plan(part, torch.randn(8, 16), ranks=2, backend=Known(keep=False))
    assert found["0"].dense_latency == 2.0
    assert timed
    assert all(isinstance(dense, Chain) for dense in timed)


def test_a_rank_above_that_of_a_chain_says_what_the_chain_has() -> None:
    x = torch.randn(8, 16)
    plan = surgery.plan(dense_net(), x, ranks=8)
    part = surgery.decompose(dense_net(), x, ranks=4).model
    message = "site '0', which is factored already, cannot take rank 8; allowed: svd rank 1 to 4"
    with pytest.raises(RankError, match=message):
        surgery.decompose(part, x, ranks=plan)
