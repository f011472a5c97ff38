"""Rank rules: what specs say, what each rule keeps, and that budgets are met; over random sites and the case table."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import surgery
from surgery.algebra import Chain, Conv, Geometry, Linear, Operator, Shape, relative_error
from surgery.cli.group import cli
from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import FACTORIZATIONS, Factorization, named
from surgery.plans import rules as rules_module
from surgery.plans.by_rule import ByRule, ModelFacts
from surgery.plans.candidates import Candidate, candidates_of
from surgery.plans.faster import FALLBACK_ENERGY, KeepFaster, snap
from surgery.plans.plan import Decision, Plan
from surgery.plans.quality import Energy, Fixed, Full, Keep, Vbmf, energy_counts
from surgery.plans.rules import PerSite, parse_ranks
from surgery.sites import Site, Totals
from tests.cases import CASES, Case, decaying
from tests.fitted import each

EXACT = [(c, f) for c in CASES if c.dtype == torch.float64 for f in FACTORIZATIONS.values() if not f.refuse(c.operator)]
CLOSED_FORM = ("svd", "spatial")  # one unfolding: the predicted error is the error


def conv(out: int, into: int, size: int = 3, *, groups: int = 1, stride: int = 1) -> Conv:
    weight = decaying(torch.randn(out, into // groups, size, size, dtype=torch.float64))
    geometry = Geometry((stride, stride), ((size // 2, size // 2),) * 2, (1, 1), (0, 0))
    return Conv(weight, geometry, groups, bias=torch.zeros(out, dtype=torch.float64))


def linear(out: int, into: int) -> Linear:
    return Linear(decaying(torch.randn(out, into, dtype=torch.float64)))


def planted(out: int, into: int, rank: int) -> Linear:
    signal = torch.randn(out, rank, dtype=torch.float64) @ torch.randn(rank, into, dtype=torch.float64)
    return Linear(signal + 0.1 * torch.randn(out, into, dtype=torch.float64))


def site(name: str, operator: Operator, *shapes: Shape) -> Site:
    default = (1, operator.in_channels) + ((8, 8) if isinstance(operator, Conv) else ())
    return Site(name, operator, shapes or (default,))


def totals_of(sites: list[Site], *, rest: int = 0) -> Totals:
    return Totals(sum(s.parameters for s in sites) + rest, sum(s.macs for s in sites) + rest)


def plan_of(sites: list[Site], ranks: object, *, factorization: str = "auto") -> Plan:
    return ByRule(ranks, factorization).plan(sites, ModelFacts(totals_of(sites)))  # type: ignore[arg-type]


def after(plan: Plan, totals: Totals, cost: str) -> int:
    saved = (getattr(d, f"dense_{cost}") - getattr(d, cost) for d in plan if not d.dense)
    return int(getattr(totals, cost) - sum(saved))


@st.composite
def site_sets(draw: st.DrawFn) -> list[Site]:
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    sites = []
    for index in range(draw(st.integers(1, 4))):
        out, into = draw(st.integers(1, 6)) * 2, draw(st.integers(1, 6)) * 2
        kind = draw(st.sampled_from(["linear", "conv1", "conv3", "grouped", "twice"]))
        operator: Operator = linear(out, into) if kind == "linear" else conv(out, into, 1 if kind == "conv1" else 3)
        if kind == "grouped":
            operator = conv(out, into, groups=2)
        shapes = [(1, into, 8, 8), (1, into, 5, 4)] if kind == "twice" else []
        sites.append(site(f"site{index}", operator, *shapes))
    return sites


# -- specs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("measured", KeepFaster()),
        (" vbmf ", Vbmf()),
        ("full", Full()),
        ("energy=0.9", Energy(0.9)),
        ("energy = 1", Energy(1.0)),
        ("keep_params=0.5", Keep("parameters", 0.5)),
        ("keep_macs=.25", Keep("macs", 0.25)),
        ("16", Fixed((16,))),
        (16, Fixed((16,))),
        ("16,32", Fixed((16, 32))),
        ((16, 32), Fixed((16, 32))),
        ([16, 32], Fixed((16, 32))),
        ({"a": 4, "b.*": (2, 3), "c": None}, PerSite((("a", (4,)), ("b.*", (2, 3)), ("c", None)))),
    ],
)
def test_specs(spec: object, rule: object) -> None:
    assert parse_ranks(spec) == rule  # type: ignore[arg-type]
    assert parse_ranks(rule) is rule


@pytest.mark.parametrize("text", ["measured", "vbmf", "full", "energy=0.9", "keep_params=0.5", "keep_macs=0.25", "9,2"])
def test_a_rule_says_its_spec(text: str) -> None:
    assert str(parse_ranks(text)) == text


BAD_TEXTS = ["", "best", "energy", "energy=", "energy=0", "energy=1.1", "energy=nan", "energy=-1", "energy=90%"]
BAD_TEXTS += ["keep=0.5", "keep_params=inf", "auto", "auto=1", "0", "-3", "16,", "16,0", "1.5", "9" * 5000, "6;2", "²"]
BAD_RANKS = [0, -1, True, 1.5, None, b"4", (), (4, 0), (4, "5"), (1.0,)]
BAD_DICTS = [{"a": 0}, {"a": True}, {"a": "x"}, {"a": ()}, {3: 4}]
BAD: list[object] = [*BAD_TEXTS, *BAD_RANKS, *BAD_DICTS]


@pytest.mark.parametrize("spec", BAD, ids=lambda spec: repr(spec)[:20])
def test_a_bad_spec_is_one_clear_error(spec: object) -> None:
    with pytest.raises(RankError) as error:
        parse_ranks(spec)  # type: ignore[arg-type]
    assert error.value.allowed
    assert error.value.next_step
    assert "\n" not in str(error.value)


def test_a_bad_rank_of_a_site_is_said_in_plain_words() -> None:
    with pytest.raises(RankError, match=r"the ranks of '0' are 0, which cannot be used; allowed: whole numbers from 1"):
        parse_ranks({"0": 0})
    with pytest.raises(RankError, match=r"ranks=0, which cannot be used"):
        parse_ranks(0)


def test_pages_and_help_name_all_rules() -> None:
    with pytest.raises(RankError) as error:
        parse_ranks("nothing")
    rules = re.findall(r"\b[a-z_]+(?:=|(?=,))", error.value.allowed or "")
    assert {"vbmf", "energy=", "keep_macs="} < set(rules)
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    help_text = CliRunner().invoke(cli, ["decompose", "--help"]).output
    for text in (readme, help_text, rules_module.__doc__, surgery.decompose.__doc__):
        assert [rule for rule in rules if rule not in (text or "")] == []


def test_a_misspelt_rule_is_suggested() -> None:
    with pytest.raises(RankError, match=r"did you mean 'keep_params=0\.5'"):
        parse_ranks("keep_param=0.4")


# -- energy and full -----------------------------------------------------------------------------------------------


@given(site_sets(), st.floats(0.05, 1.0))
def test_energy_is_kept_by_the_smallest_ranks(sites: list[Site], share: float) -> None:
    for one in sites:
        candidates = candidates_of(one, "auto")
        for candidate in [] if isinstance(candidates, Refusal) else candidates:
            for rank, levels in zip(energy_counts(candidate, share), candidate.levels, strict=True):
                energies = levels**2
                assert energies[:rank].sum() >= share * energies.sum() - 1e-12
                assert rank == 1 or energies[: rank - 1].sum() < share * energies.sum()


@given(site_sets(), st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5))
def test_ranks_grow_with_the_energy(sites: list[Site], shares: list[float]) -> None:
    for one in sites:
        candidates = candidates_of(one, "auto")
        for candidate in [] if isinstance(candidates, Refusal) else candidates:
            for low, high in pairwise(energy_counts(candidate, share) for share in sorted(shares)):
                assert all(a <= b for a, b in zip(low, high, strict=True))


def test_all_the_energy_of_a_zero_weight_is_at_rank_1() -> None:
    decision = plan_of([site("zero", Linear(torch.zeros(6, 8)))], "energy=1.0")["zero"]
    assert (decision.rank, decision.error) == ((1,), 0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_full_replaces_each_site_that_a_factorization_fits(case: Case) -> None:
    decision = plan_of([site("it", case.operator, case.shape)], "full")["it"]
    fits = [f for f in FACTORIZATIONS.values() if f.refuse(case.operator) is None]
    assert decision.dense == (not fits)
    if fits:
        assert decision.rank == fits[0].max_ranks(case.operator)
        assert decision.error == 0.0
    else:
        assert decision.reason


def test_a_chain_that_costs_more_than_dense_is_not_made() -> None:
    decision = plan_of([site("fc", linear(8, 8))], "energy=0.999")["fc"]
    assert decision.dense
    assert decision.reason is not None
    assert "of svd would cost more than dense (MACs " in decision.reason


def test_auto_factorization_takes_the_fewest_macs() -> None:
    one = site("conv", conv(16, 16))
    choices = {name: plan_of([one], "energy=0.8", factorization=name)["conv"] for name in FACTORIZATIONS}
    macs = {name: d.macs for name, d in choices.items() if d.macs is not None and FACTORIZATIONS[name].automatic}
    best = plan_of([one], "energy=0.8")["conv"]
    assert best.macs == min(macs.values())


# -- fixed and per site --------------------------------------------------------------------------------------------


def test_one_rank_for_all_is_clamped_where_a_mode_is_smaller() -> None:
    sites = [site("conv", conv(32, 8)), site("fc", linear(64, 32)), site("head", linear(10, 32))]
    plan = plan_of(sites, 16)
    assert (plan["conv"].factorization, plan["conv"].rank) == ("tucker", (16, 8))
    assert (plan["fc"].factorization, plan["fc"].rank) == ("svd", (16,))
    assert plan["head"].reason == "rank 16 is at or above its full rank 10"


def test_two_ranks_are_for_methods_with_two() -> None:
    plan = plan_of([site("conv", conv(32, 16)), site("fc", linear(64, 32))], "8,4")
    assert plan["conv"].rank == (8, 4)
    assert plan["fc"].reason == "no method that fits it takes 2 ranks (svd 1)"


def test_a_named_factorization_leaves_what_it_refuses_dense() -> None:
    plan = plan_of([site("conv", conv(32, 16)), site("fc", linear(64, 32))], 8, factorization="spatial")
    assert plan["conv"].factorization == "spatial"
    assert plan["fc"].dense
    assert "spatial: its kernel does not extend" in (plan["fc"].reason or "")


def test_a_dict_names_sites_and_patterns() -> None:
    names = ["block.0.a", "block.0.b", "block.1.a", "head"]
    sites = [site(name, linear(12, 16)) for name in names]
    plan = plan_of(sites, {"block.*": 3, "block.0.b": None, "block.1.*": 5, "block.1.a": 4})
    assert [d.rank for d in plan] == [(3,), None, (4,), None]
    assert plan["block.0.b"].reason == "kept dense by the ranks given"
    assert plan["head"].reason == "the ranks do not name it"


def test_an_explicit_rank_above_the_span_names_the_site_and_the_span() -> None:
    sites = [site("body.conv", conv(32, 8)), site("fc", linear(12, 16))]
    wrong: list[tuple[str, object, str]] = [("fc", 13, "svd rank 1 to 12")]
    wrong += [("body.conv", (40, 4), "tucker out 1 to 32, in 1 to 8")]
    for name, ranks, span in wrong:
        with pytest.raises(RankError, match=span) as error:
            plan_of(sites, {name: ranks})
        assert repr(name) in error.value.what
    with pytest.raises(RankError, match="cannot take rank 4,4,4"):
        plan_of(sites, {"body.conv": (4, 4, 4)})
    assert plan_of(sites, {"body.conv": 16})["body.conv"].rank == (16, 8)
    assert plan_of(sites, {"fc*": 13})["fc"].dense  # a pattern is for many sites: it does not have to fit each
    assert plan_of(sites, {"fc": 12})["fc"].rank == (12,)


def test_an_unknown_site_is_an_error_with_close_matches() -> None:
    with pytest.raises(InputError, match=r"'layer1\.cnv1'.*did you mean 'layer1\.conv1'"):
        plan_of([site("layer1.conv1", linear(4, 4))], {"layer1.cnv1": 2})
    with pytest.raises(InputError, match="the model does not have"):
        plan_of([site("fc", linear(4, 4))], {"zzz*": 2})


# -- vbmf ----------------------------------------------------------------------------------------------------------


def test_vbmf_finds_a_planted_rank_and_leaves_noise_dense() -> None:
    plan = plan_of([site("signal", planted(40, 60, 5)), site("noise", Linear(torch.randn(40, 60)))], "vbmf")
    assert plan["signal"].rank == (5,)
    assert "no signal above the noise" in (plan["noise"].reason or "")


# -- budgets -------------------------------------------------------------------------------------------------------


def by_hand(sites: list[Site], totals: Totals, cost: str, fraction: float) -> int | None:
    """The least cut of all: each threshold tried, each site at its cheapest; None where the budget is out of reach."""
    groups = [c for c in (candidates_of(s, "auto") for s in sites) if not isinstance(c, Refusal)]
    levels = {0.0, math.inf, *(float(v) for c in groups for one in c for values in one.levels for v in values)}
    reached = [after_level(groups, totals, cost, level) for level in levels]
    return max((r for r in reached if r <= fraction * getattr(totals, cost)), default=None)


def after_level(groups: list[list[Candidate]], totals: Totals, cost: str, level: float) -> int:
    total = getattr(totals, cost)
    for candidates in groups:
        dense = getattr(candidates[0].dense_cost, cost)
        costs = [dense]
        for one in candidates:
            ranks = tuple(max(1, int((values >= level).sum())) for values in one.levels)
            options = [ranks] + [(*ranks[:i], m, *ranks[i + 1 :]) for i, m in enumerate(one.max_ranks) if ranks[1:]]
            costs += [getattr(one.cost(option), cost) for option in options]
        total += min(costs) - dense
    return int(total)


@settings(max_examples=60)
@given(site_sets(), st.floats(0.01, 1.0), st.sampled_from(["parameters", "macs"]), st.integers(0, 300))
def test_budgets_are_met_and_nothing_nearer_exists(sites: list[Site], fraction: float, cost: str, rest: int) -> None:
    totals = totals_of(sites, rest=rest)
    spec = f"keep_{'params' if cost == 'parameters' else 'macs'}={fraction}"
    best = by_hand(sites, totals, cost, fraction)
    if best is None:
        with pytest.raises(RankError, match="cannot be met"):
            ByRule(spec).plan(sites, ModelFacts(totals))
        return
    plan = ByRule(spec).plan(sites, ModelFacts(totals))
    assert after(plan, totals, cost) == best
    assert best <= fraction * getattr(totals, cost)
    for decision in plan:
        assert decision.reason if decision.dense else getattr(decision, cost) < getattr(decision, f"dense_{cost}")


@settings(max_examples=30)
@given(site_sets())
def test_the_least_fraction_that_the_error_states_is_in_reach(sites: list[Site]) -> None:
    totals = totals_of(sites, rest=50)
    with pytest.raises(RankError) as error:
        ByRule("keep_params=0.000001").plan(sites, ModelFacts(totals))
    least = Fraction(str(error.value.allowed).split()[2])
    plan = ByRule(f"keep_params={float(least)}").plan(sites, ModelFacts(totals))
    assert after(plan, totals, "parameters") <= least * totals.parameters
    assume(least > Fraction("0.001"))
    with pytest.raises(RankError):
        ByRule(f"keep_params={float(least) - 0.0002}").plan(sites, ModelFacts(totals))


def test_left_out_sites_count_in_the_budget() -> None:
    sites = [site("a", linear(32, 32)), site("b", linear(32, 32))]
    totals = totals_of(sites)
    plan = ByRule("keep_params=0.6", exclude=["b"]).plan(sites, ModelFacts(totals))
    assert plan["b"].reason == "excluded"
    assert after(plan, totals, "parameters") <= 0.6 * totals.parameters
    with pytest.raises(RankError, match=r"from 0\.53"):
        ByRule("keep_params=0.4", exclude=["b"]).plan(sites, ModelFacts(totals))


def test_a_budget_without_sites_is_out_of_reach_unless_it_is_everything() -> None:
    assert len(ByRule("keep_macs=1").plan([], ModelFacts(Totals(10, 10)))) == 0
    with pytest.raises(RankError, match="keep_macs from 1 to 1"):
        ByRule("keep_macs=0.5").plan([], ModelFacts(Totals(10, 10)))


def test_the_search_is_quick_once_spectra_are_known() -> None:
    """Sites like those of a ResNet-50, with spectra drawn instead of computed."""
    sites = []
    for index in range(54):
        width = (64, 128, 256, 512)[index % 4]
        sites.append(site(f"s{index}", Conv(torch.empty(width, width, 3, 3), conv(2, 2).geometry)))
    rows = [[Candidate(one, method) for method in FACTORIZATIONS.values()] for one in sites]
    for candidate in (c for row in rows for c in row):
        drawn = [torch.rand(full).sort(descending=True).values for full in candidate.max_ranks]
        candidate.__dict__["levels"] = tuple((d / d.norm()).double().numpy() for d in drawn)
    start = time.process_time()
    Keep("parameters", 0.3).settle(rows, totals_of(sites))
    assert time.process_time() - start < 4  # about 0.6 s where nothing else runs


# -- auto ----------------------------------------------------------------------------------------------------------


def test_snapping() -> None:
    assert [snap(rank, multiple=16) for rank in (1, 3, 4, 5, 8, 9, 16, 17, 33)] == [4, 4, 4, 8, 8, 16, 16, 32, 48]
    assert [snap(rank, multiple=8, groups=4) for rank in (1, 2, 3, 5)] == [2, 2, 4, 6]
    assert [snap(rank, multiple=12) for rank in (3, 9, 13)] == [4, 12, 24]
    assert [snap(rank) for rank in (1, 7)] == [1, 7]


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(1, 64))
def test_a_snapped_rank_is_no_smaller_and_not_much_larger(rank: int, groups: int, multiple: int) -> None:
    snapped = snap(rank, groups=groups, multiple=multiple)
    assert rank <= snapped < rank + max(multiple, 4)
    if rank >= multiple:
        assert snapped * groups % multiple == 0


@dataclass(frozen=True)
class Times:
    dense_s: float
    chain_s: float
    verdict: str


@dataclass
class FakeLatencies:
    """Gives the times it was told, by the number of operators or in order, and remembers what it was asked."""

    chain_s: Mapping[int, float]
    asked: list[tuple[int, Shape]] = field(default_factory=list)
    calls: Iterator[float] | None = None
    dense_s: float = 1e-3

    def compare(self, dense: Operator, chain: Chain, shape: Shape) -> Times:
        assert chain.operators[0].weight.is_meta
        assert chain.out_shape(shape) == dense.out_shape(shape)
        self.asked.append((len(chain.operators), shape))
        time_s = next(self.calls) if self.calls else self.chain_s[len(chain.operators)]
        verdict = "faster" if time_s < 0.95e-3 else "slower" if time_s > 1.05e-3 else "no difference"
        return Times(self.dense_s, time_s, verdict)


def auto_plan(one: Site, latencies: FakeLatencies | None, *, only: str = "auto") -> Decision:
    totals = totals_of([one])
    return ByRule(factorization=only).plan([one], ModelFacts(totals, latencies=latencies, multiple=4))[one.name]  # type: ignore[arg-type]


def test_auto_keeps_what_is_measured_faster() -> None:
    decision = auto_plan(site("fc", planted(60, 80, 5)), FakeLatencies({2: 0.5e-3}))
    assert (decision.factorization, decision.rank) == ("svd", (8,))
    assert (decision.dense_latency, decision.latency) == (1e-3, 0.5e-3)


@pytest.mark.parametrize(
    ("seconds", "words"), [(1.1e-3, "1.10x slower than dense (1 -> 1.1 ms)"), (1e-3, "not faster than dense")]
)
def test_auto_stays_dense_where_the_chain_is_no_faster(seconds: float, words: str) -> None:
    decision = auto_plan(site("fc", planted(60, 80, 5)), FakeLatencies({2: seconds}))
    assert decision.dense
    assert decision.reason is not None
    assert words in decision.reason
    assert decision.reason.startswith("svd 8 measured")


def test_auto_tries_the_next_factorization() -> None:
    one = site("conv", conv(32, 32))
    names = [n for n, f in FACTORIZATIONS.items() if f.automatic and not auto_plan(one, None, only=n).dense]
    names.sort(key=lambda name: auto_plan(one, None, only=name).macs or 0)
    assert len(names) > 1
    assert auto_plan(one, None).factorization == names[0]
    second = FakeLatencies({}, calls=iter([2e-3, 0.5e-3]))
    assert auto_plan(one, second).factorization == names[1]
    never = FakeLatencies({}, calls=iter([2e-3] * len(names)))
    reason = auto_plan(one, never).reason or ""
    assert [name for name in names if f"{name} " in reason and "2.00x slower" in reason] == names


def test_auto_sums_over_the_calls() -> None:
    operator = conv(32, 32)
    shapes: list[Shape] = [(1, 32, 8, 8), (1, 32, 4, 4), (1, 32, 8, 8)]
    latencies = FakeLatencies({2: 0.25e-3, 3: 0.25e-3})
    decision = auto_plan(site("conv", operator, *shapes), latencies)
    assert decision.dense_latency == pytest.approx(3e-3)
    assert decision.latency == pytest.approx(0.75e-3)
    assert sorted(shape for _, shape in latencies.asked) == sorted(set(shapes))


def test_auto_without_a_signal_goes_by_energy() -> None:
    """Early weights show EVBMF nothing; the ranks then come from the energy, and may not pay."""
    fresh = site("fc", Linear(torch.randn(64, 64)))
    assert "would cost more than dense" in (auto_plan(fresh, None).reason or "")
    candidates = candidates_of(fresh, "svd")
    assert not isinstance(candidates, Refusal)
    assert KeepFaster().ranks(candidates[0]) == energy_counts(candidates[0], FALLBACK_ENERGY)


def test_auto_ranks_are_never_above_the_full_rank() -> None:
    for case in (c for c in CASES if c.dtype == torch.float64):
        candidates = candidates_of(site("it", case.operator, case.shape), "auto")
        for candidate in [] if isinstance(candidates, Refusal) else candidates:
            ranks = KeepFaster(multiple=16).ranks(candidate)
            assert all(1 <= r <= m for r, m in zip(ranks, candidate.max_ranks, strict=True))


def test_what_cannot_be_measured_stays_dense() -> None:
    class Broken(FakeLatencies):
        def compare(self, dense: Operator, chain: Chain, shape: Shape) -> Times:
            raise InputError("onnxruntime has no kernel")

    decision = auto_plan(site("fc", planted(60, 80, 5)), Broken({}))
    assert decision.reason == "svd 8 cannot be measured: onnxruntime has no kernel"


def test_an_interrupt_passes_through() -> None:
    class Interrupted(FakeLatencies):
        def compare(self, dense: Operator, chain: Chain, shape: Shape) -> Times:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        auto_plan(site("fc", planted(60, 80, 5)), Interrupted({}))


# -- predictions ---------------------------------------------------------------------------------------------------


@each(EXACT)
def test_predictions_are_what_is_built(case: Case, method: Factorization) -> None:
    """Law 5: parameters and MACs are counted ones; the error is the measured one, or bounds it."""
    one = site("it", case.operator, case.shape, case.shape)
    full = method.max_ranks(case.operator)
    for ranks in {tuple(max(1, m // 2) for m in full), tuple(max(1, m - 1) for m in full)}:
        decision = plan_of([one], {"it": ranks}, factorization=method.name)["it"]
        chain = named(method.name).factor(case.operator, ranks)
        if isinstance(chain, Refusal):
            continue  # there are no good factors of these ranks
        assert (decision.factorization, decision.rank) == (method.name, ranks)
        assert decision.parameters == chain.parameters
        assert decision.macs == 2 * chain.macs(case.shape)
        assert (decision.dense_parameters, decision.dense_macs) == (one.parameters, one.macs)
        composed = chain.compose()
        assert isinstance(composed, Operator)
        assert decision.error is not None
        error = relative_error(composed.kernel, case.operator.kernel)
        if method.name in CLOSED_FORM:
            assert decision.error == pytest.approx(error, abs=1e-7)
        elif method.name == "tucker":
            assert error <= decision.error + 1e-7
