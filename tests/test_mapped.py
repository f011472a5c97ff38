"""Weights of large files and what sessions read of them take no memory that the system cannot take back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import surgery
from surgery.files.guard import onnx as guard
from surgery.kinds.onnx.run import OnnxModule
from surgery.system.mapped import drop_pages, map_file
from surgery.system.memory import give_back

SIDE = 1024  # two weights of 4 MiB


def write(path: Path) -> list[np.ndarray[Any, Any]]:
    """Write a file with two large weights in it, and return these."""
    generator = np.random.default_rng(0)
    weights = [generator.standard_normal((SIDE, SIDE)).astype(np.float32) for _ in range(2)]
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, SIDE]) for name in "xy")
    named = [numpy_helper.from_array(weight, f"w{number}") for number, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "g", [x], [y], named)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return weights


def resident(kind: str) -> int:
    """Return how many bytes of memory of a kind this process has, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not say")


def test_pages_that_were_dropped_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    with open(tmp_path / "file", "rb") as file:
        mapped = map_file(file.fileno(), 0)
    assert mapped[300] == 44
    drop_pages()
    assert mapped[300] == 44


def test_the_weights_of_a_large_file_need_not_stay_in_memory(tmp_path: Path) -> None:
    weights = write(tmp_path / "m.onnx")
    surgery.load(tmp_path / "m.onnx")  # what it imports stays for good
    give_back()
    before = resident("RssAnon")
    model: Any = surgery.load(tmp_path / "m.onnx")
    held = model.graph.initializers
    give_back()
    assert resident("RssAnon") - before < weights[0].nbytes
    for number, weight in enumerate(weights):
        found = held[f"w{number}"].const_value.numpy()
        assert np.array_equal(found, weight)
        assert found.flags.aligned


def test_a_session_maps_the_weights_of_a_model(tmp_path: Path) -> None:
    weights = write(tmp_path / "m.onnx")
    model: Any = surgery.load(tmp_path / "m.onnx")
    x = np.ones((1, SIDE), np.float32)
    OnnxModule(model)(x)  # what the first session leaves for good
    before = resident("RssAnon")
    module = OnnxModule(model)
    (y,) = module(x)
    assert resident("RssAnon") - before < weights[0].nbytes
    assert np.allclose(y.numpy(), x @ weights[0] @ weights[1], rtol=1e-4, atol=1e-3)


def test_without_room_for_a_file_weights_are_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    weights = write(tmp_path / "m.onnx")
    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    model: Any = surgery.load(tmp_path / "m.onnx")
    assert np.array_equal(model.graph.initializers["w1"].const_value.numpy(), weights[1])


def test_fields_that_need_more_room_than_the_file_said_are_read_into_memory() -> None:
    room = guard._room(guard._LARGE)
    first, second, third = room(guard._LARGE), room(guard._LARGE), room(4096)
    for value, each in enumerate((first, second, third)):
        each[:] = value
    assert [len(each) for each in (first, second, third)] == [guard._LARGE, guard._LARGE, 4096]
    assert [int(each.max()) for each in (first, second, third)] == [0, 1, 2]
