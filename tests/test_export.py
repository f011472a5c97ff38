"""Export to ONNX, comparison of models, and example inputs in all their forms."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from surgery.errors import CaptureError, CheckError, FileError, InputError
from surgery.files.load import load
from surgery.kinds.inputs import flatten_inputs, normalise_inputs, random_tensor
from surgery.kinds.onnx.session import feed, open_session
from surgery.runtime import export
from surgery.runtime.compare import compare, compare_outputs, default_inputs, run_model
from surgery.runtime.export import check_export, export_onnx
from surgery.runtime.translations import kept_translations

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a batch-norm and a dropout before a linear layer."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(5, classes)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.fc(self.drop(self.norm(self.conv(image)).relu().mean((2, 3))))
        return y


class Tokens(nn.Module):
    """Whole-number inputs by name, and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)

    def forward(self, ids: Tensor, mask: Tensor, extra: dict[str, Tensor] | None = None) -> dict[str, Any]:
        y = self.embed(ids) * mask.unsqueeze(-1)
        if extra is not None:
            y = y + extra["b"] - extra["a"]
        return {"hidden": y, "all": (y.sum(1), y.mean())}


def program(model: nn.Module | None = None, *, dynamic: bool = False) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return torch.export.export((model or Net()).eval(), (X,), dynamic_shapes=shapes)


@pytest.mark.parametrize("inputs", [X, {"image": X.numpy()}], ids=["tensor", "dict of arrays"])
def test_a_module_is_exported_quietly_and_as_it_was(
    tmp_path: Path, inputs: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    report = export_onnx(model, tmp_path / "net.onnx", inputs)
    assert report.relative_error < 1e-5
    assert report.size == (tmp_path / "net.onnx").stat().st_size
    assert (report.inputs, report.dynamic) == (("image float 2x3x8x8",), False)
    assert report.opset == onnx.load(report.path).opset_import[0].version
    assert all(module.training for module in model.modules())
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


def test_translations_are_read_once_and_are_those_of_torch() -> None:
    registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry

    def rows(found: Any) -> dict[Any, list[Any]]:
        return {name: [(each.onnx_function, each.is_complex) for each in of] for name, of in found.functions.items()}

    plain, own = registry.from_torchlib(20), vars(registry)["from_torchlib"]
    with kept_translations():
        first, second = registry().from_torchlib(opset_version=20), registry.from_torchlib(20)
        first.register_op(torch.ops.aten.relu.default, torch.relu)  # as an export does with a table of its own
        assert rows(registry.from_torchlib(20)) == rows(second) == rows(plain) != rows(first)
        assert registry.from_torchlib().opset_version != second.opset_version == plain.opset_version == 20
        with kept_translations():  # another thread
            assert rows(registry.from_torchlib(20)) == rows(plain)
    kept, again = ({id(each) for of in found.functions.values() for each in of} for found in (first, second))
    assert again < kept
    assert vars(registry)["from_torchlib"] is own


def test_translations_of_operators_that_come_later_are_found() -> None:
    """An operator is translated as soon as there is one; here it stands for those that libraries bring."""
    registration = importlib.import_module("onnxscript.function_libs.torch_lib.registration")
    exporter = importlib.import_module("torch.onnx._internal.exporter._registration")
    translations, entry = registration.default_registry, registration.OverloadedFunction("later::twice")
    entry.overloads.append(translations["aten::relu"].overloads[0])
    translations._registry["later::twice"] = entry
    try:
        with kept_translations():
            assert "later::twice" not in exporter.ONNXRegistry.from_torchlib().functions
        with torch.library._scoped_library("later", "DEF") as library:
            library.define("twice(Tensor x) -> Tensor")
            with kept_translations():
                assert "later::twice" in exporter.ONNXRegistry.from_torchlib().functions
    finally:
        del translations._registry["later::twice"]


def test_a_program_brings_its_inputs_and_stays_dynamic(tmp_path: Path) -> None:
    given = program(dynamic=True)
    report = export_onnx(given, tmp_path / "net.onnx")
    assert report.dynamic
    session = open_session(report.path)
    other = torch.randn(5, 3, 8, 8)
    (found,) = session.run(None, {"image": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), run_model(given, ((other,), {})), rtol=1e-4, atol=1e-5)


def test_a_program_without_inputs_gets_random_ones(tmp_path: Path) -> None:
    given = program(dynamic=True)
    given.example_inputs = None
    assert export_onnx(given, tmp_path / "net.onnx").relative_error < 1e-5
    args, kwargs = default_inputs(given) or ((), {})
    assert ([tuple(a.shape) for a in args], kwargs) == ([(2, 3, 8, 8)], {})


def test_a_graph_module_is_exported(tmp_path: Path) -> None:
    traced = torch.fx.symbolic_trace(Net().eval())
    assert export_onnx(traced, tmp_path / "net.onnx", X).relative_error < 1e-5
    unlifted = program().module()
    assert export_onnx(unlifted, tmp_path / "net.onnx", X).relative_error < 1e-5


def test_inputs_by_name_keep_their_place(tmp_path: Path) -> None:
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]])
    extra = {"b": torch.full((4,), 3.0), "a": torch.ones(4)}
    in_one_order = {"mask": mask, "extra": extra, "ids": ids}
    report = export_onnx(Tokens(), tmp_path / "a.onnx", in_one_order)
    assert report.relative_error < 1e-5
    given = torch.export.export(Tokens(), (), in_one_order)
    export_onnx(given, tmp_path / "b.onnx", {"ids": ids, "mask": mask, "extra": extra})


