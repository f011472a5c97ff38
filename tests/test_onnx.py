"""ONNX models: sites wherever weights lie, chains in their places and back, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import surgery
from surgery.algebra import Chain, relative_error
from surgery.cli.group import cli
from surgery.cli.options import open_calibrated
from surgery.cost.onnxruntime.model import build_model
from surgery.data.collect import collect, with_sensitivity
from surgery.data.samples import read_calibration
from surgery.errors import FileError, InputError
from surgery.factorizations import Factorization, named
from surgery.kinds.onnx.tensors import to_ir, to_torch
from surgery.kinds.registry import kind_of, observe, open_model
from surgery.passes.preview import find_sites
from surgery.runtime.compare import run_model
from surgery.sites import Replace
from surgery.sites.find import find
from tests.cases import Case
from tests.fitted import FITS, each, rank_choices
from tests.tolerances import reduction, tolerance
from tests.zoo import ZOO, graph


def is_one_node(case: Case) -> bool:
    """Whether ONNX says an operator with one node, or two for a bias: other paddings than zeros have a Pad in front."""
    geometry = getattr(case.operator, "geometry", None)
    return case.dtype in (torch.float32, torch.float64) and (geometry is None or geometry.padding_mode == "zeros")


PLAIN = [(case, method) for case, method in FITS if is_one_node(case)]


def outputs(model: ir.Model, *inputs: Any) -> list[Tensor]:
    return [leaf for leaf in run_model(model, (inputs, {})) if isinstance(leaf, Tensor)]


def weights(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in kind_of(model).tensors(model).items()}


def rest(model: ir.Model) -> list[tuple[str, str, int]]:
    """What a pass must not change: the operators of all nodes, by name and number of inputs."""
    return [(node.op_type, node.name or "", len(node.inputs)) for node in model.graph]


def assert_valid(model: ir.Model) -> None:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@each(PLAIN)
def test_the_laws_of_an_operator(case: Case, method: Factorization, subtests: pytest.Subtests) -> None:
    operator = case.operator.to(dtype=torch.float32)
    x = case.inputs()
    x = x if operator.reads_indices else x.float()
    model = ir.serde.deserialize_model(onnx.ModelProto.FromString(build_model(operator, tuple(x.shape))))
    [site], _ = find_sites(model, x)
    assert site.operator.form.unbiased == replace(operator.form.unbiased, padding_index=None)  # ONNX has none
    before = outputs(model, x)
    allowed = tolerance(torch.float32, length=reduction(operator), steps=16)
    for ranks in rank_choices(method, operator)[:2]:
        with subtests.test(ranks=ranks):
            made = surgery.decompose(model, x, ranks={site.name: ranks}, factorization=method.name)
            if not made.changes:  # cp may find no good factors, and a padding may need a pad of its own
                continue
            assert_valid(made.model)
            factored = outputs(made.model, x)
            if ranks == method.max_ranks(operator):
                assert relative_error(factored[0], before[0]) <= 10 * allowed
            back = surgery.recompose(made.model, x)
            assert [fusion.site for fusion in back.changes] == [site.name]
            assert_valid(back.model)
            assert weights(back.model) == weights(model)
            assert relative_error(outputs(back.model, x)[0], factored[0]) <= 10 * allowed
            assert sorted(n.op_type for n in back.model.graph) == sorted(n.op_type for n in model.graph)


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype) / max(1, shape[0]) ** 0.5


def parsed(text: str, *, ir_version: int = 8, opset: int = 17, more: str = "", **arrays: Any) -> ir.Model:
    """A model in onnx's own text form; ``arrays`` become initializers."""
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}{more}]>'
    model = onnx.parser.parse_model(f"{head}\n{text}")
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.serde.deserialize_model(model)


def assert_comes_back(model: ir.Model, x: Any, sites: Sequence[str], *, same_nodes: bool = True) -> ir.Model:
    """Factor all sites at lower ranks, put them back, and return the factored model."""
    found, _ = find_sites(model, x)
    assert {site.name for site in found} == set(sites)
    given = x if isinstance(x, tuple) else (x,)
    before = outputs(model, *given)
    full = surgery.decompose(model, x, ranks="full")
    assert {change.site for change in full.changes} == set(sites)
    for a, b in zip(outputs(full.model, *given), before, strict=True):
        assert relative_error(a, b) <= 1e-5
    made = surgery.decompose(model, x, ranks="2")
    assert_valid(made.model)
    back = surgery.recompose(made.model, x)
    assert_valid(back.model)
    for a, b in zip(outputs(back.model, *given), outputs(made.model, *given), strict=True):
        assert relative_error(a, b) <= 1e-5
    assert weights(back.model) == weights(model)
    assert not same_nodes or sorted(rest(back.model)) == sorted(rest(model)) or _types(back.model) == _types(model)
    assert "surgery" not in back.model.metadata_props
    for a, b in zip(outputs(model, *given), before, strict=True):
        assert torch.equal(a, b), "the given model is as it was"
    return made.model


def _types(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(0))


def test_a_product_and_the_bias_after_it_are_one_site() -> None:
    model = parsed(
        "g (float[n, 8] x) => (float[n, 6] z) { y = MatMul(x, W)  z = Add(y, b) }", W=numbers(8, 6), b=numbers(6)
    )
    made = assert_comes_back(model, X, ["W"])
    assert _types(made) == ["Add", "MatMul", "MatMul"]
    [site], _ = find_sites(model, X)
    assert site.operator.bias is not None
    assert site.input_shapes == ((3, 8),)


@pytest.mark.parametrize("turned", [False, True])
def test_gemm_with_either_layout(turned: bool) -> None:
    shape = (6, 8) if turned else (8, 6)
    attribute = "<transB = 1>" if turned else ""
    model = parsed(
        f"g (float[n, 8] x) => (float[n, 6] z) {{ z = Gemm {attribute} (x, W, b) }}", W=numbers(*shape), b=numbers(6)
    )
    assert _types(assert_comes_back(model, X, ["W"])) == ["Gemm", "Gemm"]


def test_one_weight_of_several_nodes_is_one_site_and_stays_shared() -> None:
    text = """g (float[n, 8] x) => (float[n, 8] z) {
        a = MatMul(x, W)  b1 = Add(a, p)  c = Relu(b1)  d = MatMul(c, W)  e = Add(d, q)  f = Tanh(e)  z = MatMul(f, W)
    }"""
    model = parsed(text, W=numbers(8, 8), p=numbers(8, seed=1), q=numbers(8, seed=2))
    assert "with a bias and calls without one" in find_sites(model, X)[1][0].reason
    same = parsed(text.replace("z = MatMul(f, W)", "z = Relu(f)"), W=numbers(8, 8), p=numbers(8), q=numbers(8, seed=2))
    made = assert_comes_back(same, X, ["W"])
    assert sum(name.startswith("W.") for name in weights(made)) == 2


def test_the_sum_of_two_calls_on_one_value_comes_back() -> None:
    """Its terms are no branches of one operator."""
    text = "g (float[n, 8] x) => (float[n, 6] z) { a = MatMul(x, W)  b = MatMul(x, W)  z = Add(a, b) }"
    assert_comes_back(parsed(text, W=numbers(8, 6)), X, ["W"])


