"""Split models that take, return or check odd things: constants, dicts, flags, checks without readers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import surgery
from surgery.errors import InputError

X = torch.randn(3, 4)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class _Flags(_Net):
    """Takes a number, a truth and what may be None."""

    def forward(self, x: Tensor, n: int, mask: Tensor | None, *, scale: float = 2.0, twice: bool = False) -> Tensor:
        x = torch.relu(self.a(x)) * n
        x = x if mask is None else x * mask
        return self.b(x * scale) + (2 if twice else 1)


class _Dict(_Net):
    """Takes what it adds out of a dict, and leaves an option out."""

    def forward(self, x: Tensor, more: dict[str, Any], option: Tensor | None = None, scale: float = 1.5) -> Any:
        x = self.a(x) + more["p"] * more["q"][0]
        return {"y": self.b(torch.relu(x) * scale), "z": [x, None]}


class _Checked(_Net):
    """``torch.export`` puts a check of the input before a change of its memory format."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        return self.b(torch.relu(self.a(x)))


CASES: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "constants": (_Flags(), (X, 3, None), {"scale": 0.5, "twice": True}),
    "optional": (_Flags(), (X, 3, torch.ones(4)), {}),
    "dict": (_Dict(), (X, {"p": torch.randn(3, 4), "q": [torch.randn(4)]}), {}),
    "checked": (_Checked(), (X,), {}),
}


def _same(one: Any, other: Any) -> bool:
    (first, form), (second, again) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    pairs = zip(first, second, strict=True)
    return form == again and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_odd_inputs_go_through_stages_and_files(name: str, stages: int, exported: bool, tmp_path: Path) -> None:
    model, args, kwargs = CASES[name]
    want = model(*args, **kwargs)
    given: Any = torch.export.export(model, args, kwargs) if exported else model
    cut = surgery.split(given, (args, kwargs), stages=stages, measure=False)
    assert _same(cut.run(*args, **kwargs), want)
    cut.save(tmp_path / "stages")
    loaded = surgery.load_split(tmp_path / "stages")
    assert _same(loaded.run(*args, **kwargs), want)
    assert _same(loaded.join().module()(*args, **kwargs), want)


def test_constants_of_an_export_may_not_be_others() -> None:
    model, args, kwargs = CASES["constants"]
    cut = surgery.split(torch.export.export(model, args, kwargs), stages=2, measure=False)
    with pytest.raises(InputError, match="the input n is 4; allowed: 3"):
        cut.run(X, 4, None, **kwargs)
    with pytest.raises(InputError, match="the input twice is 1; allowed: True"):
        cut.run(X, 3, None, scale=0.5, twice=1)


def test_a_traced_graph_refuses_inputs_that_it_does_not_take() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    cut = surgery.split(graph, X, stages=2, measure=False)
    with pytest.raises(InputError, match="1 more inputs than the graph takes"):
        cut.run(X, X)
    with pytest.raises(InputError, match="an input other"):
        cut.run(X, other=X)


@dataclass
class _Unnamed:
    y: Tensor


class _Returns(_Net):
    def forward(self, x: Tensor) -> _Unnamed:
        return _Unnamed(self.b(torch.relu(self.a(x))))


def test_a_result_that_no_file_can_name_is_refused_in_one_line() -> None:
    pytree.register_dataclass(_Unnamed)
    program = torch.export.export(_Returns(), (X,))
    with pytest.raises(InputError, match="what the program takes or returns cannot be written"):
        surgery.split(program, stages=2, measure=False)
