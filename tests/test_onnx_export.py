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
from surgery.factorizations import FACTORIZATIONS
from surgery.kinds.registry import kind_of
from surgery.runtime.compare import run_model
from surgery.sites import FactoredSite

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(16, 12), (2, 16)),
    "conv": (nn.Conv2d(8, 6, 3, stride=2, bias=False), (1, 8, 7, 7)),
}
FITTING = [
    (name, method)
    for name in LAYERS
    for method in FACTORIZATIONS
    if name == "conv" or method in ("svd", "tt", "tr")  # the others are of convolutions alone
]


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in kind_of(model).tensors(model).items()}


@pytest.mark.law(3)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.parametrize(("name", "method"), FITTING)
def test_an_exported_chain_is_one_operator_again(name: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, size = LAYERS[name]
    module, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(size)
    made = surgery.decompose(module, x, ranks="full", factorization=method)
    assert made.changes
    surgery.export_onnx(made.model, tmp_path / "made.onnx", x)
    exported: Any = surgery.load(tmp_path / "made.onnx")
    [site], _ = surgery.find_sites(exported, x)  # the record says what made its factors, so that they can be cut
    assert isinstance(site, FactoredSite)
    assert (site.name, site.chain.origin) == ("0", (method, made.changes[0].rank))
    back = surgery.recompose(exported, x)
    assert [fusion.site for fusion in back.changes] == ["0"]
    assert "0.weight" in shapes(back.model)
    assert not [key for key in shapes(back.model) if key.startswith("0.0.")]
    assert [node.op_type for node in back.model.graph if node.op_type in ("Reshape", "Transpose")] == []
    [found], [wanted] = ([v for v in run_model(m, ((x,), {})) if isinstance(v, Tensor)] for m in (back.model, exported))
    assert relative_error(found, wanted) <= 1e-5


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
    assert {site.name for site in surgery.find_sites(model, x)[0]} == {"first", "rnn.ih_l0", "table"}
    assert [skip.name for skip in surgery.find_sites(model, x)[1]] == ["rnn.hh_l0"]


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