def test_a_bias_of_several_calls_moves_once() -> None:
    text = "g (float[n, 8] x) => (float[n, 8] z) { a = Gemm (x, W, b)  c = Relu(a)  z = Gemm (c, W, b) }"
    opened = open_model(parsed(text, W=numbers(8, 8), b=numbers(8)), ((X,), {}))
    [placement] = find(opened.flow).placements
    operator = placement.site.operator
    assert operator.bias is not None
    chain = named("svd").factor(operator.with_bias(operator.bias + 1), (3,))
    assert isinstance(chain, Chain)
    opened.apply(Replace(placement, chain))
    bias = to_torch(opened.finish().graph.initializers["b"].const_value)
    assert torch.allclose(bias, torch.from_numpy(numbers(8)) + 1)


def test_a_computed_bias_is_added_after_a_chain_that_ends_with_a_reshape() -> None:
    text = """g (float[n, 8] x) => (float[n, 6] z) {
        c = ReduceMean <axes = [0], keepdims = 0> (x)  d = MatMul(c, V)  z = Gemm (x, W, d)
    }"""
    model = parsed(text, opset=13, W=numbers(8, 6), V=numbers(8, 6, seed=1))
    before = outputs(model, X)[0]
    for method in ("svd", "tt"):
        made = surgery.decompose(model, X, ranks="full", factorization=method, include=["W"])
        assert len(made.changes) == 1
        assert relative_error(outputs(made.model, X)[0], before) <= 1e-5
        assert relative_error(outputs(surgery.recompose(made.model, X).model, X)[0], before) <= 1e-5


@pytest.mark.parametrize("view", ["Cast <to = 1> (h)", "Reshape (r, n)"])
def test_a_bias_may_be_moved_or_converted(view: str) -> None:
    text = f"""g (float[n, 8] x) => (float[n, 6] z) {{
        b = {view}  y = Gemm(x, W, b)  u = Unsqueeze(y, m)  v = Conv(u, K, b)  z = Squeeze(v, m)
    }}"""
    arrays = {"h": numbers(6).astype(np.float16), "r": numbers(1, 6), "n": np.array([6]), "m": np.array([2])}
    model = parsed(text, W=numbers(8, 6), K=numbers(6, 6, 1), **arrays)
    assert_comes_back(model, X, ["W", "K"])


def test_sizes_in_a_constant_node_may_be_a_list() -> None:
    text = """g (float[n, 8] x) => (float[n, 6] z) {
        s = Constant<value_ints = [8, 6]>()  V = Reshape(W, s)  z = MatMul(x, V)
    }"""
    assert_comes_back(parsed(text, W=numbers(48)), X, ["W"])


def test_weights_behind_identity_and_in_constant_nodes() -> None:
    text = """g (float[n, 8] x) => (float[n, 8] z) {
        V = Identity(W)  a = MatMul(x, V)  b = Relu(a)  c = MatMul(b, K)  z = Relu(c)
    }"""
    model = parsed(text, W=numbers(8, 8), K=numbers(8, 8, seed=2))
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(numbers(8, 8, seed=3)))])
    constant.outputs[0].name = "C"
    [product] = [node for node in model.graph if node.inputs[-1] is model.graph.initializers["K"]]
    product.replace_input_with(1, constant.outputs[0])
    del model.graph.initializers["K"]
    model.graph.insert_before(product, constant)
    assert_comes_back(model, X, ["W", "C"])


CONV = "g (float[n, 4, h, w] x) => (float[n, o, p, q] z) {{ y = {op} <{said}> (x, W, b)  z = Relu(y) }}"


@pytest.mark.parametrize(
    ("op", "said", "shape"),
    [
        ("Conv", "kernel_shape = [3, 3], pads = [1, 0, 2, 1]", (6, 4, 3, 3)),
        ("Conv", 'kernel_shape = [4, 3], auto_pad = "SAME_UPPER"', (6, 4, 4, 3)),
        ("Conv", 'kernel_shape = [4, 3], auto_pad = "SAME_LOWER"', (6, 4, 4, 3)),
        ("Conv", 'auto_pad = "VALID", strides = [2, 1]', (6, 4, 3, 3)),
        ("Conv", "group = 2, dilations = [2, 1]", (6, 2, 3, 3)),
        ("Conv", "strides = [2, 3]", (6, 4, 1, 1)),
        ("ConvTranspose", "strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 0]", (4, 6, 3, 3)),
    ],
)
def test_convolutions_with_any_padding(op: str, said: str, shape: tuple[int, ...]) -> None:
    model = parsed(CONV.format(op=op, said=said), W=numbers(*shape), b=numbers(6, seed=1))
    assert_comes_back(model, IMAGE, ["W"])


def test_pads_that_depend_on_the_input_are_a_skip() -> None:
    said = 'kernel_shape = [3, 3], auto_pad = "SAME_UPPER", strides = [2, 2]'
    model = parsed(CONV.format(op="Conv", said=said), W=numbers(6, 4, 3, 3), b=numbers(6))
    sites, skips = find_sites(model, IMAGE)
    assert not sites
    assert "auto_pad" in skips[0].reason
    assert skips[0].macs == 5 * 5 * 6 * 4 * 9


def test_joint_sites_share_a_factor_and_come_back() -> None:
    text = """g (float[n, 8] x) => (float[n, 12] z) {
        a = MatMul(x, Q)  b = MatMul(x, K)  z = Concat <axis = 1> (a, b)
    }"""
    model = parsed(text, Q=numbers(8, 6), K=numbers(8, 6, seed=1))
    made = surgery.decompose(model, X, ranks="2", factorization="svd", joint=[["Q", "K"]])
    assert set(weights(made.model)) == {"Q.0.weight", "Q.1.weight", "K.1.weight"}
    assert made.after.parameters == 8 * 2 + 2 * (2 * 6) == sum(a * b for a, b in weights(made.model).values())
    back = surgery.recompose(made.model, X)
    assert weights(back.model) == weights(model)
    assert relative_error(outputs(back.model, X)[0], outputs(made.model, X)[0]) <= 1e-6
    assert "surgery" not in back.model.metadata_props


def test_an_embedding_is_a_site() -> None:
    model = parsed("g (int64[n, t] x) => (float[n, t, 6] z) { y = Gather(T, x)  z = Relu(y) }", T=numbers(20, 6))
    assert_comes_back(model, torch.randint(20, (2, 5)), ["T"])


def test_operators_that_are_called_on_constants_are_sites() -> None:
    text = "g (float[n, 8] x) => (float[3, 8] z) { a = Gather(T, rows)  b = MatMul(a, W)  z = Add(b, x) }"
    model = parsed(text, T=numbers(20, 6), W=numbers(6, 8), rows=np.array([4, 0, 4]))
    assert_comes_back(model, X, ["T", "W"])
    data = [torch.randn(3, 8) for _ in range(4)]
    made = surgery.decompose(model, ranks={"T": 2, "W": 2}, calibration=data)  # what they are called on is seen
    assert {change.site for change in made.changes} == {"T", "W"}


