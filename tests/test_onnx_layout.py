"""Where the weights of ONNX files are: in the file, beside it, in memory that sessions share; and files above 2 GiB."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper

import surgery
from surgery.cli import cli
from surgery.errors import FileError, InputError
from surgery.kinds.onnx.kind import OnnxKind
from surgery.kinds.onnx.layout import BESIDE, lay_out
from surgery.kinds.onnx.places import all_tensors, memory_of, place_of
from surgery.kinds.onnx.session import open_model
from surgery.runtime.bench import make_ready

X = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
WHOLE = [kind for kind in ir.DataType if kind.name not in ("UNDEFINED", "STRING")]


def proto(width: int = 40) -> onnx.ModelProto:
    """Three products and a shift: one weight of each product is large."""
    rng = np.random.default_rng(0)
    shapes = {"a": (40, width), "b": (width, width), "c": (width, 40), "d": (40,)}
    arrays = {name: rng.standard_normal(shape, np.float32) / 6 for name, shape in shapes.items()}
    nodes = [helper.make_node("MatMul", [x, w], [y]) for x, w, y in (("x", "a", "p"), ("p", "b", "q"), ("q", "c", "r"))]
    nodes.append(helper.make_node("Add", ["r", "d"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 40]) for name in "xy")
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(path: Path, *, beside: bool = True, least: int = 1024) -> Path:
    onnx.save(proto(), path, save_as_external_data=beside, location="weights.bin", size_threshold=least)
    return path


def outside(path: Path) -> dict[str, str]:
    """The weights that a file has elsewhere, with the file that has them."""
    found = onnx.load(path, load_external_data=False).graph.initializer
    return {t.name: e.value for t in found for e in t.external_data if e.key == "location"}


def run(model: Any) -> torch.Tensor:
    found: torch.Tensor = OnnxKind().runnable(model)(X)[0]
    return found


@pytest.mark.parametrize("least", [0, 1024])
def test_weights_stay_where_they_were(least: int, tmp_path: Path) -> None:
    model: Any = surgery.load(write(tmp_path / "m.onnx", least=least))
    surgery.save(model, tmp_path / "n.onnx")
    assert outside(tmp_path / "n.onnx") == dict.fromkeys("abcd" if least == 0 else "abc", "n.onnx.data")
    again: Any = surgery.load(tmp_path / "n.onnx")
    assert [memory_of(t) for t, _ in all_tensors(again)] == [memory_of(t) for t, _ in all_tensors(model)]
    assert torch.equal(run(again), run(model))


def test_small_weights_lie_close(tmp_path: Path) -> None:
    """A file of many of them does not grow when it is written again, but for the places of large weights."""
    nodes = [helper.make_node("Sum", ["x", *(f"s{at}" for at in range(50))], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy")
    small = [onnx.numpy_helper.from_array(np.full(3, at, np.float32), f"s{at}") for at in range(50)]
    graph = helper.make_graph(nodes, "g", [x], [y], small)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    surgery.save(surgery.load(tmp_path / "m.onnx"), tmp_path / "n.onnx")
    assert os.path.getsize(tmp_path / "n.onnx.data") == os.path.getsize(tmp_path / "m.bin") == 50 * 12
    again: Any = surgery.load(tmp_path / "n.onnx")
    assert torch.equal(OnnxKind().runnable(again)(torch.zeros(3))[0], torch.full((3,), 1225.0))


def test_a_single_file_stays_one(tmp_path: Path) -> None:
    model: Any = surgery.load(write(tmp_path / "m.onnx", beside=False))
    surgery.save(surgery.decompose(model, X, ranks="4").model, tmp_path / "n.onnx")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "n.onnx"]
    surgery.save(model, tmp_path / "m2.onnx")
    before, after = (onnx.load(tmp_path / name).graph for name in ("m.onnx", "m2.onnx"))
    assert list(after.initializer) == list(before.initializer)
    assert list(after.node) == list(before.node)


def test_factors_go_where_the_model_keeps_its_weights(tmp_path: Path) -> None:
    model: Any = surgery.load(write(tmp_path / "m.onnx"))
    changed: Any = surgery.decompose(model, X, ranks="10").model  # of all three weights: none of the old ones is left
    surgery.save(changed, tmp_path / "n.onnx")
    assert outside(tmp_path / "n.onnx") == dict.fromkeys(
        [f"{site}.{place}.weight" for site in "abc" for place in (0, 1)], "n.onnx.data"
    )
    again: Any = surgery.load(tmp_path / "n.onnx")
    assert torch.equal(run(again), run(changed))
    back: Any = surgery.recompose(again, X, everything=True).model
    surgery.save(back, tmp_path / "n.onnx")  # over the files whose weights it still reads
    assert torch.equal(run(surgery.load(tmp_path / "n.onnx")), run(back))
    assert set(outside(tmp_path / "n.onnx").values()) == {"n.onnx.data"}


_PAIR = ("n.onnx", "n.onnx.data")


def test_commands_write_both_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("m.onnx"))
    words = ["decompose", "m.onnx", "--ranks", "10", "--no-timing", "-o"]
    (tmp_path / "n.onnx.data").write_bytes(b"mine")
    with pytest.raises(FileError, match=r"n\.onnx\.data: exists already"):
        CliRunner().invoke(cli, [*words, "n.onnx"], catch_exceptions=False, standalone_mode=False)
    assert not Path("n.onnx").exists()
    assert Path("n.onnx.data").read_bytes() == b"mine"
    done = CliRunner().invoke(cli, [*words, "n.onnx", "--force", "--json"])
    assert done.exit_code == 0
    sizes = [sum(os.path.getsize(name) for name in names) for names in (("m.onnx", "weights.bin"), _PAIR)]
    assert [json.loads(done.output)[key]["file_size"] for key in ("before", "after")] == sizes
    assert Path("n.onnx.data").stat().st_size < Path("weights.bin").stat().st_size
    Path("weights.bin").rename("k.onnx.data")  # what the output would have
    edited = onnx.load("m.onnx", load_external_data=False)
    for tensor in edited.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "k.onnx.data" if entry.key == "location" else entry.value
    Path("m.onnx").write_bytes(edited.SerializeToString())
    before = Path("k.onnx.data").read_bytes()
    with pytest.raises(FileError, match=r"k\.onnx\.data: holds the weights of .*m\.onnx"):
        CliRunner().invoke(cli, [*words, "k.onnx", "--force"], catch_exceptions=False, standalone_mode=False)
    assert Path("k.onnx.data").read_bytes() == before


def test_a_model_that_one_message_cannot_hold_gets_a_second_file() -> None:
    model = ir.serde.deserialize_model(proto())
    whole = sum(tensor.nbytes for tensor, _ in all_tensors(model))
    assert not lay_out(model, "m.onnx", most=whole).beside
    layout = lay_out(model, "m.onnx", most=whole - 1)
    assert sum(memory_of(p).nbytes for p in layout.beside if not isinstance(p, bytes)) == whole - 160  # but for "d"
    with pytest.raises(InputError, match="below 2 GiB"):
        lay_out(ir.serde.deserialize_model(_constants()), "m.onnx", most=1000)


def _constants() -> onnx.ModelProto:
    """Weights that are text have to be in the model's own file."""
    made = proto()
    texts = TensorProto(name="t", data_type=TensorProto.STRING, dims=[100], string_data=[b"x" * 100] * 100)
    made.graph.initializer.append(texts)
    return made


