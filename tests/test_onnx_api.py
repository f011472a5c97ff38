"""ONNX files as models of the public functions and of the command line; metrics, bisect, and inputs that are wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.export import ExportedProgram

import surgery
from surgery.cli.group import cli
from surgery.errors import FileError, InputError, SurgeryError
from surgery.kinds.onnx.run import OnnxModule
from tests.covering import in_turns
from tests.test_onnx import DATA, mlp, numbers, outputs, parsed, saved, torch_mlp, weights


def program() -> ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(torch_mlp(mlp()), (DATA[:2],), dynamic_shapes=({0: batch},))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same network as an ONNX file and as a program."""
    surgery.save(program(), tmp_path / "m.pt2")
    return {"onnx": saved(mlp(), tmp_path / "m.onnx"), "program": tmp_path / "m.pt2"}


MADE = [("onnx", ir.Model), ("program", ExportedProgram)]
KINDS = pytest.mark.parametrize(("kind", "made"), MADE)


@pytest.mark.parametrize(("of_kind", "as_text"), in_turns(MADE, [True, False]))
def test_a_path_is_the_model_in_its_file(of_kind: tuple[str, Any], as_text: bool, files: dict[str, Path]) -> None:
    kind, made = of_kind
    path: Any = str(files[kind]) if as_text else files[kind]
    names = [site.name for site in surgery.find_sites(path)[0]]
    assert len(names) == 3
    assert [decision.site for decision in surgery.plan(path, ranks=3)] == names
    assert isinstance(surgery.preview(path, ranks=3).model, made)
    result: Any = surgery.decompose(path, ranks=3)
    assert isinstance(result.model, made)
    small = path + ".small" if as_text else path.with_suffix(".small")
    surgery.save(result.model, small)
    back: Any = surgery.recompose(small)
    assert isinstance(back.model, made)
    assert len(back.changes) == 3
    assert surgery.compare(small, back.model).relative < 1e-5
    found = surgery.bisect(path, small, metric=lambda run: -float(first(run(DATA)).square().sum()), least=0.0)
    assert found.evaluations > 0
    timing = surgery.bench([path, small], seconds=0.01)
    assert [row.path for row in timing.models] == [str(path), str(small)]
    assert len(surgery.time_apart([path], seconds=0.0).models) == 1


def first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def test_the_same_network_as_two_kinds(files: dict[str, Path]) -> None:
    for pair in (("onnx", "program"), ("program", "onnx"), ("onnx", "onnx")):
        a, b = (files[kind] for kind in pair)
        assert surgery.compare(a, b).relative < 1e-5
        assert surgery.compare(a, b, DATA).outputs[0].shape == (96, 4)
        assert len(surgery.bench([a, b], seconds=0.01).models) == 2
    with pytest.raises(InputError, match="one of the models is an ONNX model"):
        surgery.bisect(files["onnx"], files["program"], metric=lambda run: 0.0)


def test_a_fixed_batch_is_the_batch_of_both(tmp_path: Path) -> None:
    nodes = "{ z = MatMul(x, W) }"
    free = parsed(f"g (float[n, 8] x) => (float[n, 6] z) {nodes}", W=numbers(8, 6))
    fixed = parsed(f"g (float[3, 8] x) => (float[3, 6] z) {nodes}", W=numbers(8, 6))
    unknown = ir.serde.deserialize_model(without_shape(ir.to_proto(free)))
    for models in ((free, fixed), (fixed, free), (unknown, fixed)):
        assert surgery.compare(*models).outputs[0].shape == (3, 6)
    with pytest.raises(InputError, match="no model knows the shape"):
        surgery.compare(unknown, unknown)
    assert surgery.compare(unknown, free, torch.ones(5, 8)).max_abs == 0.0


def without_shape(proto: Any) -> Any:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    return proto


