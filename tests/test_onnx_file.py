"""ONNX files of others: their weights are regular files in their own folder, or they are not opened."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from surgery.errors import FileError, InputError, UnsafeFileError
from surgery.runtime.compare import compare
from surgery.text import shown

HERE = "weights.bin"


def model(location: str | None, *, inner: bool = False, name: str = "x") -> bytes:
    """An addition of eight weights that are in another file; ``inner``: in a branch of the graph."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8])
    if location is None:
        weights.raw_data = bytes(32)
    else:
        weights.data_location = TensorProto.EXTERNAL
        for key, text in {"location": location, "length": "32"}.items():
            entry = weights.external_data.add()
            entry.key, entry.value = key, text
    constant = [helper.make_node("Constant", [], ["w"], value=weights)]
    nodes = [helper.make_node("Add", [name, "w"], ["y"])]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    if inner:
        branch = helper.make_graph([*constant, *nodes], "b", [], [y])
        true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
        nodes = [helper.make_node("Constant", [], ["true"], value=true)]
        nodes += [helper.make_node("If", ["true"], ["y"], then_branch=branch, else_branch=branch)]
    x = helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 8])
    graph = helper.make_graph(nodes, "g", [x], [y], [] if inner else [weights])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.ModelProto.SerializeToString(made)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what weights could be, beside one that is none of theirs."""
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    (other / HERE).write_bytes(np.full(8, 7, np.float32).tobytes())
    (own / HERE).write_bytes(np.ones(8, np.float32).tobytes())
    (own / "near").symlink_to(HERE)
    (own / "link").symlink_to(other / HERE)
    (own / "folder").symlink_to(other)
    os.mkfifo(own / "pipe")
    (own / "device").symlink_to("/dev/zero")
    return own


@pytest.mark.parametrize(("location", "inner"), [(None, False), (None, True), (HERE, False), ("near", False)])
def test_weights_in_the_folder_are_read(location: str | None, inner: bool, folder: Path) -> None:
    path = folder / "x.onnx"
    path.write_bytes(model(location, inner=inner))
    assert compare(path, path).max_abs == 0


OUTSIDE = [f"../other/{HERE}", f"folder/{HERE}", "link", "device", "/etc/passwd", f"./../own/{HERE}", "a\nb", "a\0b"]
OUTSIDE += ["*/_ORT_MEM_ADDR_/*", "..", ".", "", "pipe", "folder", "nowhere", "x" * 5000]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("location", OUTSIDE)
def test_weights_elsewhere_are_not(location: str, inner: bool, folder: Path) -> None:
    path = folder / "x.onnx"
    path.write_bytes(model(location, inner=inner))
    with pytest.raises(FileError) as caught:
        compare(path, path)
    assert isinstance(caught.value, UnsafeFileError) == (location in OUTSIDE[:8] or location in ("..", "folder"))
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("raw", [b"", b"hello", b"\x08\x08", model(None)[:-40]])
def test_what_is_no_model_is_one_error(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"x\.onnx"):
        compare(path, path)


@pytest.mark.parametrize("name", ["a\x1b]0;pwn\x07", "[/red]"])
def test_names_of_inputs_are_shown_as_they_are_escaped(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(model(None, name=name))
    with pytest.raises(InputError) as caught:
        compare(torch.export.export(nn.Linear(8, 8), (torch.ones(2, 8),)), tmp_path / "x.onnx")
    assert f"allowed: {shown(name)} float32 3x8" in str(caught.value)


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.onnx")
    with pytest.raises(FileError, match="but a pipe"):
        compare(tmp_path / "x.onnx", tmp_path / "x.onnx")


def test_inputs_that_would_fill_the_memory_are_not_made_up(tmp_path: Path) -> None:
    made = onnx.ModelProto.FromString(model(None))
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 10**12
    path = tmp_path / "x.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(InputError, match="1000000000000x8, which would take 32000000000000 bytes"):
        compare(path, path)
