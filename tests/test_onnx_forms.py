"""Forms in which ONNX files come: opsets, types of numbers, names or none, sizes that vary or are not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import surgery
from surgery.algebra import relative_error
from surgery.errors import InputError
from surgery.kinds.onnx.proto import write_proto
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.run import OnnxModule
from tests.test_onnx import CONV, X, assert_comes_back, numbers, outputs, parsed, weights
from tests.test_onnx_api import without_shape

BODY = "{ a = MatMul(x, A)  b = Add(a, p)  c = Relu(b)  z = Gemm(c, B, q) }"


def two_layers(kind: str = "float", dtype: Any = np.float32, *, opset: int = 17) -> ir.Model:
    arrays = {"A": numbers(8, 16), "p": numbers(16, seed=1), "B": numbers(16, 6, seed=2), "q": numbers(6, seed=3)}
    text = f"g ({kind}[n, 8] x) => ({kind}[n, 6] z) {BODY}"
    return parsed(text, opset=opset, **{name: array.astype(dtype) for name, array in arrays.items()})


@pytest.mark.parametrize("opset", range(7, 24))
def test_every_opset(opset: int) -> None:
    model = two_layers(opset=opset)
    made = assert_comes_back(model, X, ["A", "B"])
    assert made.opset_imports == model.opset_imports
    result = surgery.decompose(model, X, ranks="2", calibration=torch.randn(24, 8))
    assert result.model.opset_imports == {"": opset}


@pytest.mark.parametrize("opset", [7, 11, 13, 18, 23])
@pytest.mark.parametrize("method", ["tucker", "spatial", "cp", "tt", "tr"])
def test_convolutions_of_every_opset(opset: int, method: str) -> None:
    text = "g (float[n, 6, 7, 7] x) => (float[n, 8, 7, 7] z) { z = Conv <pads = [1, 1, 1, 1]> (x, W, b) }"
    model = parsed(text, opset=opset, W=numbers(8, 6, 3, 3), b=numbers(8))
    x = torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(0))
    made = surgery.decompose(model, x, ranks="2", factorization=method)
    assert len(made.changes) == 1
    back = surgery.recompose(made.model, x)
    assert relative_error(outputs(back.model, x)[0], outputs(made.model, x)[0]) <= 1e-5
    assert weights(back.model) == weights(model)


@pytest.mark.parametrize(
    ("kind", "dtype", "torch_dtype", "allowed"),
    [("double", np.float64, torch.float64, 1e-12), ("float16", np.float16, torch.float16, 5e-3)],
)
def test_other_floats(kind: str, dtype: Any, torch_dtype: torch.dtype, allowed: float) -> None:
    model, x = two_layers(kind, dtype), X.to(torch_dtype)
    before = outputs(model, x)[0]
    assert before.dtype == torch_dtype
    for ranks in ("full", "4"):
        made = surgery.decompose(model, ranks=ranks)  # inputs of the right type are made up
        assert {tensor.dtype for tensor in initializers(made.model)} == {ir.DataType.from_numpy(np.dtype(dtype))}
        after = outputs(made.model, x)[0]
        assert ranks != "full" or relative_error(after, before) <= allowed
        back = surgery.recompose(made.model)
        assert relative_error(outputs(back.model, x)[0], after) <= allowed
    assert len(surgery.bench([model], seconds=0.01).models) == 1


def initializers(model: ir.Model) -> list[ir.TensorProtocol]:
    return [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]


def in_bfloat16() -> ir.Model:
    text = "g (float[n, 8] x) => (float[n, 6] z) { y = Cast<to = 16>(x)  a = MatMul(y, A)  z = Cast<to = 1>(a) }"
    return parsed(text, A=numbers(8, 6).astype(ml_dtypes.bfloat16))


def test_bfloat16_is_factored_though_the_cpu_cannot_run_it() -> None:
    model = in_bfloat16()
    sites, _ = surgery.find_sites(model, X)
    assert [site.operator.weight.dtype for site in sites] == [torch.bfloat16]
    chosen = surgery.preview(model, X, ranks="3")
    assert [change.rank for change in chosen.changes] == [(3,)]


def test_a_type_without_a_kernel_is_one_line() -> None:
    text = "g (bfloat16[n, 8] x) => (bfloat16[n, 8] z) { z = Relu(x) }"
    with pytest.raises(InputError, match=r"onnxruntime cannot load .*implementation for Relu.*; convert it to float32"):
        surgery.compare(parsed(text), parsed(text))
    text = "g (bfloat16[n, 8] x) => (float[n, 8] z) { z = Cast<to = 1>(x) }"
    with pytest.raises(InputError, match=r"input x is bfloat16, which onnxruntime does not take from Python"):
        surgery.compare(parsed(text), parsed(text))


def test_an_operator_of_another_library_is_one_line() -> None:
    text = "g (float[n, 8] x) => (float[n, 8] z) { y = MatMul(x, W)  z = acme.Magic(y) }"
    model = parsed(text, W=numbers(8, 8))
    model.opset_imports["acme"] = 1
    with pytest.raises(
        InputError, match=r"acme:Magic.* is not a registered .*; no library of operators is loaded: give"
    ):
        surgery.find_sites(model, X)


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"])
def test_inputs_of_any_type_of_numbers_are_made_up(kind: str) -> None:
    text = f"g ({kind}[n, 8] k) => (float[n, 6] z) {{ x = Cast<to = 1>(k)  z = MatMul(x, W) }}"
    model = parsed(text, W=numbers(8, 6))
    assert len(surgery.decompose(model, ranks="2").changes) == 1
    assert surgery.compare(model, model).max_abs == 0.0


def test_text_is_no_input(tmp_path: Path) -> None:
    model = parsed("g (string[n] s) => (string[n] t) { t = Identity(s) }")
    with pytest.raises(InputError, match="no model knows the shape"):
        surgery.compare(model, model)


def anonymous(model: ir.Model, *, node: str = "", graph: str = "") -> ir.Model:
    proto = ir.to_proto(model)
    proto.graph.name = graph
    for each in proto.graph.node:
        each.name = node
    return ir.serde.deserialize_model(proto)


@pytest.mark.parametrize("graph", ["", "graph"])
def test_nodes_and_graphs_without_names(graph: str) -> None:
    model = anonymous(two_layers(), graph=graph)
    made = surgery.decompose(model, X, ranks="3").model
    named = [node.name for node in write_proto(made).graph.node if node.name]
    assert len(set(named)) == len(named)
    back = surgery.recompose(made, X).model
    assert relative_error(outputs(back, X)[0], outputs(made, X)[0]) <= 1e-5
    proto = write_proto(back)
    assert {node.name for node in proto.graph.node} == {""}
    assert proto.graph.name == graph


def test_names_that_nodes_share_are_told() -> None:
    model = anonymous(two_layers(), node="same")  # onnxruntime refuses such a file
    with pytest.raises(InputError, match=r"two nodes with same node name \(same\)"):
        outputs(model, X)
    assert len(surgery.find_sites(model, X)[0]) == 2


def test_new_names_are_no_names_of_others() -> None:
    """onnx_ir names new nodes node_Gemm_1 and the like, as torch's exporter does."""
    model = two_layers()
    for at, node in enumerate(model.graph):
        node.name = f"node_{['Gemm', 'MatMul', 'Add', 'Gemm'][at]}_{5 - at}"
    made = surgery.decompose(model, X, ranks="3").model
    names = [node.name for node in made.graph]
    assert len(set(names)) == len(names)
    assert outputs(made, X)[0].shape == (3, 6)


