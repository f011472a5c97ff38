"""What it takes to add a kind of models, or a factorization: one file, and one row."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.algebra import Chain, Linear, Operator, relative_error
from surgery.factorizations import FACTORIZATIONS
from surgery.kinds.registry import KINDS, kind_of
from tests.tolerances import tolerance
from tests.toy_factorization import Turned
from tests.toy_kind import LayersKind

X = torch.linspace(-1, 1, 24 * 16).view(24, 16).sin()


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"first": nn.Linear(16, 24), "act": nn.ReLU(), "last": nn.Linear(24, 8)}


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "layers", LayersKind())


def run(model: dict[str, nn.Module], x: torch.Tensor) -> torch.Tensor:
    return kind_of(model).runnable(model)(x).detach()


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("calibration", [None, X], ids=["weights", "data"])
def test_a_toy_kind_is_decomposed_and_recomposed(calibration: Any) -> None:
    model = layers()
    done: Any = surgery.decompose(model, X, ranks=4, factorization="svd", calibration=calibration)
    assert [change.site for change in done.changes] == ["first", "last"]
    assert list(done.model) == list(model)
    assert isinstance(model["first"], nn.Linear)  # a copy was changed
    back: Any = surgery.recompose(done.model, X)
    assert [fusion.site for fusion in back.changes] == ["first", "last"]
    assert all(type(new) is type(old) for new, old in zip(back.model.values(), model.values(), strict=True))
    difference = (run(back.model, X) - run(done.model, X)).norm() / run(done.model, X).norm()
    assert difference <= tolerance(torch.float32, length=24, steps=4)


@pytest.mark.usefixtures("_known")
def test_full_ranks_of_a_toy_kind_are_exact() -> None:
    model: Any = layers()
    done: Any = surgery.decompose(model, X, ranks="full", factorization="svd")
    difference = (run(done.model, X) - run(model, X)).norm() / run(model, X).norm()
    assert difference <= tolerance(torch.float32, length=24, steps=4)


@pytest.mark.usefixtures("_known")
def test_the_promise_holds_for_a_toy_kind() -> None:
    model: Any = layers()
    done: Any = surgery.decompose(model, X, calibration=X)
    assert done.promise is not None
    assert done.promise.kept


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(FACTORIZATIONS, "turned", Turned())
    return "turned"


def test_a_toy_factorization_keeps_the_laws(turned: str) -> None:
    method, operator = FACTORIZATIONS[turned], Linear(X[:12].clone(), bias=X[0, :12].clone())
    errors = []
    for rank in range(1, 13):
        chain = method.factor(operator, (rank,))
        assert isinstance(chain, Chain)
        whole = chain.compose()
        assert isinstance(whole, Operator)
        errors.append(relative_error(whole.weight, operator.weight))
        assert whole.bias is not None
        assert torch.equal(whole.bias, X[0, :12])
    allowed = tolerance(torch.float32, length=16, steps=4)
    assert all(after <= before + allowed for before, after in itertools.pairwise(errors))
    assert errors[-1] <= allowed


@pytest.mark.parametrize("kind", ["module", "program"])
def test_a_toy_factorization_goes_through_every_kind(turned: str, kind: str) -> None:
    module = nn.Sequential(*layers().values()).eval()
    model: Any = module if kind == "module" else torch.export.export(module, (X,))
    done = surgery.decompose(model, X, ranks=4, factorization=turned)
    assert [change.factorization for change in done.changes] == [turned, turned]
    back = surgery.recompose(done.model, X).model
    names = back.state_dict if kind == "program" else back.state_dict()
    assert {name: value.shape for name, value in names.items()} == {
        name: value.shape for name, value in module.state_dict().items()
    }
