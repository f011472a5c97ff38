"""Goals are values that say one promise, and what cannot be said together is one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import Decision, Goal, OnnxRuntime, Plan
from surgery.errors import InputError, RankError
from surgery.passes.clock import Instruments, instruments_of
from surgery.passes.fitting import FitOptions
from surgery.passes.job import Selection, read_job
from surgery.passes.original import Original
from surgery.passes.run import propose
from surgery.plans.rules import parse_ranks

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()


ANY: Any = Goal  # takes arguments of wrong types, as who does not check types gives them


def metric(module: nn.Module) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Goal.error(0.0), r"max_error=0; allowed: numbers above 0"),
        (lambda: Goal.error(float("nan")), r"max_error=nan; allowed: numbers above 0"),
        (lambda: ANY.error("small"), r"max_error='small'; allowed: numbers above 0"),
        (lambda: Goal.error(True), r"max_error=True; allowed"),
        (lambda: ANY.error(0.1, cost="joules"), "cost='joules' is not known; allowed: latency, macs, params"),
        (lambda: ANY.error(0.1, metric=3), "the metric is a int; allowed: a function"),
        (lambda: Goal.speedup(0.5), r"target_speedup=0\.5; allowed: numbers from 1"),
        (lambda: Goal("target_speedup", 2.0, cost="macs"), r"Goal\.speedup with cost='macs'; allowed: cost='latency'"),
        (lambda: Goal("max_error", 0.1, best_effort=True), r"Goal\.error with best_effort; allowed"),
        (lambda: ANY.speedup(1.5, best_effort="no"), r"best_effort='no'; allowed: True, False"),
        (lambda: Goal.error(0.1, cost="macs", backend="onnxruntime"), "a backend with cost='macs', for which nothing"),
        (lambda: Goal.drop(0, metric, cost="params", backend=OnnxRuntime(keep=False)), "a backend with cost='params'"),
        (lambda: Goal.drop(-0.1, metric), r"max_drop=-0\.1; allowed: numbers from 0"),
        (lambda: Goal("max_drop", 0.1), r"Goal\.drop has no metric"),
        (lambda: ANY("energy", 0.1), "the goal 'energy' is not known; allowed: max_error"),
    ],
)
def test_a_goal_that_means_nothing_is_refused_when_it_is_made(make: Callable[[], Goal], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make()
    assert error.value.allowed or error.value.next_step


def test_goals_are_values() -> None:
    assert Goal.drop(0, metric) == Goal.drop(0, metric)
    assert Goal.error(0.1) != Goal.error(0.1, cost="macs")
    assert [str(goal) for goal in (Goal.error(), Goal.speedup(1.5), Goal.drop(0.005, metric))] == [
        "max_error=0.05",
        "target_speedup=1.5",
        "max_drop=0.005",
    ]


@pytest.mark.parametrize("function", [surgery.decompose, surgery.plan, surgery.preview])
def test_a_text_is_one_pattern(function: Any) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(11))).eval()
    found = function(model, torch.randn(2, 16), ranks=4, include="10")
    rows = found if isinstance(found, Plan) else found.plan
    assert [d.site for d in rows if not d.dense] == ["10"]


def test_a_plan_is_the_first_argument_of_apply() -> None:
    for given in (5, network()):
        with pytest.raises(InputError, match=r"the plan is a .*; allowed: surgery\.Plan"):
            surgery.apply(given, network())  # type: ignore[arg-type]


MADE = Plan(())
TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"ranks": MADE, "factorization": "svd"}, "factorization with a plan, which says it for each site"),
    ({"ranks": MADE, "joint": "inputs"}, "joint with a plan"),
    ({"ranks": Goal.error(), "joint": "inputs"}, "joint with the promise max_error=0.05"),
    ({"joint": [("0", "2")]}, "joint with the promise"),
    ({"ranks": 4, "groups": 2}, "groups=2 without calibration data"),
    ({"groups": 2}, "groups=2 without calibration data"),
    ({"ranks": 4, "calibration": X, "groups": 0}, "groups=0; allowed: whole numbers from 1"),
    ({"ranks": 4, "calibration": X, "groups": 1.5}, "groups=1.5; allowed"),
    ({"ranks": 4, "solver": "magic"}, "the solver 'magic' is not known; allowed"),
    ({"ranks": MADE, "solver": "magic"}, "the solver 'magic' is not known; allowed"),
    ({"ranks": 4, "include": 5}, "include=5; allowed: glob patterns"),
    ({"ranks": 4, "exclude": ["0", 5]}, r"exclude=\['0', 5\]; allowed: glob patterns"),
    ({"ranks": 4, "progress": 5}, "progress=5; allowed: a function"),
    ({"ranks": 4, "solver": "pp", "factorization": "svd"}, "the solver 'pp' for svd; allowed: auto, tensorly"),
    ({"ranks": Goal.error(), "solver": "pp", "factorization": "svd"}, "the solver 'pp' for svd"),
    (
        {"ranks": Plan((Decision("0", "svd", (4,)),)), "solver": "gd"},
        "the solver 'gd' for svd; allowed: auto, tensorly",
    ),
    (
        {"ranks": 4, "joint": ["0", "2"]},
        r"joint=\['0', '2'\], in which '0' is no group; allowed: \"inputs\", or groups",
    ),
    ({"ranks": 4, "joint": 5}, "joint=5, in which 5 is no group"),
    ({"ranks": ANY.error(backend=3)}, "backend is a int; allowed: surgery.Backend, onnxruntime"),
    ({"ranks": Goal.error(backend="abacus")}, "the backend 'abacus' is not known; allowed: onnxruntime"),
]


@pytest.mark.parametrize(("arguments", "message"), TOGETHER, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_said_together_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        surgery.decompose(network(), X[:2], **arguments)
    assert error.value.next_step or error.value.allowed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 4, "calibration": X}, "calibration for the plan of a rule, which does not look at it"),
        ({"ranks": 4, "solver": "als"}, "solver for the plan of a rule"),
        ({"ranks": Goal.error(), "backend": OnnxRuntime(keep=False)}, "a backend with a Goal, which has its own"),
        ({"ranks": 4, "backend": 3}, "backend is a int"),
        ({"ranks": 4, "backend": "abacus"}, "the backend 'abacus' is not known; allowed: onnxruntime"),
    ],
)
def test_a_plan_ignores_nothing_that_it_is_given(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        surgery.plan(network(), X[:2], **arguments)


class Untimed(OnnxRuntime):
    """A backend that must not be asked."""

    def compare(self, dense: Any, chain: Any, shape: Any) -> Any:
        raise AssertionError("a count needs no timing")


@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize("goal", [Goal.error, lambda limit, cost: Goal.drop(limit, metric, cost=cost)])
def test_a_goal_that_counts_its_cost_times_nothing(goal: Any, cost: str) -> None:
    asked = goal(0.99, cost=cost)
    job = read_job(network(), X[:2], asked, Selection(exclude=("2",)), FitOptions())
    instruments = Instruments(backend=Untimed(keep=False))
    plan = propose(job, asked, instruments, Original(job.model, job.inputs))[0].plan
    assert plan["0"].factorization is not None
    assert plan["2"].reason == "excluded"
    found = plan["0"].parameters if cost == "params" else plan["0"].macs
    dense = plan["0"].dense_parameters if cost == "params" else plan["0"].dense_macs
    assert found is not None
    assert dense is not None
    assert found < dense


def test_a_promise_has_no_preview() -> None:
    for ranks in ("auto", Goal.speedup(2)):
        with pytest.raises(InputError, match="which is known by building models"):
            surgery.preview(network(), X[:2], ranks=ranks)


def test_a_predicted_error_that_is_a_bound_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3)).eval()
    x = torch.randn(1, 8, 8, 8)
    for factorization, bound in (("tucker", "at most"), ("cp", "at least"), ("spatial", "")):
        shown = surgery.preview(model, x, ranks=2, factorization=factorization)
        assert [change.bound for change in shown.changes] == [bound]
        assert all((word in repr(shown)) == (word == bound) for word in ("at most", "at least"))
        made = surgery.decompose(model, x, ranks=2, factorization=factorization)
        assert [change.bound for change in made.changes] == [""]
        ratio = made.changes[0].error / shown.changes[0].error
        assert ratio <= 1 + 1e-4 if bound != "at least" else ratio >= 1 - 1e-4


def test_a_promise_is_not_a_rule() -> None:
    with pytest.raises(RankError, match="ranks='auto' is a promise, which is not a rule"):
        parse_ranks("auto")


def test_a_plan_is_still_narrowed() -> None:
    made = surgery.plan(network(), X[:2], ranks=8)
    result = surgery.decompose(network(), X[:2], ranks=made, exclude=["2"])
    assert [change.site for change in result.changes] == ["0"]
    assert result.plan["2"].reason == "excluded"


def test_a_backend_can_be_named() -> None:
    assert isinstance(instruments_of(Goal.error(backend="onnxruntime")).backend, OnnxRuntime)


def test_a_plan_with_latencies_is_carried_out_with_them() -> None:
    class Known(OnnxRuntime):
        def compare(self, dense: Any, chain: Any, shape: Any) -> Any:

            return surgery.Comparison(2.0, 1.0, 2.0, 2.0, 2.0, "faster")

    shown = surgery.preview(network(), X[:2], ranks=8, backend=Known(keep=False))
    result = surgery.decompose(network(), X[:2], ranks=shown.plan)
    assert result.plan == shown.plan
    assert [change.latency for change in result.changes] == [1.0, 1.0]
