"""Factored models that were exported to ONNX come back: each chain in the file is one operator again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import surgery
from surgery.algebra import relative_error
from surgery.factorizations import FACTORIZATIONS, named
from surgery.kinds.registry import kind_of
from surgery.passes.preview import find_sites
from surgery.runtime.compare import run_model
from surgery.sites import FactoredSite


class Layers(nn.Module):
    """Layers of all kinds, each on an input of its own kind; one export covers them all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(16, 12), nn.Linear(8, 6, bias=False)
        self.table = nn.Embedding(24, 8)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.strided = nn.Conv2d(8, 6, 3, stride=2, bias=False)
        self.grouped, self.dilated = nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(8, 6, (3, 2), dilation=(2, 1), padding=1)
        self.point, self.up = nn.Conv2d(8, 6, 1), nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1)
        self.solid = nn.Conv3d(4, 6, (2, 3, 3), padding=(1, 0, 1))

    def forward(self, x: Tensor, tokens: Tensor, image: Tensor, solid: Tensor) -> list[Tensor]:
        table = self.table(tokens)  # (n, 5, 8)
        images = (self.strided, self.grouped, self.dilated, self.point, self.up)
        lines = [self.linear(x), self.rows(table), self.line(table.transpose(1, 2)), self.solid(solid)]
        return [torch.relu(value) for value in (*lines, *(layer(image) for layer in images))]


def inputs(batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    sizes = ((batch, 16), (batch, 8, 7, 7), (batch, 4, 3, 5, 5))
    x, image, solid = (torch.randn(size, generator=generator) for size in sizes)
    return x, torch.randint(24, (batch, 5), generator=generator), image, solid


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights, but for the order of axes: what was a tensor train is stored in the other layout."""
    return {name: tuple(sorted(tensor.shape)) for name, tensor in kind_of(model).tensors(model).items()}


def exported(model: Any, path: Path, *, dynamic: bool) -> Any:
    """Return the file of a module, or of a program of it that takes any batch."""
    args = inputs(2)
    if dynamic:
        sizes = tuple({0: torch.export.Dim("batch", max=64)} for _ in args)
        model = torch.export.export(model, args, dynamic_shapes=sizes)
    surgery.export_onnx(model, path, args)
    return surgery.load(path)


@pytest.mark.law(7)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("method", FACTORIZATIONS)
def test_exported_chains_are_one_operator_again(method: str, dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, args = Layers().eval(), inputs(2)
    fits = {s.name for s in find_sites(module, args)[0] if named(method).refuse(s.operator) is None}
    made = surgery.decompose(module, args, ranks="full", factorization=method)
    assert {change.site for change in made.changes} == fits
    file = exported(made.model, tmp_path / "made.onnx", dynamic=dynamic)
    sites = {site.name: site for site in find_sites(file, args)[0]}
    back = surgery.recompose(file, args)
    dense = exported(module, tmp_path / "dense.onnx", dynamic=dynamic)
    assert {fusion.site for fusion in back.changes} == fits
    assert shapes(back.model) == shapes(dense)
    assert not [node for node in back.model.graph if node.op_type in ("Reshape", "Unsqueeze", "Squeeze")]
    other = inputs(3 if dynamic else 2)
    for a, b in zip(run_model(back.model, (other, {})), run_model(file, (other, {})), strict=True):
        assert relative_error(a, b) <= 1e-5
    if not dynamic:  # a module brings its record, which says what made the factors, so that they can be cut
        assert all(isinstance(sites[name], FactoredSite) for name in fits)


class Computed(nn.Module):
    """Weights that torch's own exporter would compute at each run, as they are large; and one that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(128, 128))
        self.rnn = nn.LSTM(128, 128)
        self.table, self.last = nn.Embedding(128, 128), nn.Linear(128, 128, bias=False)
        self.last.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.first(x))[0]) + self.last(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
def test_weights_that_the_program_computes_are_initializers_with_the_names_of_its_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 128)
    surgery.export_onnx(Computed().eval(), tmp_path / "m.onnx", x)
    model: Any = surgery.load(tmp_path / "m.onnx")
    assert {site.name for site in surgery.find_sites(model, x)[0]} == {"first", "rnn.ih_l0", "rnn.hh_l0", "table"}
    assert not surgery.find_sites(model, x)[1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
def test_a_factored_site_whose_chain_is_not_known_any_more_is_refused_with_its_reason(tmp_path: Path) -> None:
    module, x = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9)).eval(), torch.randn(2, 16)
    made = surgery.decompose(module, x, ranks={"0": (2, 2, 2, 2)}, factorization="tr")
    made = surgery.decompose(made.model, x, ranks={"2": 4}, factorization="svd")
    surgery.export_onnx(made.model, tmp_path / "made.onnx", x)
    model: Any = surgery.load(tmp_path / "made.onnx")
    for node in model.graph:
        node.metadata_props.clear()  # as other tools do
    back = surgery.recompose(model, x)
    assert [fusion.site for fusion in back.changes] == ["2"]
    assert [skip.name for skip in back.skips] == ["0"]
    assert "not known as those of one chain" in back.skips[0].reason


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
def test_rules_that_an_older_onnxscript_lacks_are_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.rewriter.rules import common

    monkeypatch.delattr(common, "materialize_reshape_shape_rule")
    model = nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))).eval()
    assert surgery.export_onnx(model, tmp_path / "m.onnx", torch.ones(2, 6)).relative_error < 1e-5