CALLS: dict[str, Callable[[Any], object]] = {
    "find_sites": surgery.find_sites,
    "plan": surgery.plan,
    "preview": surgery.preview,
    "decompose": lambda path: surgery.decompose(path, ranks=2),
    "recompose": surgery.recompose,
    "compare": lambda path: surgery.compare(mlp(), path),
    "bench": lambda path: surgery.bench([mlp(), path], seconds=0.01),
    "time_apart": lambda path: surgery.time_apart([path], seconds=0.0),
    "bisect": lambda path: surgery.bisect(mlp(), path, metric=lambda run: 0.0),
    "export": lambda path: surgery.export_onnx(path, "never.onnx"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_path_is_one_clear_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("no model")
    for path, said in (("", "is a folder"), ("no.onnx", "does not exist"), ("empty.onnx", "is empty"),
                       ("text.onnx", "is a text file")):  # fmt: skip
        with pytest.raises(FileError, match=said):
            CALLS[name](tmp_path / path)
    with pytest.raises(InputError, match=r"bytes is not a model; allowed: .* or the path of a file"):
        CALLS[name](b"bytes")


def test_what_onnx_models_cannot_do_says_what_to_do_instead(files: dict[str, Path]) -> None:
    path = files["onnx"]
    with pytest.raises(InputError, match=r"cannot be changed in place; use the model that is returned"):
        surgery.decompose(path, ranks=2, inplace=True)
    with pytest.raises(InputError, match=r"ONNX model already; use it as it is"):
        surgery.export_onnx(path, path.with_name("other.onnx"))
    for model in (path, mlp(), ir.to_proto(mlp())):
        given: Any = model
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
        with pytest.raises(InputError, match=r"allowed: nn\.Module, .* train the module that a file came from"):
            surgery.LowRankTraining(given, optimizer, DATA, epochs=3)
        with pytest.raises(InputError, match=r"allowed: nn\.Module, .* train the module that a file came from"):
            surgery.ADMM(given, optimizer, 2, example_inputs=DATA)
        with pytest.raises(InputError, match=r"nn\.Module"):
            surgery.apply(surgery.plan(path, ranks=2), given)


def test_a_metric_gets_a_callable_over_a_session() -> None:
    seen: list[Any] = []

    def metric(run: Any) -> float:
        seen.append(run)
        (logits,) = run(DATA)
        assert torch.equal(run(x=DATA)[0], logits)
        assert torch.equal(run(DATA.numpy())[0], logits)
        assert torch.equal(run(x=DATA.numpy())[0], logits)
        assert isinstance(run.session, ort.InferenceSession)
        (array,) = run.session.run(None, {"x": DATA.numpy()})
        assert torch.equal(torch.from_numpy(array), logits)
        return float(logits.square().mean())

    goal = surgery.Goal.drop(1.0, metric, cost="macs")
    assert surgery.decompose(mlp(), DATA[:2], ranks=goal).promise is not None
    assert len(seen) > 1
    run = OnnxModule(mlp())
    for args, said in (((DATA.double(),), "float64 96x16; allowed: x float32 nx16"), ((), "given none"),
                       ((DATA, DATA), "given float32 96x16, float32 96x16"), ((DATA[0],), "given float32 16;"),
                       ((DATA[:, :3],), "given float32 96x3; allowed: x float32 nx16")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            run(*args)


def nearness(model: ir.Model) -> Callable[[Any], float]:
    wanted = outputs(model, DATA)[0]
    return lambda run: -float((run(DATA)[0] - wanted).norm() / wanted.norm())


def in_constants(model: ir.Model) -> ir.Model:
    """The same model with its weights in Constant nodes."""
    proto = ir.to_proto(model)
    constants = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes = [*constants, *proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return ir.serde.deserialize_model(proto)


@pytest.mark.parametrize("change", [lambda m: m, ir.to_proto, in_constants], ids=["model", "message", "constants"])
def test_bisect_names_the_sites_that_cost(change: Callable[[ir.Model], Any]) -> None:
    model, metric = change(mlp()), nearness(mlp())
    chosen = {"A": 12, "B": 1, "C": 4}
    made = surgery.decompose(model, DATA[:2], ranks=chosen, factorization="svd")
    found = surgery.bisect(model, made.model, metric=metric, least=0.0)
    assert found.blames[0].sites == ("B",)
    assert found.loss > 0.1
    for blame in found.blames:
        (site,) = blame.sites
        without = surgery.decompose(model, DATA[:2], ranks={**chosen, site: None}, factorization="svd")
        gain = metric(OnnxModule(as_ir(without.model))) - metric(OnnxModule(as_ir(made.model)))
        assert blame.gain == pytest.approx(gain, abs=1e-4)
    assert weights(as_ir(model)) == weights(mlp())
    with pytest.raises(InputError, match="no site that was factored"):
        surgery.bisect(model, model, metric=metric)
    with pytest.raises(InputError, match="the first model is factored itself"):
        surgery.bisect(made.model, surgery.decompose(made.model, DATA[:2], ranks=1).model, metric=metric)


def as_ir(model: Any) -> ir.Model:
    return ir.serde.deserialize_model(model) if isinstance(model, onnx.ModelProto) else model


def run(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)


def test_every_command_takes_either_kind_on_either_side(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=DATA.numpy())
    np.savez("input.npz", input=DATA.numpy())
    lines = ["import numpy", "def near(run):", "    return -float(run(numpy.ones((2, 16), 'f'))[0].square().sum())"]
    (tmp_path / "onnx_metric.py").write_text("\n".join(lines))
    shape, batch = ("--input-shape", "3,16"), ("--batch", "4")
    for (a, b), more in in_turns(list(product(files.values(), repeat=2)), [(), shape]):
        shown = run("compare", a, b, "--json", *more)
        assert shown.exception is None, shown.exception
        assert json.loads(shown.output)["relative"] < 1e-5
        timed = run("bench", a, b, "--json", "--seconds", "0.01", *(more or batch))
        assert timed.exception is None, timed.exception
    for inputs, pair in (("x.npz", ("onnx", "onnx")), ("input.npz", ("onnx", "program"))):
        shown = run("compare", *(files[kind] for kind in pair), "--inputs", inputs, "--json")
        assert shown.exception is None, shown.exception
    done = run("decompose", "m.onnx", "--ranks", "2", "--no-timing", "--save-plan", "plan.json")
    assert done.exception is None, done.exception
    for second in (("m.decomposed.onnx",), ("--plan", "plan.json")):
        found = run("bisect", "m.onnx", *second, "--eval", "onnx_metric:near", "--json")
        assert found.exception is None, found.exception
        assert json.loads(found.output)["evaluations"] >= 2
    sys.modules.pop("onnx_metric")


WRONG = {
    "another shape": (("--input-shape", "2,17"), r"given float32 2x17; allowed: x float32 nx16"),
    "another rank": (("--input-shape", "16"), r"given float32 16; allowed: x float32 nx16"),
    "another name": (("--input-shape", "y:2,16"), "no input y; allowed: x"),
    "one too many": (("--input-shape", "2,16", "--input-shape", "2"), "no input number 2; allowed: x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_told_with_the_right_ones(name: str, tmp_path: Path) -> None:
    path = saved(mlp(), tmp_path / "m.onnx")
    words, said = WRONG[name]
    for command in ("inspect", "decompose", "bench", "recompose"):
        with pytest.raises(SurgeryError, match=said) as told:
            raise run(command, path, *words).exception
        assert isinstance(told.value, InputError)


def test_an_input_without_a_shape_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(without_shape(ir.to_proto(mlp())).SerializeToString())
    assert "--input-shape x:N,N" in str(run("inspect", path).exception)
    assert "3 sites" in run("inspect", path, "--input-shape", "x:2,16").output
    np.savez(tmp_path / "x.npz", x=DATA.numpy())
    assert run("compare", path, path, "--inputs", tmp_path / "x.npz").exception is None


def test_compare_calls_outputs_by_their_names() -> None:
    text = "g (float[n, 8] x) => (float[n, 4] left, float[n, 4] right) { left = MatMul (x, W) right = Relu (left) }"
    model = parsed(text, W=numbers(8, 4))
    assert [output.name for output in surgery.compare(model, model).outputs] == ["left", "right"]
    module = nn.Linear(8, 4, bias=False).eval()
    one = parsed("g (float[n, 8] x) => (float[n, 4] y) { y = MatMul (x, W) }", W=numbers(8, 4))
    assert [output.name for output in surgery.compare(module, one).outputs] == ["y"]


def test_a_batch_that_the_graph_does_not_take_says_what_to_try() -> None:
    text = "g (float[n, 8] x) => (float[a, 2, 4] z) { y = MatMul (x, W)  z = Reshape (y, sizes) }"
    model = parsed(text, W=numbers(8, 8), sizes=np.array([1, 2, 4]))
    with pytest.raises(InputError, match=r"on these inputs.*try other sizes"):
        surgery.compare(model, model, torch.randn(3, 8))


@pytest.mark.parametrize(
    ("kind", "wrong"), [("onnx", "pt2"), ("onnx", "safetensors"), ("program", "onnx"), ("module", "pt2")]
)
def test_a_file_is_not_given_the_ending_of_another_kind(kind: str, wrong: str, tmp_path: Path) -> None:
    models: dict[str, Any] = {"onnx": mlp(), "module": torch_mlp(mlp())}
    models["program"] = torch.export.export(models["module"], (DATA[:2],))
    target = tmp_path / f"m.{wrong}"
    with pytest.raises(FileError, match="would be written as"):
        surgery.save(models[kind], target)
    assert not target.exists()