SKIPS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemm-left": (
        "g (float[8, n] x) => (float[6, n] z) { z = Gemm (W, x) }",
        {"W": numbers(6, 8)},
        "on the left",
    ),
    "dequantized": (
        "g (float[n, 8] x) => (float[n, 6] z) { V = DequantizeLinear (W, s)  z = MatMul (x, V) }",
        {"W": np.ones((8, 6), np.int8), "s": np.array(0.1, np.float32)},
        "its weight is INT8, read through DequantizeLinear",
    ),
    "columns": (
        "g (float[n, 8] x) => (float[6, n, 8] z) { i = Cast <to = 7> (x)  z = Gather <axis = 1> (W, i) }",
        {"W": numbers(6, 8)},
        "not by rows",
    ),
    "einsum": (
        """g (float[n, 8] x) => (float[n, 6] z) { z = Einsum <equation = "ab,bc->ac"> (x, W) }""",
        {"W": numbers(8, 6)},
        "Einsum reads it",
    ),
    "foreign": (
        "g (float[n, 8] x) => (float[n, 6] z) { z = com.microsoft.FusedMatMul (x, W) }",
        {"W": numbers(8, 6)},
        "of onnxruntime's optimizer",
    ),
    "unknown": (
        "g (float[n, 8] x) => (float[n, 6] z) { z = com.microsoft.GemmFastGelu (x, W) }",
        {"W": numbers(8, 6)},
        "nothing is known of GemmFastGelu of com.microsoft",
    ),
    "alpha": (
        "g (float[n, 8] x) => (float[n, 6] z) { z = Gemm <alpha = 0.5> (x, W, b) }",
        {"W": numbers(8, 6), "b": numbers(6)},
        "alpha",
    ),
    "computed": (
        "g (float[n, 8] x) => (float[n, 6] z) { V = Mul(W, s)  z = MatMul(x, V) }",
        {"W": numbers(8, 6), "s": numbers(6)},
        "computed by Mul",
    ),
    "computed-of-a-list": (
        """g (float[n, 8] x) => (float[n, 1] z) {
            v = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]> ()
            V = Unsqueeze(v, s)  z = MatMul(x, V) }""",
        {"s": np.array([1])},
        "computed by Unsqueeze",
    ),
    "computed-at-random": (
        "g (float[n, 8] x) => (float[n, 6] z) { V = RandomNormal <shape = [8, 6]> ()  z = MatMul(x, V) }",
        {},
        "computed by RandomNormal",
    ),
    "computed-of-a-size": (
        """g (float[n, 8] x) => (float[n, 6] z) {
            n = Shape <start = 1> (x)  t = Concat <axis = 0> (n, m)  V = Reshape(W, t)  z = MatMul(x, V) }""",
        {"W": numbers(6, 8), "m": np.array([-1])},
        "computed by Reshape",
    ),
    "computed-in-branches": (
        """g (float[n, 8] x) => (float[n, 6] z) {
            s = ReduceSum <keepdims = 0> (x)  c = Less(s, s)
            V = If (c) <then_branch = t () => (float[8, 6] p) { p = Identity(W) },
                else_branch = e () => (float[8, 6] q) { q = Neg(W) }>
            z = MatMul(x, V) }""",
        {"W": numbers(8, 6)},
        "computed by If",
    ),
    "dequantized-16": (
        "g (float[n, 8] x) => (float[n, 6] z) { U = Cast <to = 1> (W)  V = Mul(U, s)  z = MatMul (x, V) }",
        {"W": np.ones((8, 6), np.int16), "s": np.array(0.1, np.float32)},
        "its weight is INT16, read through Mul",
    ),
    "chosen": (
        """g (float[n, 8] x) => (float[n, 6] z) {
            s = ReduceSum <keepdims = 0> (x)  c = Less(s, s)  V = Where(c, W, U)  z = MatMul(x, V) }""",
        {"W": numbers(8, 6), "U": numbers(8, 6)},
        "computed by Where",
    ),
    "elements": (
        """g (float[n, 8] x) => (float[n, 8] z) {
            i = Cast <to = 7> (x)  z = GatherElements(W, i) }""",
        {"W": numbers(20, 8)},
        "GatherElements reads it",
    ),
    "part": (
        """g (float[n, 8] x) => (float[n, 8] z) {
            n = Shape <end = 1> (x)  p = Slice(W, s, n)  z = Add(x, p) }""",
        {"W": numbers(20, 8), "s": np.array([0])},
        "Slice reads it",
    ),
    "left": (
        "g (float[8, n] x) => (float[6, n] z) { z = MatMul(W, x) }",
        {"W": numbers(6, 8)},
        "on the left",
    ),
    "quantized": (
        "g (uint8[n, 8] x) => (int32[n, 6] z) { z = MatMulInteger(x, W) }",
        {"W": np.ones((8, 6), np.uint8)},
        "before you quantize",
    ),
    "batch": (
        "g (float[2, n, 8] x) => (float[2, n, 6] z) { z = MatMul(x, W) }",
        {"W": numbers(2, 8, 6)},
        "batch of matrices",
    ),
    "used": (
        "g (float[n, 8] x) => (float[n, 6] z, float[8, 6] v) { z = MatMul(x, W)  v = Relu(W) }",
        {"W": numbers(8, 6)},
        "also used by",
    ),
}


@pytest.mark.parametrize("name", SKIPS)
def test_what_is_left_alone_has_a_reason(name: str) -> None:
    text, arrays, reason = SKIPS[name]
    model = parsed(text, more=', "com.microsoft" : 1' if "microsoft" in text else "", **arrays)
    shapes = {"left": (8, 3), "gemm-left": (8, 3), "batch": (2, 3, 8)}
    x: Any = torch.ones(shapes.get(name, (3, 8)), dtype=torch.uint8 if name == "quantized" else torch.float32)
    sites, skips = find_sites(model, x)
    assert not sites
    assert [reason in skip.reason for skip in skips] == [True]
    result = surgery.decompose(model, x, ranks="1")
    assert not result.changes
    assert ir.to_proto(result.model) == ir.to_proto(model)


