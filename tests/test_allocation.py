"""Allocation: options of a site, the exact choice among them, and the search for a budget."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.algebra import Linear
from surgery.data.factor import RIDGE
from surgery.data.moments import Moments
from surgery.errors import InputError, Refusal
from surgery.factorizations import Ranks, named
from surgery.plans import choose
from surgery.plans.candidates import Candidate
from surgery.plans.choose import choose_damage, choose_least_cost, frontier, largest_budget
from surgery.plans.options import Counted, Option, Options, options_of
from surgery.sites import Site
from surgery.solvers.weighted import SecondMoment

SITE = Site("s", Linear(torch.ones(2, 2)), ((1, 2),))


@st.composite
def networks(draw: st.DrawFn) -> list[Options]:
    sites = []
    for i in range(draw(st.integers(1, 4))):
        costs = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
        options = [Option(f"s{i}", None, None, 0.0, 25.0)]
        options += [Option(f"s{i}", "svd", (1,), draw(st.integers(1, 20)) / 10, float(cost)) for cost in costs]
        sites.append(Options(SITE, tuple(options)))
    return sites


@given(networks(), st.floats(0, 8))
def test_the_choice_is_the_cheapest_within_the_budget(sites: list[Options], budget: float) -> None:
    chosen = choose_least_cost(sites, budget)
    every = list(itertools.product(*(site.options for site in sites)))
    allowed = [row for row in every if sum(o.damage for o in row) <= budget + 1e-9]
    best = min(sum(o.cost for o in row) for row in allowed)
    assert [option.site for option in chosen] == [site.dense.site for site in sites]
    assert sum(o.damage for o in chosen) <= budget * (1 + 1e-6) + 1e-9
    assert sum(o.cost for o in chosen) <= best * (1 + 2e-3)


@given(networks(), st.floats(1, 100))
def test_the_least_damage_within_a_cost_or_nothing(sites: list[Options], cost: float) -> None:
    chosen = choose_damage(sites, cost)
    every = list(itertools.product(*(site.options for site in sites)))
    allowed = [row for row in every if sum(o.cost for o in row) <= cost]
    if chosen is None:
        assert not allowed
        return
    assert sum(o.cost for o in chosen) <= cost * (1 + 1e-6)
    best = min(sum(o.damage for o in row) for row in allowed)
    assert sum(o.damage for o in chosen) <= best + 2e-3 * max(o.damage for s in sites for o in s.options)


@given(networks())
def test_the_frontier_falls(sites: list[Options]) -> None:
    points = frontier(sites)
    assert points[0] == (0.0, sum(site.dense.cost for site in sites))
    for (damage, cost), (more, less) in itertools.pairwise(points):
        assert more > damage
        assert less < cost


@given(
    power=st.floats(0.3, 2),
    scale=st.floats(1e-3, 1e3),
    limit=st.floats(1e-3, 10),
    start=st.floats(1e-6, 1e6),
)
def test_the_search_comes_near_the_limit_and_never_beyond(
    power: float, scale: float, limit: float, start: float
) -> None:
    trials = largest_budget(lambda b: scale * b**power, limit=limit, start=start, most=1e9, power=0.5, trials=40)
    best = max((t for t in trials if t.kept), key=lambda t: t.budget)
    assert best.value <= limit
    assert best.value >= 0.8 * limit or best.budget == 1e9  # the bracket ends at 1.1, to the power of 2 at most


def test_the_search_stops_where_no_budget_is_kept() -> None:
    trials = largest_budget(lambda budget: 1.0, limit=0.5, start=0.1, most=1.0)
    assert not any(trial.kept for trial in trials)
    assert [trial.budget for trial in trials] == sorted((trial.budget for trial in trials), reverse=True)


def moments(n: int, seed: int = 0) -> Moments:
    x = torch.randn(500, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * torch.linspace(
        1, 0, n
    )
    return Moments(500, x.mean(0)[None], SecondMoment(((x.T @ x / 500)[None],)))


def test_damages_of_svd_are_those_of_the_best_chain_for_the_data() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    site = Site("fc", Linear(weight), ((4, 16),))
    data = moments(16)
    found = options_of(site, data, Counted("macs"))
    assert isinstance(found, Options)
    second = data.second[0]
    root = torch.linalg.cholesky(second + RIDGE * second.diagonal().mean() * torch.eye(16, dtype=torch.float64))
    values = torch.linalg.svdvals(weight @ root).square()
    total = float((weight @ second * weight).sum())
    for option in found.options[1:]:
        assert option.ranks is not None
        assert option.damage == pytest.approx(float(values[option.ranks[0] :].sum()) / total, rel=1e-9)
        assert option.cost == named("svd").skeleton(site.operator, option.ranks).macs((4, 16))
    costs = [option.cost for option in found.options]
    damages = [option.damage for option in found.options]
    assert costs == sorted(costs, reverse=True)
    assert damages == sorted(damages)


@dataclass(frozen=True)
class Slope:
    """Measured seconds that grow by a share with each rank."""

    share: float
    what: str = "latency"
    measured: bool = True

    def price(self, candidate: Candidate, choices: Sequence[Ranks], /) -> tuple[float, list[float]]:
        return 1000.0, [10 * (1 + self.share * ranks[0]) for ranks in choices]


def test_what_is_cheaper_by_chance_is_no_option() -> None:
    """Of ranks that cost the same but for noise the one of least damage is left; of others all are."""
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    site = Site("fc", Linear(weight), ((4, 16),))
    flat, steep = (options_of(site, moments(16), Slope(share)) for share in (1e-4, 1.0))
    assert isinstance(flat, Options)
    assert isinstance(steep, Options)
    assert len(flat.options) == 2
    assert len(steep.options) > 2
    assert flat.options[1].damage == min(option.damage for option in steep.options[1:])
    costs = [option.cost for option in steep.options]
    assert all(low <= 0.95 * high for high, low in itertools.pairwise(costs))


def test_a_site_that_cannot_gain_says_so() -> None:
    site = Site("fc", Linear(torch.randn(2, 2)), ((1, 2),))
    refusal = options_of(site, moments(2), Counted("params"))
    assert isinstance(refusal, Refusal)
    assert len(refusal.reason) > 10


def test_costs_have_known_names() -> None:
    with pytest.raises(InputError, match="cost='joules'"):
        Counted("joules")


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with choose._silence():
        libc.puts(b"a line of the solver")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"
