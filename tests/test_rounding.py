"""Exports judged beside what rounding does to a model: honest ones pass, however conditioned; wrong ones do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from surgery.errors import CheckError
from surgery.kinds.inputs import Inputs
from surgery.kinds.onnx.session import TOLERANCES, open_session
from surgery.runtime.export import check_export, export_onnx
from surgery.runtime.rounding import float64_outputs, shaken_outputs


class Cancelling(nn.Module):
    """Deep, residual, and each step a difference of nearly equal numbers: float32 keeps three digits, float16 none."""

    def __init__(self, distance: float = 1e-4, depth: int = 6, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.distance = distance
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for a, b in zip(self.first, self.second, strict=True):
            b.load_state_dict(a.state_dict())
            b.weight.data += distance * torch.randn(width, width) / width**0.5

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.first, self.second, strict=True):
            x = x + torch.tanh((b(x) - a(x)).to(torch.float32) / self.distance).to(x.dtype)
        return x


Z = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))


def tampered(path: Path, factor: float) -> Any:
    """Return a session of the model with one of its matrices, or a row of numbers where it has none, times a factor."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda i: int(np.prod(i.dims)))
    weight.CopyFrom(onnx.numpy_helper.from_array((onnx.numpy_helper.to_array(weight) * factor), weight.name))
    onnx.save(model, path.with_name("tampered.onnx"))
    return open_session(path.with_name("tampered.onnx"))


def test_a_badly_conditioned_model_is_judged_by_its_rounding(tmp_path: Path) -> None:
    model = Cancelling().eval()
    report = export_onnx(model, tmp_path / "net.onnx", Z)
    assert TOLERANCES[torch.float32] < report.relative_error < 1e-2  # more than it could have, were it not for rounding
    given = torch.export.export(model, (Z,))
    assert check_export(given, open_session(report.path), ((Z,), {})).relative == report.relative_error
    for factor in (1 + 1e-4, 1.01, 0.5):
        with pytest.raises(CheckError, match=r"at most 0\.0.*with regard to rounding"):
            check_export(given, tampered(report.path, factor), ((Z,), {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wrong_export_of_a_well_conditioned_model_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)).eval().to(dtype), Z.to(dtype)
    path = export_onnx(model, tmp_path / "net.onnx", x).path
    factor = 1 + 2 * {torch.float32: 1e-2, torch.float16: 2e-1}[dtype]
    with pytest.raises(CheckError, match="differ from PyTorch's"):
        check_export(torch.export.export(model, (x,)), tampered(path, factor), ((x,), {}))


def test_half_precision_without_digits_is_refused_only_if_it_is_wrong(tmp_path: Path) -> None:
    model, z = Cancelling(0.1).eval().half(), Z.half()
    path = export_onnx(model, tmp_path / "net.onnx", z).path
    with pytest.raises(CheckError, match="differ from PyTorch's"):
        check_export(torch.export.export(model, (z,)), tampered(path, 2.0), ((z,), {}))


def test_what_overflows_in_float32_is_no_error(tmp_path: Path) -> None:
    class Overflow(Cancelling):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x), (x + 100).exp()], dim=1)

    report = export_onnx(Overflow(1e-5).eval(), tmp_path / "net.onnx", Z)
    assert report.relative_error > TOLERANCES[torch.float32]


@torch.library.custom_op("surgery_tests::only_narrow", mutates_args=())
def only_narrow(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise NotImplementedError("no kernel for float64")
    return x.clone()


@only_narrow.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_without_a_float64_kernel_the_weights_are_moved(tmp_path: Path) -> None:
    class Custom(Cancelling):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(only_narrow(x))

    path = export_onnx(Cancelling().eval(), tmp_path / "net.onnx", Z).path
    inputs: Inputs = ((Z,), {})
    given = torch.export.export(Custom().eval(), *inputs)
    assert float64_outputs(given, inputs) is None
    assert check_export(given, open_session(path), inputs).relative > TOLERANCES[torch.float32]
    with pytest.raises(CheckError, match="with regard to rounding"):
        check_export(given, tampered(path, 1.01), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_is_float64_throughout(dtype: torch.dtype) -> None:
    model = Cancelling(0.1).eval().to(dtype)
    inputs: Inputs = ((Z.to(dtype),), {})
    given = torch.export.export(model, *inputs)
    before = {name: value.clone() for name, value in given.state_dict.items()}
    found = float64_outputs(given, inputs)
    assert found is not None
    torch.testing.assert_close(found[0], _doubled(model)(Z.to(dtype).double()), rtol=1e-12, atol=1e-12)
    moved, other = shaken_outputs(given, inputs), shaken_outputs(given, inputs, seed=1)
    assert moved is not None
    assert other is not None
    assert moved[0].dtype == dtype
    assert not torch.equal(moved[0], other[0])
    assert all(torch.equal(before[name], value) for name, value in given.state_dict.items())


def _doubled(model: Cancelling) -> nn.Module:
    class Doubled(Cancelling):
        def forward(self, x: Tensor) -> Tensor:
            for a, b in zip(self.first, self.second, strict=True):
                x = x + torch.tanh((b(x) - a(x)) / self.distance)
            return x

    doubled = Doubled(model.distance).double()
    doubled.load_state_dict(model.state_dict())
    return doubled