def in_a_branch() -> ir.Model:
    branch = parsed("g () => (float[n, 6] z) { z = MatMul(x, W) }")
    proto = ir.to_proto(branch).graph
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=proto, else_branch=proto)]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])
    graph = helper.make_graph(nodes, "g", ends, [y], [numpy_helper.from_array(numbers(8, 6), "W")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.serde.deserialize_model(made)


def test_a_weight_of_the_graph_that_both_branches_read() -> None:
    model = in_a_branch()
    made = assert_comes_back(model, (X, torch.tensor(True)), ["W"])
    assert set(weights(made)) == {"W.0.weight", "W.1.weight"}
    other = (X, torch.tensor(False))
    assert relative_error(outputs(made, *other)[0], outputs(made, X, torch.tensor(True))[0]) <= 1e-6


@pytest.mark.parametrize("takes", [True, False])
def test_a_branch_that_is_not_taken_costs_nothing(takes: bool) -> None:
    text = """g (float[n, 8] x, bool c) => (float[n, 6] z) {
        z = If (c) <
            then_branch = t () => (float[n, 6] y) { y = MatMul(x, W) },
            else_branch = e () => (float[n, 6] u) { v = Relu(x)  a = MatMul(v, W)  b = MatMul(v, V)  u = Mul(a, b) }
        >
    }"""
    model, given = parsed(text, W=numbers(8, 6), V=numbers(8, 6, seed=1)), (X, torch.tensor(takes))
    sites, skips = find_sites(model, given)
    assert {site.name: site.macs for site in sites} == ({"W": 3 * 48} if takes else {"W": 3 * 48, "V": 3 * 48})
    assert [(skip.name, skip.macs) for skip in skips] == ([("V", 0)] if takes else [])
    refused = surgery.decompose(model, given, ranks="full", factorization="tt", include=["W"])
    assert "branch that does not run" in next(skip.reason for skip in refused.skips if skip.name == "W")
    made = surgery.decompose(model, given, ranks="full", include=["W"])
    assert made.before.macs == sum(site.macs for site in sites)
    assert [change.site for change in made.changes] == ["W"]
    for other in (takes, not takes):  # both branches are factored
        a, b = (outputs(m, X, torch.tensor(other))[0] for m in (made.model, model))
        assert relative_error(a, b) <= 1e-5


def in_a_loop() -> ir.Model:
    body = parsed("g (int64 i, bool c, float[n, 8] s) => (bool d, float[n, 8] t) { d = Identity(c) t = MatMul(s, W) }")
    proto = ir.to_proto(body).graph
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])
    nodes = [helper.make_node("Loop", ["turns", "", "x"], ["y"], body=proto)]
    held = [numpy_helper.from_array(numbers(8, 8), "W"), numpy_helper.from_array(np.array(3), "turns")]
    graph = helper.make_graph(nodes, "g", [x], [y], held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.serde.deserialize_model(made)


def test_layers_in_loops_are_reported() -> None:
    sites, skips = find_sites(in_a_loop(), X)
    assert not sites
    assert [(skip.name, skip.reason) for skip in skips] == [("W", "it is inside of a body of Loop")]


def test_a_weight_that_a_loop_reads_too_stays() -> None:
    model = in_a_loop()
    [loop] = list(model.graph)
    x, weight = model.graph.inputs[0], model.graph.initializers["W"]
    product = ir.Node("", "MatMul", [x, weight])
    product.outputs[0].name = "other"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(loop, product)
    model.graph.outputs.append(product.outputs[0])
    sites, skips = find_sites(model, X)
    assert not sites
    assert any("also used by" in skip.reason for skip in skips)


def nested(branch: str = "true") -> ir.Model:
    """Weights that lie in the branches of an If inside of an If, as in files of others."""
    text = """g (float[n, 8] x, bool c, bool d) => (float[n, 6] z) {
        z = If (c) <
            then_branch = then_graph () => (float[n, 6] y) {
                y = If (d) <
                    then_branch = inner () => (float[n, 6] u) {
                        V = Transpose(A)  p = MatMul(x, V)  q = Add(p, b)  u = Relu(q)
                    },
                    else_branch = other () => (float[n, 6] v) { v = MatMul(x, B) }
                >
            },
            else_branch = else_graph () => (float[n, 6] w) { w = MatMul(x, B) }
        >
    }"""
    model = parsed(text, B=numbers(8, 6, seed=1))
    [outer] = list(model.graph)
    then = outer.attributes["then_branch"].as_graph()
    inner = next(iter(then)).attributes["then_branch"].as_graph()
    for name, array in {"A": numbers(6, 8), "b": numbers(6)}.items():
        old = {value for node in inner for value in node.inputs if value is not None and value.name == name}
        value = ir.Value(
            name=name, const_value=ir.Tensor(array), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape)
        )
        inner.register_initializer(value)
        for stray in old:
            ir.convenience.replace_all_uses_with(stray, value)
    return ir.serde.deserialize_model(ir.to_proto(model))


def test_weights_in_branches() -> None:
    model = nested()
    yes, no = torch.tensor(True), torch.tensor(False)
    sites, skips = find_sites(model, (X, yes, yes))
    assert [site.name for site in sites] == ["A"]
    assert [(skip.name, "does not run" in skip.reason) for skip in skips] == [("B", True)]
    made = surgery.decompose(model, (X, yes, yes), ranks="full").model
    assert_valid(made)
    [outer] = list(made.graph)
    inner = next(iter(outer.attributes["then_branch"].as_graph())).attributes["then_branch"].as_graph()
    assert set(inner.initializers) == {"A.0.weight", "A.1.weight", "b"}
    for c, d in ((yes, yes), (yes, no), (no, no)):
        assert relative_error(outputs(made, X, c, d)[0], outputs(model, X, c, d)[0]) <= 1e-5
    back = surgery.recompose(made, (X, yes, yes)).model
    assert_valid(back)
    assert weights(back) == weights(model)
    assert sorted(_types(back)) == sorted(_types(model))


