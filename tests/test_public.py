"""The public names: how many arguments they take, and that the types in their signatures can be imported."""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InputError
from surgery.kinds.registry import Model

MOST = 12  # arguments


def _is_own(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("surgery.")


def _functions() -> list[Callable[..., Any]]:
    """Return all functions and methods that a user may call, and the constructors that are written by hand."""
    found: list[Callable[..., Any]] = []
    for name in surgery.__all__:
        value = getattr(surgery, name)
        if inspect.isclass(value):
            found += [m for n, m in inspect.getmembers(value, inspect.isroutine) if n[0] != "_" and _is_own(m)]
            found += [] if is_dataclass(value) or issubclass(value, Exception) else [value.__init__]
        elif callable(value):
            found.append(value)
    return found


FUNCTIONS = pytest.mark.parametrize("function", _functions(), ids=lambda f: getattr(f, "__qualname__", str(f)))
RESULTS = ["Bisection", "DecomposeResult", "Difference", "Goal", "Plan", "RecomposeResult", "Search", "Timing"]


@FUNCTIONS
def test_no_public_function_takes_more_than_twelve_arguments(function: Callable[..., Any]) -> None:
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    assert len(names) <= MOST, names


def _classes(hint: Any) -> Iterator[type]:
    """Yield our classes in a type, and in the types inside of it; protocols are for others to have."""
    for value in (hint, typing.get_origin(hint)):
        if isinstance(value, type) and _is_own(value) and not getattr(value, "_is_protocol", False):
            yield value
    for part in typing.get_args(hint):
        for inner in part if isinstance(part, list) else [part]:
            yield from _classes(inner)


@FUNCTIONS
def test_every_type_of_a_public_signature_is_public(function: Callable[..., Any]) -> None:
    hints = typing.get_type_hints(inspect.unwrap(function), localns={"Model": Model})
    assert not {c.__name__ for hint in hints.values() for c in _classes(hint)} - set(surgery.__all__)


@pytest.mark.parametrize("name", RESULTS)
def test_every_type_in_a_result_is_public(name: str) -> None:
    hints = typing.get_type_hints(getattr(surgery, name))
    public = {n: hint for n, hint in hints.items() if not n.startswith("_")}
    assert not {c.__name__ for hint in public.values() for c in _classes(hint)} - set(surgery.__all__)


@pytest.mark.parametrize("function", [surgery.decompose, surgery.recompose, surgery.preview])
def test_results_are_of_the_kind_of_the_model(function: Callable[..., Any]) -> None:
    hints = typing.get_type_hints(inspect.unwrap(function))
    (kind,) = typing.get_args(hints["return"])
    assert typing.get_args(hints["model"]) == (kind, str, os.PathLike[str]), "a model, or the path of its file"
    assert typing.get_type_hints(typing.get_origin(hints["return"]))["model"].__name__ in ("_Model", "_Result")


@pytest.mark.parametrize(
    "call",
    [
        lambda: surgery.load(5),  # type: ignore[arg-type]
        lambda: surgery.save(nn.Linear(2, 2), 5),  # type: ignore[arg-type]
        lambda: surgery.from_pretrained(5),  # type: ignore[arg-type]
        lambda: surgery.bisect(5, nn.Linear(2, 2), torch.ones(1, 2), metric=float),  # type: ignore[arg-type]
    ],
    ids=["load", "save", "from_pretrained", "bisect"],
)
def test_what_is_no_path_and_no_model_is_said_so(call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=r"a path of type int|int is not a model"):
        call()


def test_a_factored_original_has_nothing_to_bisect_with() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    x = torch.ones(2, 16)
    small = surgery.decompose(net, x, ranks=4).model
    smaller = surgery.decompose(small, x, ranks=2).model
    with pytest.raises(InputError, match="the first model is factored itself"):
        surgery.bisect(small, smaller, x, metric=lambda module: float(module(x).sum()))


def test_a_site_is_shown_without_its_numbers() -> None:
    sites, _ = surgery.find_sites(nn.Sequential(nn.Linear(16, 8)), torch.ones(2, 16))
    assert repr(sites[0]) == "Site('0', Linear, inputs 2x16)"