def test_optional_inputs_that_are_left_out() -> None:
    text = """g (float[n, 8] x) => (float[n, 6] z) {
        a = MatMul(x, A)  b = Clip(a, , most)  c = Gemm(b, B, )  z = Clip(c, , )
    }"""
    model = parsed(text, A=numbers(8, 16), B=numbers(16, 6), most=np.array(0.5, np.float32))
    assert_comes_back(model, X, ["A", "B"])


def test_batch_and_sequence_vary() -> None:
    text = """g (int64[n, t] ids) => (float[n, t, 6] z) {
        e = Gather(E, ids)  a = MatMul(e, A)  b = Add(a, p)  z = MatMul(b, B)
    }"""
    model = parsed(text, E=numbers(20, 8), A=numbers(8, 16), p=numbers(16), B=numbers(16, 6))
    shapes = [torch.zeros(n, t, dtype=torch.int64) for n, t in ((1, 1), (2, 5), (3, 7))]
    made = surgery.decompose(model, ranks="3", calibration=torch.randint(20, (32, 4))).model
    back = surgery.recompose(made).model
    for ids in shapes:
        assert outputs(made, ids)[0].shape == (*ids.shape, 6)
        assert relative_error(outputs(back, ids)[0], outputs(made, ids)[0]) <= 1e-5
    assert [str(size) for size in made.graph.inputs[0].shape or ()] == ["n", "t"]
    assert [str(size) for size in made.graph.outputs[0].shape or ()][:2] == ["n", "t"]