def test_layers_in_functions_are_reported() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[n, 8] x) => (float[n, 6] z) { y = own.f (x, W)  z = own.h (y) }
    <domain: "own", opset_import: ["" : 17]> f (a, b) => (c) { c = MatMul(a, b) }
    <domain: "own", opset_import: ["" : 17]> h (a) => (c) { K = Constant <value_int = 1> () c = MatMul(a, K) }
    """
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(numbers(8, 6), "W"))
    constant = proto.functions[1].node[0].attribute[0]
    constant.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(numbers(6, 6))))
    model = ir.serde.deserialize_model(proto)
    sites, skips = find_sites(model, X)
    assert not sites
    assert [(skip.name, skip.reason) for skip in skips] == [
        ("W", "f, which reads it, is a function"),
        ("K", "it is inside of a function"),
    ]


@pytest.mark.parametrize("caller", ["own.h", "loop"])
def test_layers_that_are_reached_through_functions_are_reported(caller: str) -> None:
    loop = """z = Loop (k, , x) <body = b (int64 i, bool go, float[n, 6] s) => (bool on, float[n, 6] t) {
        on = Identity(go)  t = own.f(s) }>"""
    text = f"""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[n, 6] x, int64 k) => (float[n, 6] z) {{ {loop if caller == "loop" else "z = own.h (x)"} }}
    <domain: "own", opset_import: ["" : 17, "own" : 1]> h (a) => (c) {{ c = own.f(a) }}
    <domain: "own", opset_import: ["" : 17]> f (a) => (c) {{ K = Constant <value_int = 1> () c = MatMul(a, K) }}
    """
    proto = onnx.parser.parse_model(text)
    constant = proto.functions[1].node[0].attribute[0]
    constant.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(numbers(6, 6))))
    sites, skips = find_sites(ir.serde.deserialize_model(proto), (torch.ones(3, 6), torch.tensor(2)))
    assert not sites
    assert [(skip.name, skip.reason) for skip in skips] == [("K", "it is inside of a function")]


def test_all_but_the_sites_stays_as_it_was() -> None:
    text = """g (float[n, 8] x) => (float[n, 6] z) {
        y = MatMul(x, W)  w = Add(y, b)  z = Relu(w)
    }"""
    model = parsed(text, ir_version=8, more=', "com.example" : 3', W=numbers(8, 6), b=numbers(6))
    model.metadata_props["letters"] = "abc"
    model.graph.doc_string, model.producer_name = "what it does", "somebody"
    result = surgery.decompose(model, X, ranks="2")
    made = result.model
    assert made.opset_imports == model.opset_imports
    assert (made.ir_version, made.producer_name, made.graph.doc_string) == (8, "somebody", "what it does")
    assert made.metadata_props["letters"] == "abc"
    assert [value.name for value in made.graph.inputs] == ["x"]
    assert [value.name for value in made.graph.outputs] == ["z"]
    assert str(made.graph.inputs[0].shape) == str(model.graph.inputs[0].shape)
    assert (result.before.parameters, result.after.parameters) == (8 * 6 + 6, 2 * (8 + 6) + 6)
    assert result.after.macs == 3 * 2 * (8 + 6)
    assert set(json.loads(made.metadata_props["surgery"])["sites"]) == {"W"}


def test_initializers_of_old_files_are_inputs_too() -> None:
    model = parsed(
        "g (float[n, 8] x, float[8, 6] W) => (float[n, 6] z) { z = MatMul(x, W) }",
        ir_version=3,
        opset=8,
        W=numbers(8, 6),
    )
    made = assert_comes_back(model, X, ["W"])
    assert {value.name for value in made.graph.inputs} == {"x", "W.0.weight", "W.1.weight"}


def test_a_name_that_is_taken_is_told() -> None:
    taken = {"W": numbers(8, 6), "W.0.weight": numbers(6)}
    model = parsed('g (float[n, 8] x) => (float[n, 6] z) { y = MatMul(x, W)  z = Mul(y, "W.0.weight") }'.replace(
        '"W.0.weight"', "t"), W=taken["W"], t=taken["W.0.weight"])  # fmt: skip
    [scale] = [node for node in model.graph if node.op_type == "Mul"]
    scale.outputs[0].name = "W.0.weight"
    result = surgery.decompose(model, X, ranks="2")
    assert not result.changes
    assert [skip.name for skip in result.skips if "W.0.weight already" in skip.reason] == ["W"]


def mlp(seed: int = 0) -> ir.Model:
    text = """g (float[n, 16] x) => (float[n, 4] z) {
        a = MatMul(x, A)  b = Add(a, p)  c = Relu(b)  d = MatMul(c, B)  e = Add(d, q)  f = Relu(e)  z = MatMul(f, C)
    }"""
    spectrum = 0.6 ** np.arange(16)
    low = {name: (numbers(16, 16, seed=seed + at) * spectrum) @ numbers(16, 16, seed=seed + 9 + at)
           for at, name in enumerate("AB")}  # fmt: skip
    return parsed(text, **{k: v.astype(np.float32) for k, v in low.items()}, C=numbers(16, 4, seed=5),
                  p=numbers(16, seed=6), q=numbers(16, seed=7))  # fmt: skip


def torch_mlp(model: ir.Model) -> nn.Module:
    tensors = {name: to_torch(value.const_value) for name, value in model.graph.initializers.items()}  # type: ignore[arg-type]
    layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)]
    with torch.no_grad():
        for layer, weight, bias in ((layers[0], "A", "p"), (layers[2], "B", "q"), (layers[4], "C", None)):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(tensors[weight].T)
            if bias is not None:
                layer.bias.copy_(tensors[bias])
    return nn.Sequential(*layers).eval()


DATA = torch.randn(96, 16, generator=torch.Generator().manual_seed(3))


def test_data_fit_as_well_as_they_fit_the_module() -> None:
    model = mlp()
    module = torch_mlp(model)
    ranks = {"A": 3, "B": 3}
    fresh = torch.randn(256, 16, generator=torch.Generator().manual_seed(4))
    wanted = outputs(model, fresh)[0]
    plain = surgery.decompose(model, DATA[:2], ranks=ranks).model
    fitted = surgery.decompose(model, DATA[:2], ranks=ranks, calibration=DATA).model
    same = surgery.decompose(module, DATA[:2], ranks={"0": 3, "2": 3}, calibration=DATA).model
    errors = [relative_error(outputs(m, fresh)[0], wanted) for m in (plain, fitted)]
    assert errors[1] < errors[0]
    # both see the same activations and gradients
    assert errors[1] == pytest.approx(relative_error(same(fresh).detach(), wanted), rel=1e-3)


def without_gradients(model: ir.Model) -> ir.Model:
    """The model with a node at its end that does nothing, and that only onnxruntime runs."""
    proto = ir.to_proto(model)
    [output] = proto.graph.output
    said: dict[str, Any] = {"scale": [1.0], "offset": [0.0]}
    proto.graph.node.append(helper.make_node("Scaler", [output.name], ["same"], domain="ai.onnx.ml", **said))
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    output.name = "same"
    return ir.serde.deserialize_model(proto)


def test_noise_shows_how_far_outputs_move() -> None:
    model = without_gradients(mlp())
    module = torch_mlp(model)
    assert not observe(model, ((DATA[:2],), {})).differentiable
    found = []
    for each_ in (model, module):
        samples = read_calibration(DATA, each_, ((DATA[:2],), {}))
        moments = with_sensitivity(each_, samples, collect(each_, samples))
        seen = [m.sensitivity for m in moments.values() if m.sensitivity is not None]
        found.append([float((g if g.dim() == 2 else g.diagonal(dim1=1, dim2=2)).sum()) for g in seen])
    assert len(found[0]) == len(found[1]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=0.5)


def test_a_batch_that_only_the_declaration_lets_vary() -> None:
    text = "g (float[n, 8] x) => (float[a, 2, 4] z) { y = MatMul (x, W)  z = Reshape (y, sizes) }"
    model = parsed(text, W=numbers(8, 8), sizes=np.array([1, 2, 4]))
    batches = read_calibration(torch.randn(6, 8), model)
    assert [len(args[0]) for args, _ in batches] == [1] * 6
    assert surgery.decompose(model, X[:1], ranks="2", calibration=torch.randn(16, 8)).changes


def test_a_state_that_differs_is_not_taken_for_all_samples() -> None:
    text = """g (float[n, 8] x, float[2, n, 8] s) => (float[n, 8] z) {
        y = MatMul (x, W) t = ReduceSum <keepdims = 0> (s, axis) z = Add (y, t)
    }"""
    model = parsed(text, W=numbers(8, 8), axis=np.array([0]))
    with pytest.raises(InputError, match="differ in more than samples"):
        read_calibration([{"x": X[:1], "s": torch.full((2, 1, 8), float(n))} for n in range(4)], model)
    same = [{"x": X[:1], "s": torch.ones(2, 1, 8)} for _ in range(4)]
    assert read_calibration(same, model).count == 4


@pytest.mark.parametrize("data", [None, DATA])
def test_a_promise_is_kept(data: Any) -> None:
    goal = surgery.Goal.error(0.2, cost="macs")
    result = surgery.decompose(mlp(), DATA[:2], ranks=goal, calibration=data)
    assert result.promise is not None
    assert result.promise.kept
    assert result.changes
    fresh = torch.randn(256, 16, generator=torch.Generator().manual_seed(4))
    assert relative_error(outputs(result.model, fresh)[0], outputs(mlp(), fresh)[0]) <= 0.25


def saved(model: ir.Model, path: Path) -> Path:
    surgery.save(model, path)
    return path


def test_files_are_saved_and_loaded_with_their_record(tmp_path: Path) -> None:
    made = surgery.decompose(mlp(), DATA[:2], ranks="3").model
    again: Any = surgery.load(saved(made, tmp_path / "m.onnx"))
    assert torch.equal(outputs(again, DATA)[0], outputs(made, DATA)[0])
    back = surgery.recompose(again, DATA[:2])
    assert weights(back.model) == weights(mlp())
    lower = surgery.decompose(again, DATA[:2], ranks="2")  # a chain is cut
    assert {change.rank for change in lower.changes} == {(2,)}
    assert len(lower.changes) == 3
    assert weights(surgery.recompose(lower.model, DATA[:2]).model) == weights(mlp())


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    for said in ("no json", '{"version": 99}', "[" * 100_000):
        model = mlp()
        model.metadata_props["surgery"] = said
        with pytest.raises(FileError, match="record"):
            surgery.load(saved(model, tmp_path / "m.onnx"))


def test_weights_in_another_file(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    ir.save(mlp(), folder / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model: Any = surgery.load(folder / "m.onnx")
    assert torch.equal(outputs(model, DATA)[0], outputs(mlp(), DATA)[0])
    made = surgery.decompose(model, DATA[:2], ranks="3")
    assert len(made.changes) == 3
    surgery.save(made.model, tmp_path / "made.onnx")
    (folder / "m.data").rename(tmp_path / "m.data")
    (folder / "m.data").symlink_to(tmp_path / "m.data")
    with pytest.raises(surgery.UnsafeFileError):
        surgery.load(folder / "m.onnx")


def edited(change: Callable[[Any], None], folder: Path, *, outside: bool = False) -> Path:
    """A file whose model was changed by hand; with ``outside`` its weights are in another file."""
    ir.save(mlp(), folder / "m.onnx", external_data="m.data" if outside else None, size_threshold_bytes=0)
    proto = onnx.load(folder / "m.onnx", load_external_data=False)
    change(proto)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def said(key: str, value: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        entries = proto.graph.initializer[0].external_data
        kept = [entry for entry in entries if entry.key != key]
        del entries[len(kept) :]
        for entry, other in zip(entries, kept, strict=True):
            entry.CopyFrom(other)
        entries.add(key=key, value=value)

    return change


OUTSIDE = {
    "negative offset": (said("offset", "-1"), "no possible place"),
    "offset past the end": (said("offset", "99999999"), "lie at"),
    "offset in letters": (said("offset", "x"), "no possible place"),
    "short length": (said("length", "1"), "lie at"),
    "absolute path": (said("location", "/etc/hostname"), "outside its folder"),
    "path out": (said("location", "../m.data"), "outside its folder"),
    "a folder": (said("location", "."), "is a folder"),
    "shape of a terabyte": (lambda p: p.graph.initializer[0].dims.__setitem__(0, 1 << 38), "lie at"),
    "negative size": (lambda p: p.graph.initializer[0].dims.__setitem__(0, -4), "impossible shape"),
}
INSIDE = {
    "another size": (lambda p: p.graph.initializer[0].dims.__setitem__(0, 7), "whose shape says"),
    "no numbers": (lambda p: setattr(p.graph.initializer[0], "raw_data", b""), "whose shape says"),
    "a cycle": (lambda p: p.graph.node[0].input.__setitem__(0, "z"), "nothing before it gives"),
    "a value of nothing": (lambda p: p.graph.node[0].input.__setitem__(0, "nowhere"), "nothing before it gives"),
    "a value twice": (lambda p: p.graph.node[1].output.__setitem__(0, "a"), "twice"),
    "an output of nothing": (lambda p: setattr(p.graph.output[0], "name", "nowhere"), "nothing computes"),
    "a weight without a name": (lambda p: setattr(p.graph.initializer[0], "name", ""), "without a name"),
}


@pytest.mark.parametrize("name", [*OUTSIDE, *INSIDE])
def test_files_that_cannot_be_right_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, reason = {**OUTSIDE, **INSIDE}[name]
    path = edited(change, tmp_path, outside=name in OUTSIDE)
    with pytest.raises(FileError, match=reason) as caught:
        surgery.load(path)
    assert str(caught.value).count("\n") == 0
    ran = CliRunner().invoke(cli, ["inspect", str(path)])
    assert ran.exit_code == 2 or isinstance(ran.exception, FileError)


def test_the_command_line_takes_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(mlp(), tmp_path / "m.onnx")

    def run(*arguments: str) -> str:
        ran = CliRunner().invoke(cli, arguments)
        assert ran.exit_code == 0, ran.output
        return ran.output

    assert "3 sites" in run("inspect", "m.onnx", "--input-shape", "2,16")
    run("decompose", "m.onnx", "--ranks", "3", "--no-timing")
    run("recompose", "m.decomposed.onnx", "--state-dict", "m.safetensors")
    assert "relative error" in run("compare", "m.onnx", "m.decomposed.recomposed.onnx")
    assert "m.decomposed.onnx" in run("bench", "m.onnx", "m.decomposed.onnx", "--seconds", "0.05")
    run("report", "m.decomposed.onnx")
    names = ["m.onnx", "m.decomposed.onnx", "m.decomposed.recomposed.onnx", "m.decomposed.report.html", "m.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    again: Any = surgery.load("m.decomposed.recomposed.onnx")
    assert weights(again) == weights(mlp())


def test_the_command_line_reads_calibration_data_once(tmp_path: Path) -> None:
    saved(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=DATA.numpy())
    how: dict[str, Any] = {"input_shapes": (), "factory": None, "trust": False, "memory": None, "seed": 0}
    model, inputs, data = open_calibrated(tmp_path / "m.onnx", tmp_path / "x.npz", **how)
    assert read_calibration(data, model) is data  # decompose does not read it again
    assert torch.equal(inputs[0][0], DATA[:1])


def test_a_message_gives_back_a_message() -> None:
    model = ir.to_proto(mlp())
    result = surgery.decompose(model, DATA[:2], ranks="3", calibration=DATA)
    assert isinstance(result.model, onnx.ModelProto)
    assert len(result.changes) == 3
    assert result.seen is not None
    back = surgery.recompose(result.model, DATA[:2]).model
    assert {tensor.name for tensor in back.graph.initializer} == {tensor.name for tensor in model.graph.initializer}


def test_a_metric_gets_what_can_be_called() -> None:
    wanted = outputs(mlp(), DATA)[0]

    def near(run: Callable[..., Any]) -> Tensor:
        return -(run(DATA)[0] - wanted).square().mean(1)

    goal = surgery.Goal.drop(0.05, near, cost="macs")
    result = surgery.decompose(mlp(), DATA[:2], ranks=goal, calibration=DATA)
    assert result.promise is not None
    assert result.promise.kept


def test_bad_inputs_are_told() -> None:
    with pytest.raises(InputError, match="no input wrong; allowed: x"):
        find_sites(mlp(), {"wrong": DATA[:2]})
    with pytest.raises(InputError, match="cannot be changed in place"):
        surgery.decompose(mlp(), DATA[:2], ranks="2", inplace=True)
    with pytest.raises(InputError, match="ONNX model already"):
        surgery.export_onnx(mlp(), "m.onnx")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
def test_a_file_has_the_sites_of_the_module_that_it_came_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    surgery.export_onnx(module, tmp_path / "m.onnx", x)
    model: Any = surgery.load(tmp_path / "m.onnx")
    sites, theirs = find_sites(model, x)[0], find_sites(module, x)[0]
    assert [site.operator.form for site in sites] == [site.operator.form for site in theirs]
    assert [site.macs for site in sites] == [site.macs for site in theirs]
    result = surgery.decompose(model, x, ranks="4")
    other = surgery.decompose(module, x, ranks="4")
    assert [(c.rank, c.parameters, c.macs) for c in result.changes] == [
        (c.rank, c.parameters, c.macs) for c in other.changes
    ]
    assert relative_error(outputs(result.model, x)[0], other.model(x).detach()) <= 1e-5


def positional(model: Any, inputs: Any) -> tuple[Any, ...]:
    names = kind_of(model).signature(model, ((), {})).names
    return tuple(inputs[key] for key in names) if isinstance(inputs, dict) else inputs


@pytest.mark.law(12)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.parametrize("name", ZOO)
def test_a_file_is_factored_as_the_program_that_it_came_from(name: str, tmp_path: Path) -> None:
    program, inputs = graph(name, "program")
    surgery.export_onnx(program, tmp_path / "m.onnx", inputs)
    model: Any = surgery.load(tmp_path / "m.onnx")
    given = positional(model, inputs)
    sites = [
        {site.name: (site.description, site.macs) for site in find_sites(m, x)[0]}
        for m, x in ((program, inputs), (model, given))
    ]
    assert sites[0] == sites[1]
    ranks: Any = dict.fromkeys(sites[0], 2)
    made = surgery.decompose(program, ranks=ranks)
    surgery.export_onnx(made.model, tmp_path / "made.onnx", inputs)
    exported: Any = surgery.load(tmp_path / "made.onnx")
    factored = surgery.decompose(model, given, ranks=ranks)
    assert [(c.site, c.rank, c.macs) for c in factored.changes] == [(c.site, c.rank, c.macs) for c in made.changes]
    for a, b in zip(outputs(factored.model, *given), outputs(exported, *given), strict=True):
        assert relative_error(a, b) <= 1e-4
    assert {c.site for c in surgery.recompose(exported, given).changes} == {c.site for c in made.changes}


@pytest.mark.law(6)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.parametrize("name", ZOO)
def test_the_laws_of_a_network(name: str, tmp_path: Path) -> None:
    program, inputs = graph(name, "program")
    surgery.export_onnx(program, tmp_path / "m.onnx", inputs)
    model: Any = surgery.load(tmp_path / "m.onnx")
    given = positional(model, inputs)
    before = outputs(model, *given)
    full = surgery.decompose(model, given, ranks="full")
    for found, wanted in zip(outputs(full.model, *given), before, strict=True):
        assert relative_error(found, wanted) <= 1e-4
    made = surgery.decompose(model, given, ranks="energy=0.9")
    assert unique(made.model) == made.after.parameters
    assert_valid(made.model)
    back = surgery.recompose(made.model, given)
    assert {fusion.site for fusion in back.changes} == {change.site for change in made.changes}
    assert weights(back.model) == weights(model)
    for found, wanted in zip(outputs(back.model, *given), outputs(made.model, *given), strict=True):
        assert relative_error(found, wanted) <= 1e-4
    assert _types(back.model) == _types(model)


def unique(model: ir.Model) -> int:
    return sum(int(np.prod(shape)) for shape in weights(model).values())


VIEWS: dict[str, tuple[str, tuple[int, ...], Any]] = {
    "transpose": ("V = Transpose <perm = [1, 0]> (W)", (6, 8), np.float32),
    "transpose-default": ("V = Transpose(W)", (6, 8), np.float32),
    "reshape": ("V = Reshape(W, sizes)", (4, 2, 6), np.float32),
    "squeeze": ("V = Squeeze(W, axis)", (1, 8, 6), np.float32),
    "cast": ("V = Cast <to = 1> (W)", (8, 6), np.float16),
    "all": (
        "A = Cast <to = 1> (W)  B = Transpose <perm = [1, 0]> (A)  C = Identity(B)  V = Reshape(C, sizes)",
        (12, 4),
        np.float16,
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_behind_nodes_that_move_or_convert_it(name: str) -> None:
    said, shape, dtype = VIEWS[name]
    text = f"g (float[n, 8] x) => (float[n, 6] z) {{ {said}  y = MatMul(x, V)  z = Add(y, b) }}"
    more: dict[str, Any] = {"reshape": {"sizes": np.array([-1, 6])}, "all": {"sizes": np.array([8, 6])}}.get(name, {})
    more |= {"axis": np.array([0])} if name == "squeeze" else {}
    model = parsed(text, W=numbers(*shape, dtype=dtype), b=numbers(6), **more)
    if dtype == np.float16:  # the factors are float32, and the weight is rounded again
        made = surgery.decompose(model, X, ranks="2").model
        back = surgery.recompose(made, X).model
        assert relative_error(outputs(back, X)[0], outputs(made, X)[0]) <= 2e-3
    else:
        made = assert_comes_back(model, X, ["W"])
        back = surgery.recompose(made, X).model
    assert _types(made) == ["Add", "MatMul", "MatMul"]
    views = [
        [str(node) for node in ir.to_proto(each).graph.node if node.op_type not in ("MatMul", "Add")]
        for each in (back, model)
    ]
    assert views[0] == views[1]
    assert weights(back) == weights(model)
    assert {k: v.dtype for k, v in back.graph.initializers.items()} == {
        k: v.dtype for k, v in model.graph.initializers.items()
    }


def test_a_record_of_views_that_cannot_be_gives_a_plain_weight() -> None:
    text = "g (float[n, 8] x) => (float[n, 6] z) { V = Transpose(W)  z = MatMul(x, V) }"
    made = surgery.decompose(parsed(text, W=numbers(6, 8)), X, ranks="2").model
    record = json.loads(made.metadata_props["surgery"])
    before = outputs(made, X)[0]
    for change in ({"said": [3, 1]}, {"shape": [2**39, 2**39]}, {"op_type": "Softmax"}, {"dtype": 7}, {"said": ["1"]}):
        damaged = json.loads(json.dumps(record))
        damaged["sites"]["W"]["computed"][0] |= change
        model = made.clone()
        model.metadata_props["surgery"] = json.dumps(damaged)
        back = surgery.recompose(model, X).model
        assert relative_error(outputs(back, X)[0], before) <= 1e-6
        assert weights(back) == {"W": (8, 6)}


def test_one_weight_read_in_two_ways_is_a_skip() -> None:
    text = "g (float[n, 8] x) => (float[n, 8] z) { V = Transpose(W)  y = MatMul(x, V)  z = MatMul(y, W) }"
    sites, [skip] = find_sites(parsed(text, W=numbers(8, 8)), X)
    assert not sites
    assert "differ in more" in skip.reason


def recurrent(op: str, directions: int = 1, *, twice: bool = False, view: bool = False) -> ir.Model:
    gates, said = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 'direction = "bidirectional",' if directions == 2 else ""
    rows = gates * 5
    node = f"{op} <{said} hidden_size = 5> (x, {'V' if view else 'W'}, R, B)"
    more = f"u, v = {op} <{said} hidden_size = 5> (x, W, R, B)  z = Add(y, u)" if twice else "z = Relu(y)"
    before = "V = Unsqueeze(W, axis)" if view else ""
    arrays: dict[str, Any] = {"axis": np.array([0])} if view else {}
    return parsed(
        f"g (float[t, n, 8] x) => (float[t, d, n, 5] z, float[d, n, 5] h) {{ {before}  y, h = {node}  {more} }}",
        W=numbers(*(() if view else (directions,)), rows, 8), R=numbers(directions, rows, 5, seed=1),
        B=numbers(directions, 2 * rows, seed=2), **arrays,
    )  # fmt: skip


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_the_weights_of_a_recurrent_node(op: str, directions: int, twice: bool) -> None:
    model = recurrent(op, directions, twice=twice)
    x, rows = torch.randn(4, 2, 8), weights(model)["W"][1]
    names = {weight: [weight, f"{weight}_reverse"][:directions] for weight in ("W", "R")}
    inside = op == "GRU"  # multiplies by R in two places, unless the reset gate comes after the product
    assert_comes_back(model, x, names["W"] if inside else [*names["W"], *names["R"]])
    made = surgery.decompose(model, x, ranks=dict.fromkeys(names["W"], 2)).model
    assert [weights(made)[f"{name}.1.weight"] for name in names["W"]] == [(1, rows, 2)] * directions
    sites, skips = find_sites(model, x)
    said = {site.name: site.macs for site in sites} | {skip.name: skip.macs for skip in skips}
    assert said == {name: 4 * 2 * (8 if w == "W" else 5) * rows * (1 + twice) for w in names for name in names[w]}
    assert [(skip.name, "loop" in skip.reason) for skip in skips] == [(name, True) for name in names["R"] if inside]


def test_an_input_weight_behind_a_view() -> None:
    model = recurrent("LSTM", view=True)
    assert_comes_back(model, torch.randn(4, 2, 8), ["W", "R"])


def test_a_recurrent_node_takes_only_factors_of_matrices() -> None:
    model = recurrent("GRU")
    result = surgery.decompose(model, torch.randn(4, 2, 8), ranks="2", factorization="tt")
    assert not result.changes
    assert "only svd" in str(result)
    assert ir.to_proto(result.model) == ir.to_proto(model)


def test_a_weight_that_is_an_input_has_factors_that_are() -> None:
    text = "g (float[n, 8] x, float[8, 6] W, float[n, 6] c) => (float[n, 6] z) { y = MatMul(x, W)  z = Add(y, c) }"
    model = parsed(text, W=numbers(8, 6))
    x = (X, torch.ones(3, 6))
    made = surgery.decompose(model, x, ranks="2").model
    assert [value.name for value in made.graph.inputs] == ["x", "W.0.weight", "W.1.weight", "c"]
    assert_valid(made)
    back = surgery.recompose(made, x).model
    assert [value.name for value in back.graph.inputs] == ["x", "W", "c"]


def test_one_weight_twice_in_a_row_comes_back_once() -> None:
    text = "g (float[n, 8] x) => (float[n, 8] z) { a = MatMul(x, W)  b = Relu(a)  c = MatMul(b, W)  z = MatMul(c, W) }"
    model = parsed(text, W=numbers(8, 8))
    assert_comes_back(model, X, ["W"])


def test_a_bfloat16_weight_behind_a_cast_comes_back() -> None:
    text = "g (float[n, 8] x) => (float[n, 6] z) { V = Cast <to = 1> (W)  z = MatMul(x, V) }"
    model = parsed(text, W=numbers(8, 6))
    weight = model.graph.initializers["W"]
    narrow = to_ir(to_torch(weight.const_value).bfloat16(), "W")  # type: ignore[arg-type]  # an initializer has one
    weight.const_value, weight.type = narrow, ir.TensorType(ir.DataType.BFLOAT16)
    made = surgery.decompose(model, X, ranks="full").model
    back = surgery.recompose(made, X).model
    assert back.graph.initializers["W"].dtype == ir.DataType.BFLOAT16
    assert relative_error(outputs(back, X)[0], outputs(model, X)[0]) <= 1e-2


def test_calibration_that_runs_another_branch_is_refused() -> None:
    text = """g (float[n, 8] x, bool c) => (float[n, 8] z) {
        z = If (c) <
            then_branch = t () => (float[n, 8] y) { y = MatMul(x, W) },
            else_branch = e () => (float[n, 8] u) { u = MatMul(x, U) }
        >
    }"""
    model = parsed(text, W=numbers(8, 8), U=numbers(8, 8, seed=1))
    data = {"x": torch.randn(32, 8), "c": torch.tensor(False)}
    with pytest.raises(InputError, match="do not run W"):
        surgery.decompose(model, (X, torch.tensor(True)), ranks="2", calibration=data)
    assert [c.site for c in surgery.decompose(model, ranks="2", calibration=data).changes] == ["U"]


def test_inputs_may_be_numbers_of_numpy() -> None:
    text = "g (float[n, 8] x, float k) => (float[n, 6] z) { y = MatMul(x, W)  z = Mul(y, k) }"
    model = parsed(text, W=numbers(8, 6))
    for number in (np.array(2.0, np.float32), np.float32(2)):
        assert find_sites(model, {"x": X.numpy(), "k": number})[0]


def test_sequences_whose_first_axis_is_time_stay_whole() -> None:
    model = recurrent("LSTM")
    torch.manual_seed(0)
    batches = read_calibration([torch.randn(4, 1, 8) for _ in range(6)], model)
    assert batches.exact
    assert [len(args[0]) for args, _ in batches] == [4] * 6
    with pytest.raises(InputError, match="counts no samples"):
        read_calibration([torch.randn(4, 1, 8), torch.randn(5, 1, 8)], model)
    result = surgery.decompose(model, ranks="2", calibration=[torch.randn(4, 1, 8) for _ in range(16)])
    assert [change.site for change in result.changes] == ["W", "R"]
