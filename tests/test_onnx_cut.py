"""ONNX models are cut into stages that run in a row as the whole does, and joined again to what they were."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import surgery
from surgery.errors import InputError
from surgery.kinds.base import Pieces
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.onnx.cut import CuttableOnnx
from surgery.kinds.onnx.proto import read_proto, write_proto
from surgery.kinds.registry import kind_of
from surgery.sites.network import Network
from tests.test_onnx import X, numbers, parsed
from tests.test_onnx_kept import everything, flat
from tests.zoo import graph

MODELS = {
    "branches": lambda: parsed(
        """g (float[n, 8] x) => (float[n, 8] z, float[n, 8] a) {
            a = Relu(x)  b = MatMul(a, W)  c = Add(b, p)  d = Mul(a, c)  e = Sigmoid(b)  f = Add(d, e)  z = MatMul(f, W)
        }""",
        W=numbers(8, 8), p=numbers(8),
    ),
    "bodies": lambda: parsed(
        """g (float[n, 8] x) => (float[n, 8] z) {
            y = Relu(x)  s = ReduceSum<keepdims = 0>(y)  zero = Constant<value = float {0}>()
            more = Greater(s, zero)
            w = If(more) <then_branch = t () => (float[n, 8] u) { u = MatMul(y, W) },
                          else_branch = f () => (float[n, 8] v) { k = Constant<value = float {2}>()  v = Mul(x, k) }>
            z = Add(w, y)
        }""",
        W=numbers(8, 8),
    ),
    "constants": lambda: parsed(
        """g (float[n, 8] x) => (float[n, 8] z, float[8] kept, float[8] p, float[n, 8] x) {
            k = Constant<value = float {2}>()  two = Mul(p, k)  a = Mul(x, two)  b = Clip(a, , k)
            kept = Identity(p)  c = Add(b, two)  z = Mul(c, k)
        }""",
        p=numbers(8), unused=numbers(4),
    ),
    "sequences": lambda: parsed(
        """g (float[n, 8] x) => (float[n, 8] z) {
            a = Relu(x)  s = SplitToSequence<axis = 1>(a, sizes)  i = Constant<value = int64 {0}>()
            b = SequenceAt(s, i)  c = Concat<axis = 1>(b, b)  z = Add(c, a)
        }""",
        sizes=np.array([4, 4]),
    ),
    "kept": everything,
}  # fmt: skip


def cuttable(model: Any, inputs: Any = X) -> CuttableOnnx:
    found = kind_of(model).cuttable(model, normalise_inputs(inputs))
    assert isinstance(found, CuttableOnnx)
    return found


def stage_maps(network: Network) -> list[tuple[int, ...]]:
    """Stages of operations: in one row, in a row of two and three, and scattered ones."""
    count, rng = len(network.operations), random.Random(0)
    found = [tuple(at * parts // count for at in range(count)) for parts in (1, 2, 3)]
    for parts in (2, 3):
        row: list[int] = []
        for operation in network.operations:
            before = [row[network.producer[value]] for value in operation.reads if value in network.producer]
            row.append(max([*before, rng.randrange(parts)]))
        found.append(tuple(row))
    every = dict.fromkeys(tuple(sorted(set(row)).index(of) for of in row) for row in found)
    return [row for row in every if all(len({row[at] for at in group}) == 1 for group in network.together)]


def message(model: Any) -> Any:
    return model if isinstance(model, onnx.ModelProto) else write_proto(model)


def run(model: Any, feeds: dict[str, Any], *, optimize: bool) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if optimize else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(message(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, {e.name: feeds[e.name] for e in session.get_inputs()}), strict=True))


def assert_runs(model: Any, pieces: Pieces, feeds: dict[str, Any], *, optimize: bool = False) -> None:
    values = dict(feeds)
    for piece in pieces.stages:
        proto = message(piece.model)
        onnx.checker.check_model(proto)
        assert [each.name for each in proto.graph.output] == list(piece.outputs)
        values |= run(piece.model, values, optimize=optimize)
    for name, expected in run(model, feeds, optimize=optimize).items():
        found = values[name]
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes() if not optimize else np.allclose(found, expected, 1e-4, 1e-5)


def assert_equal(found: Any, expected: Any) -> None:
    found, expected = message(found), message(expected)
    assert flat(found) == flat(expected)
    expected = write_proto(read_proto(expected))  # fields in the order in which we write them
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", MODELS)
def test_stages_give_the_bits_of_the_whole_and_join_to_it(name: str) -> None:
    model = MODELS[name]()
    opened = cuttable(model)
    rows = stage_maps(opened.network)
    assert len(rows) > 2
    before = message(model).SerializeToString(deterministic=True)
    for row in rows:
        pieces = opened.cut(row)
        assert len(pieces.stages) == max(row) + 1
        assert_runs(model, pieces, {"x": X.numpy()})
        said = json.loads(json.dumps(pieces.whole))
        assert_equal(kind_of(model).join(replace(pieces, whole=said)), model)
    assert message(model).SerializeToString(deterministic=True) == before, "the model stays as it is"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.parametrize("name", ["resnet-basic", "tied", "attention"])
def test_exported_networks_are_cut_and_joined(name: str, tmp_path: Path) -> None:
    program, inputs = graph(name, "program-dynamic")
    surgery.export_onnx(program, tmp_path / "m.onnx", inputs)
    model: Any = surgery.load(tmp_path / "m.onnx")
    names = [value.name for value in model.graph.inputs]
    given = dict(zip(names, inputs.values() if isinstance(inputs, dict) else inputs, strict=True))
    opened = cuttable(model, given)
    for row in stage_maps(opened.network)[2:4]:
        pieces = opened.cut(row)
        for optimize in (False, True):
            assert_runs(model, pieces, {key: value.numpy() for key, value in given.items()}, optimize=optimize)
        assert_equal(kind_of(model).join(pieces), model)


def test_a_network_has_values_tensors_and_costs() -> None:
    network = cuttable(MODELS["branches"]()).network
    named = {operation.gives: operation for operation in network.operations}
    assert [network.values[at].name for at in network.inputs] == ["x"]
    assert [network.values[at].name for at in network.outputs] == ["z", "a"]
    assert all(value.bytes == 3 * 8 * 4 for value in network.values)
    product = next(each for each in named.values() if each.kind == "MatMul")
    assert (product.macs, product.tensors) == (3 * 8 * 8, ("W",))
    assert network.bytes_of == {"W": 256, "p": 32}


def test_bodies_read_from_outside_and_constants_are_no_operations() -> None:
    network = cuttable(MODELS["bodies"]()).network
    branch = next(each for each in network.operations if each.kind == "If")
    assert {network.values[at].name for at in branch.reads} == {"more", "y", "x"}
    assert {"W", "bodies of w"} == set(branch.tensors)
    assert branch.macs == 3 * 8 * 8, "the branch that ran"
    network = cuttable(MODELS["constants"]()).network
    assert [each.kind for each in network.operations] == ["initializer", "Mul", "Clip", "Identity", "Add", "Mul"]
    assert network.operations[1].tensors == ("p", "k"), "what it multiplies by is computed from these"


def test_what_cannot_be_sent_stays_together() -> None:
    opened = cuttable(MODELS["sequences"]())
    assert opened.network.together == (frozenset({1, 2}),)
    with pytest.raises(InputError, match="s is no tensor"):
        opened.cut((0, 0, 1, 1, 1))


def test_a_dynamic_batch_stays_dynamic_across_the_cut() -> None:
    model = MODELS["branches"]()
    pieces = cuttable(model).cut((0, 0, 0, 1, 1, 1, 1))
    [taken, *_] = pieces.stages[1].model.graph.inputs
    assert str(taken.shape[0]) == "n"
    assert_runs(model, pieces, {"x": numbers(11, 8)})


def test_nodes_that_are_not_in_order_are_refused() -> None:
    nodes = [helper.make_node("Neg", ["a"], ["z"]), helper.make_node("Relu", ["x"], ["a"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 8]) for name in "xz"]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), ir_version=8)
    with pytest.raises(InputError, match="cannot be copied"):
        cuttable(model)


def test_initializers_that_are_inputs_stay_inputs() -> None:
    model = parsed("g (float[n, 8] x, float[8, 8] W) => (float[n, 8] z) { a = MatMul(x, W)  z = MatMul(a, W) }",
                   ir_version=3, opset=9, W=numbers(8, 8))  # fmt: skip
    pieces = cuttable(model).cut((0, 1))
    assert [[v.name for v in piece.model.graph.inputs] for piece in pieces.stages] == [["x", "W"], ["a", "W"]]
    assert_runs(model, pieces, {"x": X.numpy(), "W": model.graph.initializers["W"].const_value.numpy()})
    assert_equal(kind_of(model).join(pieces), model)


def test_files_with_weights_beside_them_come_back(tmp_path: Path) -> None:
    model = message(parsed(
        "g (float[n, 8] x) => (float[n, 8] z) { a = MatMul(x, W)  b = MatMul(a, V)  c = MatMul(b, U)  z = Add(c, p) }",
        W=numbers(8, 64), V=numbers(64, 8), U=numbers(8, 8), p=numbers(8),
    ))  # fmt: skip
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=300)
    read: Any = surgery.load(tmp_path / "m.onnx")
    pieces = cuttable(read).cut((0, 1, 1, 1))
    for at, piece in enumerate(pieces.stages):
        surgery.save(piece.model, tmp_path / f"s{at}.onnx")
    assert (tmp_path / "s0.onnx.data").stat().st_size == 8 * 64 * 4
    kept = tuple(replace(p, model=surgery.load(tmp_path / f"s{at}.onnx")) for at, p in enumerate(pieces.stages))
    joined = kind_of(read).join(replace(pieces, stages=kept))
    for folder in "ab":
        (tmp_path / folder).mkdir()
    surgery.save(read, tmp_path / "a" / "m.onnx")
    surgery.save(joined, tmp_path / "b" / "m.onnx")
    for name in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_joined_stages_have_the_numbers_that_they_have_now() -> None:
    model = MODELS["branches"]()
    pieces = cuttable(model).cut((0, 0, 0, 1, 1, 1, 1))
    for piece in pieces.stages:
        piece.model.graph.initializers["W"].const_value = ir.tensor(np.ones((8, 8), np.float32), name="W")
    joined = kind_of(model).join(pieces)
    assert np.all(joined.graph.initializers["W"].const_value.numpy() == 1)
    pieces.stages[1].model.graph.initializers["W"].const_value = ir.tensor(np.zeros((8, 8), np.float32), name="W")
    with pytest.raises(InputError, match="W has other numbers in another stage"):
        kind_of(model).join(pieces)


def test_a_kind_calls_stages_as_the_model_is_called() -> None:
    model = MODELS["constants"]()
    kind, pieces = kind_of(model), cuttable(model).cut((0, 0, 0, 0, 1, 1))
    values = dict(zip(pieces.inputs, kind.leaves(pieces, (), {"x": X}), strict=True))
    for piece in pieces.stages:
        found = kind.run_stage(piece.model, [values[name] for name in piece.inputs])
        values |= dict(zip(piece.outputs, found, strict=True))
    result = kind.result(pieces, [values[name] for name in pieces.outputs])
    for one, other in zip(result, kind.runnable(model)(X), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InputError, match="allowed: x"):
        kind.leaves(pieces, (X, X), {})


@pytest.mark.parametrize("row", [(0, 0), (1,) * 7, (0, 0, 0, 0, 2, 2, 2), (1, 0, 0, 1, 1, 1, 1)])
def test_stages_that_are_none_are_refused(row: Sequence[int]) -> None:
    with pytest.raises(InputError):
        cuttable(MODELS["branches"]()).cut(row)


def hostile() -> list[dict[str, Any]]:
    frame = onnx.ModelProto()
    frame.graph.node.add(op_type="Relu", input=["x"], output=["a"])
    full = onnx.ModelProto()
    full.graph.initializer.append(numpy_helper.from_array(np.zeros(2**17, np.float32), "W"))
    texts = ["", "!", "AAAA", *(base64.b64encode(each.SerializeToString()).decode() for each in (frame, full))]
    rows: list[Any] = [[], [0] * 6, [0] * 8, [-1] * 7, [True] * 7, [9] * 7, ["x"] * 7, [None] * 7, [[0]] * 7, {}]
    found = [{"frame": text} for text in texts] + [{"places": row} for row in rows]
    more: list[dict[str, Any]] = [{"functions": [["a", "b", "c"]]}, {"functions": [[]]}, {"outside": 3}, {"frame": 3}]
    return found + more


@pytest.mark.parametrize("change", hostile(), ids=str)
def test_damaged_frames_are_refused(change: dict[str, Any]) -> None:
    model = MODELS["branches"]()
    pieces = cuttable(model).cut((0, 0, 0, 1, 1, 1, 1))
    with pytest.raises(InputError):
        kind_of(model).join(replace(pieces, whole={**pieces.whole, **change}))
    with pytest.raises(InputError):
        kind_of(model).join(replace(pieces, stages=pieces.stages[:1]))
    with pytest.raises(InputError):
        kind_of(model).join(replace(pieces, stages=pieces.stages[::-1]))