def test_an_input_of_no_known_shape() -> None:
    model = ir.serde.deserialize_model(without_shape(ir.to_proto(two_layers())))
    with pytest.raises(InputError, match="give example_inputs"):
        surgery.find_sites(model)
    made = surgery.decompose(model, X, ranks="3", calibration=torch.randn(24, 8)).model
    assert made.graph.inputs[0].shape is None
    found: Tensor = outputs(surgery.recompose(made).model, X)[0]
    assert relative_error(found, outputs(made, X)[0]) <= 1e-5


def test_an_expand_beyond_the_memory_ends() -> None:
    text = """g (float[n, 8] x) => (float[n, 6] z) {
        b = Expand(x, s)  c = ReduceSum <keepdims = 0> (b)  y = MatMul(x, W)  z = Add(y, c)
    }"""
    model = parsed(text, W=numbers(8, 6), s=np.array([10**12, 1, 8]))
    with pytest.raises(InputError, match=r"does not run on the example inputs: .* 32000000000000"):
        surgery.find_sites(model)


@pytest.mark.parametrize(
    ("said", "reason"), [("kernel_shape = [5, 5]", "what its kernel_shape says"), ('auto_pad = "SAME"', "auto_pad")]
)
def test_convolutions_that_no_runtime_takes_are_skips(said: str, reason: str) -> None:
    model = parsed(CONV.format(op="Conv", said=said), W=numbers(6, 4, 3, 3), b=numbers(6))
    [left] = Reader(model).left
    assert reason in left.skip.reason


def test_weights_whose_sites_would_share_a_name() -> None:
    text = "g (float[n, 8] x) => (float[n, 6] z) { y = MatMul(x, A)  w = Relu(y)  z = MatMul(w, B) }"
    model = parsed(text, A=numbers(8, 16), B=numbers(16, 6))
    model.graph.initializers["B"].name = "A.weight"
    sites, skips = surgery.find_sites(model, X)
    assert [site.name for site in sites] == ["A"]
    assert [(skip.name, skip.reason) for skip in skips] == [("z", "another weight of the model has its name")]
    made = surgery.decompose(model, X, ranks="2").model
    assert weights(surgery.recompose(made, X).model) == weights(model)


def test_texts_are_read_run_and_kept(tmp_path: Path) -> None:
    """Classifiers name their classes: texts in an initializer, in a node and in outputs."""
    text = """g (float[n, 8] x) => (float[n, 6] z, string[n] label, string[1] unit) {
        z = MatMul(x, A)  i = ArgMax <axis = 1, keepdims = 0> (z)  label = Gather(names, i)
        u = Constant <value = string[1] u {"m"}> ()  unit = Identity(u) }"""
    names = np.array(list("äbcdef"), dtype=object)
    made = parsed(text, A=numbers(8, 6), names=names)
    (tmp_path / "m.onnx").write_bytes(write_proto(made).SerializeToString())
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    read: Any = surgery.load(tmp_path / "m.onnx")
    assert [site.name for site in surgery.find_sites(read)[0]] == ["A"]
    full: Any = surgery.decompose(read, x, ranks="full", calibration=x)
    surgery.save(full.model, tmp_path / "full.onnx")
    assert surgery.compare(tmp_path / "m.onnx", tmp_path / "full.onnx", x).relative <= 1e-5
    back: Any = surgery.recompose(tmp_path / "full.onnx")
    found = [OnnxModule(model)(x)[1:] for model in (read, back.model)]
    assert [list(each) for each in found[0]] == [list(each) for each in found[1]]
    assert set(found[0][0]) <= set(names)
    assert list(found[0][1]) == ["m"]
    assert len(surgery.split(read, x, stages=2, measure=False).stages) == 2


def test_nodes_whose_outputs_nothing_reads() -> None:
    """Those that torch has no function for, which onnxruntime removes."""
    text = "g (float[n, 8] x) => (float[n, 6] z) { r = RandomNormal <shape = [2]> ()  u = Exp(r)  z = MatMul(x, A) }"
    made = assert_comes_back(parsed(text, A=numbers(8, 6)), X, ["A"])
    assert [node.op_type for node in made.graph][:2] == ["RandomNormal", "Exp"]
    text = "g (float[n, 8] x) => (float[n, 6] z) { r = RandomNormal <shape = [2]> ()  z = MatMul(x, A) }"
    assert_comes_back(parsed(text, A=numbers(8, 6)), X, ["A"])
