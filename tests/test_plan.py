"""Plans: made in order, completed from files, edited, diffed, and read from hostile text."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.algebra import Conv, Geometry, Linear, Operator
from surgery.errors import FileError, InputError, RankError
from surgery.factorizations import FACTORIZATIONS, Spectrum
from surgery.factorizations.svd import Svd
from surgery.plans.by_rule import ByRule, ModelFacts, complete_plan
from surgery.plans.plan import Decision, Plan
from surgery.sites import Site, Totals
from surgery.system.progress import Progress, silent
from tests.cases import decaying


def conv(out: int, into: int, *, groups: int = 1) -> Conv:
    weight = decaying(torch.randn(out, into // groups, 3, 3))
    return Conv(weight, Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), (0, 0)), groups)


SITES = [
    Site("stem", conv(16, 3), ((1, 3, 8, 8),)),
    Site("body.conv1", conv(24, 16), ((1, 16, 8, 8), (1, 16, 8, 8))),
    Site("body.depthwise", conv(24, 24, groups=24), ((1, 24, 8, 8),)),
    Site("head", Linear(decaying(torch.randn(30, 24))), ((1, 24),)),
    Site("gate", Linear(torch.randn(1, 24)), ((1, 24),)),
]
TOTALS = Totals(sum(s.parameters for s in SITES) + 100, sum(s.macs for s in SITES))


def rule_plan(
    sites: list[Site],
    *,
    totals: Totals,
    latencies: Any = None,
    multiple: int | None = None,
    progress: Progress = silent,
    **rule: Any,
) -> Plan:
    return ByRule(**rule).plan(sites, ModelFacts(totals, (), latencies, multiple, progress))


def stand_alone(plan: Plan) -> Plan:
    return Plan.from_json(plan.to_json())


# -- making --------------------------------------------------------------------------------------------------------


def test_one_decision_for_each_site_in_order_with_costs_and_reasons() -> None:
    plan = rule_plan(SITES, ranks="energy=0.7", totals=TOTALS)
    assert [d.site for d in plan] == [s.name for s in SITES]
    assert plan.ranks == "energy=0.7"
    for decision, site in zip(plan, SITES, strict=True):
        assert (decision.dense_parameters, decision.dense_macs) == (site.parameters, site.macs)
        chain = (decision.factorization, decision.rank, decision.error, decision.parameters, decision.macs)
        assert all(value is None for value in chain) == decision.dense == bool(decision.reason)
        assert all(value is not None for value in chain) != decision.dense
    assert "rank 1 already" in (plan["gate"].reason or "")


def test_include_and_exclude() -> None:
    plan = rule_plan(SITES, ranks=2, include=["body.*", "head"], exclude=["*.conv1"], totals=TOTALS)
    assert plan["stem"].reason == "not included"
    assert plan["body.conv1"].reason == "excluded"
    assert plan["head"].rank == (2,)
    with pytest.raises(InputError, match="no site matches 'nothing'"):
        rule_plan(SITES, ranks=2, exclude=["nothing"], totals=TOTALS)


@pytest.mark.parametrize("ranks", ["measured", "vbmf", "energy=0.9", "keep_params=0.8", "full", 2])
def test_each_spectrum_is_computed_at_most_once_and_none_for_what_is_left_out(
    ranks: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = Svd.spectra

    def spectra(self: Svd, operator: Operator) -> tuple[Spectrum, ...]:
        computed.append(id(operator))
        return original(self, operator)

    monkeypatch.setattr(Svd, "spectra", spectra)
    rule_plan(SITES, ranks=ranks, factorization="svd", exclude=["stem"], totals=TOTALS)
    assert len(set(computed)) == len(computed)
    assert id(SITES[0].operator) not in computed


def test_progress_counts_up_to_all_sites() -> None:
    seen: list[tuple[str, int, int]] = []
    for ranks in ("energy=0.5", "keep_macs=0.9"):
        rule_plan(SITES, ranks=ranks, exclude=["gate"], totals=TOTALS, progress=lambda *step: seen.append(step))
    assert seen == 2 * [("plan", done, 4) for done in range(5)]


@pytest.mark.parametrize(("name", "value"), [("factorization", "qr"), ("multiple", 0), ("ranks", "best")])
def test_bad_arguments_are_told_before_any_work(name: str, value: object) -> None:
    with pytest.raises(InputError, match=str(value)) as error:
        rule_plan(SITES, totals=TOTALS, **{name: value})  # type: ignore[arg-type]
    assert error.value.allowed


def test_a_weight_that_is_not_finite_names_its_site() -> None:
    broken = Site("broken", Linear(torch.full((4, 4), torch.nan)), ((1, 4),))
    with pytest.raises(InputError, match="'broken' has values that are not finite"):
        rule_plan([*SITES, broken], ranks="energy=0.5", totals=TOTALS)
    assert rule_plan([*SITES, broken], ranks=2, exclude=["broken"], totals=TOTALS)["broken"].dense


def test_an_empty_weight_stays_dense() -> None:
    empty = Site("empty", Linear(torch.empty(0, 4)), ((1, 4),))
    assert rule_plan([empty], totals=TOTALS)["empty"].reason == "its weight is empty"


def test_half_precision_weights_are_planned() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        site = Site("half", SITES[3].operator.to(dtype=dtype), ((1, 24),))
        assert rule_plan([site], ranks="energy=0.5", totals=TOTALS)["half"].rank


def test_the_savings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="surgery"):
        rule_plan(SITES, ranks={"head": 2}, totals=TOTALS)
    assert f"1 of 5 sites change: {TOTALS.parameters - 30 * 24 + 2 * 54} of" in caplog.text


# -- completing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ["energy=0.6", "keep_params=0.8", "full", 2])
def test_a_plan_from_a_file_is_completed_to_itself(ranks: str | int) -> None:
    plan = rule_plan(SITES, ranks=ranks, totals=TOTALS)
    assert complete_plan(stand_alone(plan), SITES, TOTALS) == plan


def test_predictions_are_filled_in_and_absent_sites_stay_dense() -> None:
    rows = (Decision("head", "svd", (3,)), Decision("body.conv1", "tucker", (4,)), Decision("stem"))
    completed = complete_plan(Plan(rows, ranks="by hand"), SITES, TOTALS)
    assert [d.site for d in completed] == [s.name for s in SITES]
    assert completed.ranks == "by hand"
    assert completed["head"] == rule_plan(SITES, ranks={"head": 3}, totals=TOTALS)["head"]
    assert completed["body.conv1"].rank == (4, 4)
    assert completed["gate"].reason == "not in the plan"
    assert completed["stem"].reason == "dense in the plan"


def test_latencies_are_kept_while_they_are_for_the_same_chain() -> None:
    plan = rule_plan(SITES, ranks={"head": 3}, totals=TOTALS)
    timed = replace(plan["head"], dense_latency=2e-3, latency=1e-3)
    kept = complete_plan(Plan((timed,)), SITES, TOTALS)["head"]
    assert (kept.dense_latency, kept.latency) == (2e-3, 1e-3)
    dropped = complete_plan(Plan((replace(timed, rank=(4,)),)), SITES, TOTALS)["head"]
    assert (dropped.dense_latency, dropped.latency) == (None, None)
    assert dropped.parameters == 4 * 54


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (Decision("hed", "svd", (3,)), InputError, r"'hed'.*did you mean 'head'"),
        (Decision("head", "svd", (25,)), RankError, r"'head' cannot take rank 25.*rank 1 to 24"),
        (Decision("body.conv1", "tucker", (4, 17)), RankError, r"'body\.conv1'.*out 1 to 24, in 1 to 16"),
        (Decision("head", "svd", (3, 4)), RankError, r"'head' cannot take rank 3,4"),
        (Decision("head", "tucker", (3, 4)), InputError, r"tucker for 'head', which does not fit.*kernel position"),
        (Decision("gate", "svd", (1,)), InputError, r"svd for 'gate', which does not fit"),
    ],
)
def test_a_plan_for_another_model_is_an_error(row: Decision, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        complete_plan(Plan((row,)), SITES, TOTALS)


# -- the value -----------------------------------------------------------------------------------------------------

counts = st.none() | st.integers(0, 2**60)
reals = st.none() | st.floats(0, 1e9)
ranks_lists = st.lists(st.integers(1, 999), min_size=1, max_size=4).map(tuple)
decisions = st.builds(
    Decision,
    site=st.text(max_size=8),
    reason=st.none() | st.text(max_size=8),
    error=reals,
    dense_parameters=counts,
    parameters=counts,
    dense_macs=counts,
    macs=counts,
    dense_latency=reals,
    latency=reals,
)
factored = st.builds(
    lambda d, f, r: replace(d, factorization=f, rank=r), decisions, st.sampled_from(list(FACTORIZATIONS)), ranks_lists
)
plans = st.builds(
    lambda rows, ranks: Plan(tuple(rows), ranks),
    st.lists(decisions | factored, max_size=5, unique_by=lambda d: d.site),
    st.text(max_size=8),
)


@given(plans)
def test_json_round_trip(plan: Plan) -> None:
    assert stand_alone(plan) == plan
    assert plan.diff(stand_alone(plan)) == []


def test_read_from_a_file(tmp_path: Path) -> None:
    plan = rule_plan(SITES, ranks=2, totals=TOTALS)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert Plan.read(path) == plan
    os.mkfifo(tmp_path / "pipe")
    path.write_bytes(b"\xff\xfe\x00")
    for name, said in (("none", "does not exist"), ("", "a folder"), ("pipe", "a pipe"), ("plan.json", "UTF-8 text")):
        with pytest.raises(FileError, match=said):
            Plan.read(tmp_path / name)


def test_edit_and_diff() -> None:
    plan = rule_plan(SITES, ranks={"head": 3, "body.conv1": (4, 4)}, totals=TOTALS)
    edited = plan.edit("head", rank=5).edit("body.conv1", rank=None).edit("stem", factorization="svd", rank=(2,))
    assert plan["head"].rank == (3,)  # the first plan is as it was
    assert edited["head"] == Decision("head", "svd", (5,))
    assert plan.diff(edited) == [
        "stem: dense (the ranks do not name it) -> svd 2",
        "body.conv1: tucker 4,4 -> dense (by hand)",
        "head: svd 3 -> svd 5",
    ]
    assert Plan(plan.decisions[:3]).diff(Plan(plan.decisions[:4])) == ["head: absent -> svd 3"]
    assert Plan((Decision("a"),)).diff(Plan(())) == ["a: dense -> absent"]
    completed = complete_plan(stand_alone(edited), SITES, TOTALS)
    assert completed["head"].error is not None


@pytest.mark.parametrize("rank", [0, -1, (), (3, 0), True, "3", 1.5])
def test_edit_refuses_what_is_no_rank(rank: object) -> None:
    plan = Plan((Decision("head", "svd", (3,)),))
    with pytest.raises(RankError, match="whole numbers from 1"):
        plan.edit("head", rank=rank)  # type: ignore[arg-type]


def test_edit_refuses_unknown_sites_and_missing_factorizations() -> None:
    plan = Plan((Decision("head", "svd", (3,)), Decision("stem", reason="excluded")))
    with pytest.raises(InputError, match="no site 'tail'"):
        plan.edit("tail", rank=2)
    with pytest.raises(InputError, match="say factorization= as well"):
        plan.edit("stem", rank=2)
    with pytest.raises(InputError, match="unknown factorization 'qr'"):
        plan.edit("stem", factorization="qr", rank=2)


def text_of(*rows: object, **fields: object) -> str:
    return json.dumps({"surgery_plan": 1, "ranks": "", "decisions": list(rows), **fields})


OK = {"site": "a", "factorization": "svd", "rank": [2]}
HOSTILE = {
    "empty": "",
    "no json": "{",
    "a list": "[]",
    "null": "null",
    "another version": text_of(surgery_plan=2),
    "no decisions": '{"surgery_plan": 1}',
    "decisions no list": text_of(decisions={"a": 1}),
    "ranks no text": text_of(ranks=[1]),
    "deep": "[" * 200_000,
    "huge number": '{"surgery_plan": ' + "9" * 10_000 + "}",
    "byte order mark": "\ufeff" + text_of(OK),
    "row no object": text_of(3),
    "row without site": text_of({"rank": [1]}),
    "site no text": text_of({**OK, "site": 3}),
    "unknown field": text_of({**OK, "__class__": "x"}),
    "twice": text_of(OK, OK),
    "rank alone": text_of({"site": "a", "rank": [1]}),
    "factorization alone": text_of({"site": "a", "factorization": "svd"}),
    "factorization unknown": text_of({**OK, "factorization": "qr"}),
    "factorization no text": text_of({**OK, "factorization": ["svd"]}),
    "rank 0": text_of({**OK, "rank": [0]}),
    "rank negative": text_of({**OK, "rank": -4}),
    "rank true": text_of({**OK, "rank": True}),
    "rank real": text_of({**OK, "rank": [2.0]}),
    "rank text": text_of({**OK, "rank": "2"}),
    "rank none": text_of({**OK, "rank": []}),
    "rank past all sizes": text_of({**OK, "rank": [2**63]}),
    "rank of many digits": text_of({**OK, "rank": 10**4000}),
    "rank nested": text_of({**OK, "rank": [[2]]}),
    "error text": text_of({**OK, "error": "small"}),
    "error not a number": text_of({**OK, "error": float("nan")}),
    "latency infinite": text_of({**OK, "latency": float("inf")}),
    "latency past all floats": text_of({**OK, "latency": 10**400}),
    "latency of ages": text_of({**OK, "dense_latency": 1e300}),
    "parameters past all sizes": text_of({**OK, "parameters": 2**63}),
    "parameters negative": text_of({**OK, "parameters": -1}),
    "macs real": text_of({**OK, "macs": 1.5}),
    "reason no text": text_of({"site": "a", "reason": {"a": 1}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_one_short_error(name: str) -> None:
    with pytest.raises(InputError) as error:
        Plan.from_json(HOSTILE[name])
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_one_rank_may_stand_without_brackets() -> None:
    assert Plan.from_json(text_of({**OK, "rank": 4}))["a"].rank == (4,)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_any_value_in_any_field_is_read_or_refused(value: object) -> None:
    for name in ("site", "factorization", "rank", "reason", "error", "macs", "latency"):
        try:
            plan = Plan.from_json(text_of({**OK, name: value}))
        except InputError:
            continue
        assert stand_alone(plan) == plan