def test_more_than_two_gibibytes_are_opened_without_memory(tmp_path: Path) -> None:
    """A file of zeros that takes no room on the disk; nothing of it is read."""
    width, path = 15_625_000, tmp_path / "m.onnx"
    made = proto()
    del made.graph.node[1:], made.graph.initializer[1:]
    made.graph.node[0].output[0] = "y"
    weight = made.graph.initializer[0]
    weight.Clear()
    weight.name, weight.data_type, weight.data_location = "a", TensorProto.FLOAT, TensorProto.EXTERNAL
    weight.dims.extend([40, width])
    weight.external_data.add(key="location", value="weights.bin")
    made.graph.output[0].type.tensor_type.ClearField("shape")
    path.write_bytes(made.SerializeToString())
    with open(tmp_path / "weights.bin", "wb") as file:
        file.truncate(4 * 40 * width)
    model: Any = surgery.load(path, memory=10**11)
    layout = lay_out(model, "n.onnx")
    assert [p.nbytes for p in layout.beside if not isinstance(p, bytes)] == [2_500_000_000]
    assert sum(len(p) for p in layout.own if isinstance(p, bytes)) < 2000
    assert outside(path) == {"a": "weights.bin"}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.name)
def test_numbers_of_all_types_are_kept(kind: ir.DataType, beside: bool, tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 2, -(-9000 * kind.bitwidth // 8), np.uint8).tobytes()
    made = proto()
    made.graph.initializer.append(TensorProto(name="e", data_type=int(kind), dims=[9000], raw_data=raw))
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=beside, location="weights.bin")
    model: Any = surgery.load(tmp_path / "m.onnx")
    assert bytes(memory_of(model.graph.initializers["e"].const_value)) == raw
    surgery.save(model, tmp_path / "n.onnx")
    found = onnx.load(tmp_path / "n.onnx").graph.initializer[-1]
    assert (found.name, found.raw_data) == ("e", raw)
    assert (tmp_path / f"n.onnx{BESIDE}").exists() == beside


@pytest.mark.parametrize("beside", [False, True])
def test_sessions_keep_the_memory_that_they_share(beside: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", beside=beside)
    wanted = helper_run(path)
    model: Any = surgery.load(path)
    sessions = [open_model(model), open_model(ir.serde.deserialize_model(proto()))]
    del model
    gc.collect()
    filler = [np.full(1600, 7, np.float32) for _ in range(2000)]  # into what was freed too early
    assert all(np.array_equal(each.run(None, {"x": X.numpy()})[0], wanted) for each in sessions)
    assert len(filler) == 2000


def helper_run(path: Path) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": X.numpy()})[0]


def test_numbers_at_odd_places_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    made = onnx.load(path, load_external_data=False)
    raw = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(b"\1" + raw)
    for tensor in made.graph.initializer:
        for entry in tensor.external_data:
            entry.value = str(int(entry.value) + 1) if entry.key == "offset" else entry.value
    path.write_bytes(made.SerializeToString())
    assert torch.equal(run(surgery.load(path)), run(ir.serde.deserialize_model(proto())))


def test_a_message_that_leaves_its_weights_somewhere_is_refused(tmp_path: Path) -> None:
    message = onnx.load(write(tmp_path / "m.onnx"), load_external_data=False)
    with pytest.raises(InputError, match="does not know their folder"):
        surgery.find_sites(message, X)


@pytest.mark.parametrize("beside", [False, True])
def test_no_weight_is_in_memory_while_models_are_timed(tmp_path: Path, beside: bool) -> None:
    model: Any = surgery.load(write(tmp_path / "m.onnx", beside=beside))
    weights = model.graph.initializers
    numbers = {name: value.const_value.numpy().copy() for name, value in weights.items()}
    places = {name: place_of(value.const_value) for name, value in weights.items()}
    held = weakref.ref(weights["a"].const_value)
    ready = make_ready([model], X, threads=1, move=True)
    gc.collect()
    assert held() is None
    ready[0].run()
    assert {name: place_of(value.const_value) for name, value in weights.items()} == places
    assert all((value.const_value.numpy() == numbers[name]).all() for name, value in weights.items())
