"""Hostile ONNX files, made at test time. A maker writes ``x.onnx`` into a folder; beside the folder lies a secret."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

__all__ = ["ONNX_ATTACKS", "SECRET", "write_secret"]

SECRET = b"the-secret-of-another-folder"
Maker = Callable[[Path], onnx.ModelProto]
FLOAT = TensorProto.FLOAT


def write_secret(folder: Path) -> None:
    """Write what no hostile file may read: a file, and a pipe that would wait for its reader, beside a folder."""
    (folder.parent / "secret").write_bytes(SECRET * 16)
    os.mkfifo(folder.parent / "pipe")


def _weight(**said: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[8, 8])
    if not said:
        tensor.raw_data = bytes(256)
        return tensor
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in said.items():
        tensor.external_data.add(key=key, value=text)
    return tensor


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, [2, 8])


def _model(
    weights: list[onnx.TensorProto],
    nodes: list[onnx.NodeProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    made = nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(made, "g", [_value("x")], [_value("y")], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions or [])


def _at(location: str, **said: str) -> Maker:
    return lambda folder: _model([_weight(location=location, length="256", **said)])


def _link(make: Callable[[Path, Path], None]) -> Maker:
    """A weight in ``w.bin``, which is made to lead to the secret."""

    def maker(folder: Path) -> onnx.ModelProto:
        make(folder.parent / "secret", folder / "w.bin")
        return _model([_weight(location="w.bin", length="256")])

    return maker


def _in_a_body(folder: Path) -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=_weight(location="../secret", length="256"))
    body = helper.make_graph([constant, helper.make_node("MatMul", ["x", "w"], ["o"])], "b", [], [_value("o")])
    true = helper.make_node("Constant", [], ["t"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True]))
    return _model([], [true, helper.make_node("If", ["t"], ["y"], then_branch=body, else_branch=body)])


def _in_a_function(folder: Path) -> onnx.ModelProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=_weight(location="../secret", length="256"))]
    nodes.append(helper.make_node("MatMul", ["a", "w"], ["b"]))
    function = helper.make_function("own", "f", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])
    return _model([], [helper.make_node("f", ["x"], ["y"], domain="own")], [function])


def _calls(pairs: dict[str, list[str]]) -> Maker:
    """Functions that call others."""

    def function(name: str, called: list[str]) -> onnx.FunctionProto:
        nodes, last = [], "a"
        for number, other in enumerate(called):
            domain = "own" if other in pairs else ""
            nodes.append(helper.make_node(other, [last], [f"v{number}"], domain=domain))
            last = f"v{number}"
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        return helper.make_function("own", name, ["a"], [last], nodes, opsets)

    functions = [function(name, called) for name, called in pairs.items()]
    return lambda folder: _model([], [helper.make_node("f0", ["x"], ["y"], domain="own")], functions)


def _both(folder: Path) -> onnx.ModelProto:
    weight = _weight(location="w.bin", length="256")
    (folder / "w.bin").write_bytes(bytes(256))
    weight.raw_data = bytes(256)
    return _model([weight])


def _two_locations(folder: Path) -> onnx.ModelProto:
    (folder / "w.bin").write_bytes(bytes(256))
    weight = _weight(location="w.bin", length="256")
    weight.external_data.add(key="location", value="../secret")
    return _model([weight])


def _undeclared(folder: Path) -> onnx.ModelProto:
    """A location without the word that the numbers are outside."""
    weight = _weight(location="../secret")
    weight.ClearField("data_location")
    return _model([weight])


def _without_numbers(folder: Path) -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=TensorProto(data_type=FLOAT, dims=[10**6, 10**6]))
    return _model([], [constant, helper.make_node("MatMul", ["x", "w"], ["y"])])


def _sized(*dims: int) -> Maker:
    return lambda folder: _model([TensorProto(name="w", data_type=FLOAT, dims=dims, raw_data=bytes(256))])


def _deep(folder: Path) -> onnx.ModelProto:
    """Bodies in bodies, as deep as protobuf reads them; the innermost reads what nothing gives."""
    nodes = [helper.make_node("Relu", ["nothing"], ["y"])]
    for level in range(30):
        body = helper.make_graph(nodes, "b", [], [_value(nodes[-1].output[0])])
        nodes = [helper.make_node("If", ["x"], [f"y{level}"], then_branch=body)]
    nodes[-1].output[0] = "y"
    return _model([], nodes)


def _typed(kind: int, **fields: Any) -> Maker:
    return lambda folder: _model([TensorProto(name="w", data_type=kind, dims=[8, 8], **fields)])


def _sparse(folder: Path) -> onnx.ModelProto:
    model = _model([])
    values, places = helper.make_tensor("w", FLOAT, [1], [1.0]), helper.make_tensor("i", TensorProto.INT64, [1], [3])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [2**20, 2**20]))
    return model


def _no_text(folder: Path) -> onnx.ModelProto:
    model = _model([_weight()])
    model.MergeFromString(b"\x72\x06\x0a\x04\xed\xa0\x80k")  # metadata with half a character as the key
    return model


ONNX_ATTACKS: dict[str, Maker] = {
    "path up": _at("../secret"),
    "path up and down": _at("own/../../secret"),
    "absolute path": _at("/etc/passwd"),
    "device": _at("/dev/zero"),
    "pipe": _at("../pipe"),
    "memory of the process": _at("*/_ORT_MEM_ADDR_/*", offset="4096"),
    "no location": _at(""),
    "symbolic link": _link(lambda secret, own: own.symlink_to(secret)),
    "hard link": _link(lambda secret, own: own.hardlink_to(secret)),
    "link to a pipe": _link(lambda secret, own: own.symlink_to(secret.with_name("pipe"))),
    "link to the folder above": _link(lambda secret, own: own.symlink_to(secret.parent)),
    "link in a circle": _link(lambda secret, own: own.symlink_to(own)),
    "in a body": _in_a_body,
    "in a function": _in_a_function,
    "numbers in two places": _both,
    "two locations": _two_locations,
    "location that is not declared": _undeclared,
    "numbers that are not there": _without_numbers,
    "huge sizes": _sized(2**40, 2**40),
    "negative sizes": _sized(-8, -8),
    "many axes": _sized(*[1] * 63, 8, 8),
    "deep bodies": _deep,
    "unknown type": _typed(99, int32_data=[0] * 64),
    "numbers of another type": _typed(FLOAT, int64_data=[0] * 64),
    "texts as numbers": _typed(FLOAT, string_data=[b"x"] * 64),
    "sparse weight": _sparse,
    "name that is no text": _no_text,
    "function that calls itself": _calls({"f0": ["f0"]}),
    "functions that call each other": _calls({"f0": ["f1"], "f1": ["f0"]}),
    "functions without end": _calls({f"f{n}": [f"f{n + 1}"] * 10 if n < 8 else ["Relu"] for n in range(9)}),
    "two weights of a name": lambda folder: _model([_weight(), _weight()]),
}
