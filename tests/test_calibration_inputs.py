"""Calibration inputs: every form that users give, files without pickle, batch sizes and splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from surgery.data.collect import collect
from surgery.data.samples import Calibration, read_calibration
from surgery.errors import FileError, InputError
from surgery.kinds.registry import observe
from surgery.passes.decompose import decompose
from surgery.runtime.export import export_onnx
from tests.test_calibration_models import as_kind, images, net


def stacked(calibration: Calibration) -> Tensor:
    return torch.cat([args[0] if args else next(iter(kwargs.values())) for args, kwargs in calibration])


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "tensors": lambda x: list(x.split(3)),
    "tuples": lambda x: [(part,) for part in x.split(4)],
    "dicts": lambda x: [{"x": part} for part in x.split(5)],
    "labels": lambda x: [(part, torch.zeros(len(part))) for part in x.split(4)],
    "loader": lambda x: DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=4),
    "pairs": lambda x: [((x[:4],), {}), ((x[4:],), {})],
}


def test_samples_come_to_the_device_of_the_model() -> None:
    calibration = read_calibration(images(4), net().to("meta"), batch_size=4)
    assert stacked(calibration).is_meta


@pytest.mark.parametrize("kind", ["module", "program-dynamic", "graph"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(form: str, kind: str) -> None:
    x = images(10)
    model = as_kind(net(), kind, x[:2])
    calibration = read_calibration(FORMS[form](x), model, batch_size=4)
    assert calibration.count == 10
    assert len(calibration) == len(list(calibration)) == 3
    assert torch.equal(stacked(calibration), x)
    assert torch.equal(stacked(calibration), x)  # once more
    collect(model, calibration)
    assert read_calibration(calibration, model) is calibration
    assert read_calibration(FORMS[form](x), model, limit=6).count == 6


@pytest.mark.parametrize("kind", ["module", "program-dynamic"])
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_files_are_read_without_pickle(tmp_path: Path, suffix: str, kind: str) -> None:
    x, path = images(5), tmp_path / f"inputs{suffix}"
    named = {"x": x, "labels": torch.arange(5)}
    if suffix == ".npz":
        np.savez(path, x=x.numpy(), labels=named["labels"].numpy())
    else:
        torch.save(named, path)
    model = as_kind(net(), kind, x[:2])
    assert torch.equal(stacked(read_calibration(path, model)), x)
    assert torch.equal(stacked(read_calibration(str(path), model)), x)


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    model = net()
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    torch.save(model, tmp_path / "module.pt")
    for name in ("objects.npz", "module.pt", "missing.npz"):
        with pytest.raises(FileError, match=name):
            read_calibration(tmp_path / name, model)
    with pytest.raises(InputError, match="type int"):
        read_calibration(3, model)
    for nothing in ([], images(0), [images(0), images(0)]):
        with pytest.raises(InputError, match="no calibration input"):
            read_calibration(nothing, model)
    with pytest.raises(InputError, match="have no x"):
        read_calibration({"y": images(2), "z": images(2)}, model)
    with pytest.raises(InputError, match="more than the number"):
        read_calibration([images(2), images(2)[..., :4]], model)
    with pytest.raises(InputError, match="does not run on the calibration inputs"):
        observe(model, ((images(2),), {})).run(((images(2)[:, :2],), {}))


@pytest.mark.parametrize("kind", ["module", "graph", "program", "onnx"])
@pytest.mark.parametrize("made", [torch.zeros(4, 17), torch.zeros(4, 16, dtype=torch.int64)], ids=["shape", "dtype"])
def test_of_calibration_inputs_that_do_not_fit_one_line_says_that(
    kind: str, made: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    example = torch.zeros(2, 16)
    model: Any = nn.Sequential(nn.Linear(16, 8))
    if kind == "onnx":
        export_onnx(model, model := tmp_path / "m.onnx", example)
    elif kind != "module":
        model = as_kind(model, kind, example)
    with pytest.raises(InputError, match="calibration inputs"):
        decompose(model, example, calibration=made, ranks="energy=0.8")
    assert capfd.readouterr() == ("", "")


def test_inputs_that_are_not_finite_name_the_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match="site '0': its inputs have values that are not finite; check the data"):
        collect(model, read_calibration(torch.full((4, 4), torch.inf), model))


@pytest.mark.parametrize("ranks", ["auto", "energy=0.9"])
def test_values_that_are_no_numbers_name_the_input_and_the_sample(ranks: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.ones(6, 8)
    x[4, 2] = float("nan")
    np.savez(tmp_path / "x.npz", input=x.numpy())
    for given in (x, str(tmp_path / "x.npz")):
        with pytest.raises(InputError, match=r"the calibration input input in sample 4 has .* \(NaN\); leave such"):
            decompose(model, x[:2], ranks=ranks, calibration=given)


def test_a_fixed_batch_size_is_kept() -> None:
    program = as_kind(net(), "program", images(4))
    calibration = read_calibration(images(15), program)
    assert calibration.exact
    assert [len(args[0]) for args, _ in calibration] == [4, 4, 4]
    fit, held_out = calibration.split(0.25)
    assert (fit.count, held_out.count) == (8, 4)
    with pytest.raises(InputError, match="exported for batches of 4"):
        read_calibration(images(3), program)
    with pytest.raises(InputError, match="cannot be split"):
        read_calibration(images(4), program).split()


def test_a_split_loses_and_repeats_nothing() -> None:
    x = images(11)
    fit, held_out = read_calibration(x, net()).split(0.25, seed=3)
    assert (fit.count, held_out.count) == (8, 3)
    joined = torch.cat([stacked(fit), stacked(held_out)])
    assert torch.equal(joined[joined[:, 0, 0, 0].argsort()], x[x[:, 0, 0, 0].argsort()])
    again = read_calibration(x, net()).split(0.25, seed=3)[0]
    assert torch.equal(stacked(again), stacked(fit))


def test_what_is_no_sample_goes_with_each_batch() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: Tensor, flag: bool = True) -> Tensor:
            return self.linear(x * scale) if flag else x

    batches = read_calibration([(torch.randn(6, 4), torch.ones(4))], Scaled(), batch_size=4)
    assert [(len(args[0]), len(args[1])) for args, _ in batches] == [(4, 4), (2, 4)]


def test_of_a_large_model_as_many_samples_are_read_as_its_work_allows() -> None:
    samples = read_calibration(torch.randn(256, 3), nn.Linear(3, 2))
    assert samples.affordable(6.0) is samples
    assert samples.affordable(2.0e11 / 100).count == 100
    assert replace(samples, exact=True).affordable(2.0e11 / 100).count == 96  # whole batches of 32
    few = samples.affordable(1e15)
    assert few.count == 48
    assert samples.affordable(2.0e11 / 22.5, least=1).count == 22
    assert torch.equal(few.leaves[0], samples.leaves[0][:48])