@pytest.mark.parametrize("dtype", [torch.float16])
def test_half_precision_is_checked_loosely(tmp_path: Path, dtype: torch.dtype) -> None:
    assert export_onnx(Net().to(dtype), tmp_path / "net.onnx", X.to(dtype)).relative_error < 2e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_that_onnxruntime_lacks_are_an_error(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"model\.float\(\)"):
        export_onnx(Net().to(dtype), tmp_path / "net.onnx", X.to(dtype))
    assert list(tmp_path.iterdir()) == []


class Noise(nn.Module):
    """Two runs of it agree in nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


def test_a_mismatch_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="differ from PyTorch's by a relative error of"):
        export_onnx(Noise(), tmp_path / "net.onnx", X)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    target.write_bytes(b"old")
    with pytest.raises(FileError, match="exists already"):
        export_onnx(program(), target, force=False)
    with pytest.raises(CheckError, match="run to run"):
        export_onnx(Noise(), target, X)
    assert target.read_bytes() == b"old"


def test_other_outputs_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    model = Net().eval()
    session = open_session(export_onnx(model, tmp_path / "net.onnx", X).path)
    with pytest.raises(CheckError, match="other outputs"):
        check_export(program(Net(classes=5)), session, ((X,), {}))
    model.fc.bias.data[0] = float("nan")
    with pytest.raises(CheckError, match="relative error of inf"):
        check_export(program(model), session, ((X,), {}))


def test_large_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_SINGLE_FILE_BYTES", 100)
    report = export_onnx(nn.Linear(64, 64), tmp_path / "net.onnx", torch.ones(1, 64))
    assert report.data == tmp_path / "net.onnx.data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.size > 4 * 64 * 64
    assert compare(tmp_path / "net.onnx", tmp_path / "net.onnx").max_abs == 0


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="cannot be captured"):
        export_onnx(Branch(), tmp_path / "net.onnx", torch.ones(2))
    with pytest.raises(InputError, match="needs example inputs"):
        export_onnx(Net(), tmp_path / "net.onnx")
    with pytest.raises(InputError, match="does not run on these inputs"):
        export_onnx(Net(), tmp_path / "net.onnx", torch.ones(1, 4, 8, 8))
    with pytest.raises(FileError, match="net: does not exist"):
        export_onnx("net", tmp_path / "net.onnx")
    with pytest.raises(FileError, match="does not exist"):
        export_onnx(nn.Linear(2, 2), tmp_path / "no" / "net.onnx", torch.ones(1, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (None, (), {}),
        (X, (X,), {}),
        ([X, 1], (X, 1), {}),
        ({"x": X}, (), {"x": X}),
        (((X,), {"y": 1}), (X,), {"y": 1}),
        (((), {}), (), {}),
        ((X, {"y": 1}), (X, {"y": 1}), {}),
    ],
)
def test_inputs_are_normalised(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found_args, found_kwargs = normalise_inputs(given)
    assert [id(a) if isinstance(a, Tensor) else a for a in found_args] == [
        id(a) if isinstance(a, Tensor) else a for a in args
    ]
    assert found_kwargs == kwargs


@pytest.mark.parametrize("bad", ["text", 3, object(), {1: X}, np.array(["a"])])
def test_other_inputs_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="allowed"):
        normalise_inputs(bad)


def test_random_inputs_are_valid_and_seeded() -> None:
    assert set(random_tensor((50,), torch.int64).tolist()) == {0, 1}
    assert random_tensor((5,), torch.int64, name="attention_mask").tolist() == [1] * 5
    assert random_tensor((2,), torch.bool).all()
    assert torch.equal(random_tensor((3,), torch.float16, seed=1), random_tensor((3,), torch.float16, seed=1))
    assert not torch.equal(random_tensor((3,), torch.float32, seed=1), random_tensor((3,), torch.float32, seed=2))


def test_flattening_follows_the_program() -> None:
    given = torch.export.export(Tokens(), (), {"mask": torch.ones(1, 3), "ids": torch.zeros(1, 3, dtype=torch.int64)})
    tensors = flatten_inputs(((), {"ids": torch.ones(1), "mask": torch.zeros(1)}), given)
    assert [t.item() for t in tensors] == [0, 1]


def test_models_are_compared_in_memory_and_on_disk(tmp_path: Path) -> None:
    model, given = Net(), program()
    torch.export.save(given, tmp_path / "net.pt2")
    export_onnx(given, tmp_path / "net.onnx")
    for other in (given, given.module(), tmp_path / "net.pt2", str(tmp_path / "net.onnx")):
        difference = compare(other, model, X)
        assert difference.relative < 1e-5
        assert difference.max_abs < 1e-5
    assert compare(model, tmp_path / "net.onnx").relative < 1e-5  # inputs of the shapes that the second declares
    assert compare(given, tmp_path / "net.pt2").outputs[0].shape == (2, 4)
    changed = Net()
    changed.fc.weight.data *= 1.1
    assert 1e-3 < compare(given, changed).relative < 0.5
    assert model.training


def test_comparison_has_its_formula() -> None:
    difference = compare_outputs((torch.tensor([3.0, 4.0]), {"n": 2}), (torch.tensor([3.0, 3.0]), {"n": 2}))
    assert [(o.name, o.max_abs, o.relative) for o in difference.outputs] == [
        ("[0]", 1.0, pytest.approx(0.2)),
        ("[1].n", 0, 0),
    ]
    assert difference.to_json()["relative"] == pytest.approx(0.2)


def test_infinities_in_the_same_places_are_equal() -> None:
    a = torch.tensor([float("inf"), float("nan"), 1.0])
    assert compare_outputs(a, a.clone()).max_abs == 0
    assert compare_outputs(a, torch.tensor([float("inf"), 0.0, 1.0])).relative == float("inf")
    assert compare_outputs(torch.ones(0), torch.ones(0)).max_abs == 0


def test_dataclasses_are_compared() -> None:
    @dataclasses.dataclass
    class Output:
        logits: Tensor
        loss: Tensor | None = None

    assert compare_outputs(Output(X), Output(X)).outputs[0].name == ".logits"


def test_other_structures_are_refused() -> None:
    with pytest.raises(InputError, match=r"2x3x8x8 against none"):
        compare_outputs(X, None)
    with pytest.raises(InputError, match="differ in structure"):
        compare_outputs(X, X[0])
    with pytest.raises(InputError, match="no tensors"):
        compare_outputs(None, ())
    with pytest.raises(InputError, match=r"output\[0\] is a str"):
        compare_outputs(("a",), ("a",))
    with pytest.raises(InputError, match="no model knows"):
        compare(Net(), Net())
    with pytest.raises(InputError, match="int is not a model"):
        compare(3, Net())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not run"):
        compare(Net(), Net(), torch.ones(1))


def test_a_session_is_fed_by_name_or_in_order(tmp_path: Path) -> None:
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]])
    path = export_onnx(Tokens(), tmp_path / "a.onnx", (ids, mask)).path
    session = open_session(path)
    given: list[Any] = [((ids, mask), {}), ((ids,), {"mask": mask}), ((), {"mask": mask, "ids": ids})]
    for inputs in given:
        assert feed(session, inputs)["ids"].tolist() == ids.tolist()
    with pytest.raises(InputError, match="inputs named idx, mask"):
        feed(session, ((), {"idx": ids, "mask": mask}))
    with pytest.raises(InputError, match=r"float32 1x3.*allowed: ids int64 1x3"):
        feed(session, ((ids.float(), mask), {}))
    assert [t.shape for t in (default_inputs(load(path)) or ((), {}))[0]] == [(1, 3), (1, 3)]


def test_nothing_is_said_of_outputs_without_a_finite_number() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(InputError, match="no finite number"):
        compare(layer, nn.Linear(3, 2), torch.full((1, 3), float("nan")))
    partly = torch.tensor([[float("nan")] * 3, [1.0] * 3])
    assert compare(layer, layer, partly).max_abs == 0
