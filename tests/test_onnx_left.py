"""What an ONNX file may have that nothing is done about: taken names, odd tables and newer versions are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import surgery
from surgery.errors import FileError


def _model(nodes: list[onnx.NodeProto], **weights: np.ndarray) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])
    tensors = [numpy_helper.from_array(array, name.replace("__", ".")) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _square(size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)


def test_a_taken_name_of_a_factor_leaves_that_site_alone() -> None:
    """Another site is factored as usual."""
    nodes = [
        helper.make_node("MatMul", ["x", "A.weight"], ["a"]),
        helper.make_node("Add", ["a", "A.0.weight"], ["b"]),
        helper.make_node("MatMul", ["b", "B.weight"], ["y"]),
    ]
    taken = np.ones((1, 8), np.float32)
    model = _model(nodes, A__weight=_square(), B__weight=_square(), A__0__weight=taken)
    result = surgery.decompose(model, ranks=2)
    assert [change.site for change in result.changes] == ["B"]
    (skip,) = [skip for skip in result.skips if skip.name == "A"]
    assert "A.0.weight" in skip.reason
    assert "A.weight" in {tensor.name for tensor in result.model.graph.initializer}


@pytest.mark.parametrize("other", ["A.0", "A.1"])
def test_names_that_end_with_a_number_are_names_of_weights(other: str) -> None:
    """Neither a weight nor a bias is taken for a factor of the site before it."""
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["a"]),
        helper.make_node("Add", ["a", f"{other}.5"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", other], ["y"]),
    ]
    model = _model(nodes, **{"A": _square(), other: _square(), f"{other}.5": np.ones(8, np.float32)})
    made = surgery.decompose(model, ranks=2)
    assert [change.site for change in made.changes] == ["A", other]
    before = made.model.SerializeToString()
    back = surgery.recompose(made.model)
    assert made.model.SerializeToString() == before
    assert not back.skips
    assert [(node.op_type, list(node.input)) for node in back.model.graph.node] == [
        (node.op_type, list(node.input)) for node in nodes
    ]
    assert surgery.compare(made.model, back.model).relative <= 1e-5


def test_a_taken_name_of_any_factor_leaves_that_site_alone() -> None:
    """Recompose would look for the other factors of this site."""
    nodes = [helper.make_node("MatMul", ["x", "A"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    nodes.append(helper.make_node("MatMul", ["b", "A.2.weight"], ["y"]))
    model = _model(nodes, A=_square(), A__2__weight=_square())
    made = surgery.decompose(model, ranks=2)
    assert [(skip.name, "A.2.weight" in skip.reason) for skip in made.skips] == [("A", True)]
    back = surgery.recompose(made.model).model
    assert {tensor.name for tensor in back.graph.initializer} == {"A", "A.2.weight"}


def test_a_bias_that_gets_another_name_keeps_it_in_the_given_model() -> None:
    """A chain of modules has its bias in its last module, as exporters write it."""
    nodes = [
        helper.make_node("MatMul", ["x", "A.0.weight"], ["a"]),
        helper.make_node("MatMul", ["a", "A.1.weight"], ["b"]),
        helper.make_node("Add", ["b", "A.1.bias"], ["y"]),
    ]
    model = _model(nodes, A__0__weight=_square(), A__1__weight=_square(), A__1__bias=np.ones(8, np.float32))
    before = model.SerializeToString()
    back = surgery.recompose(model).model
    assert model.SerializeToString() == before
    assert {tensor.name for tensor in back.graph.initializer} == {"A.weight", "A.bias"}
    assert surgery.compare(model, back).relative <= 1e-5


def test_tables_of_points_and_coefficients_in_attributes_are_skips() -> None:
    """Nothing that a model multiplies by or picks from is passed over in silence."""
    nodes = [
        helper.make_node("GatherND", ["table", "at"], ["t"]),
        helper.make_node("Add", ["x", "t"], ["s"]),
        helper.make_node("LinearRegressor", ["s"], ["y"], name="r", coefficients=[1.0] * 8, domain="ai.onnx.ml"),
    ]
    _, skips = surgery.find_sites(_model(nodes, table=_square(), at=np.zeros((1, 1), np.int64)))
    reasons = {skip.name: skip.reason for skip in skips}
    assert "GatherND" in reasons["table"]
    assert "LinearRegressor" in reasons["r"]


def test_a_weight_that_gets_the_type_of_an_input_is_a_skip() -> None:
    """Exporters write CastLike for a Cast to the type of another value, whose numbers do not count."""
    nodes = [helper.make_node("CastLike", ["W", "x"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"], name="m")]
    _, [skip] = surgery.find_sites(_model(nodes, W=_square().astype(np.float16)))
    assert (skip.name, skip.reason) == ("m", "its weight is computed by CastLike")


@pytest.mark.parametrize("ways", ["forward", "bidirectional"])
def test_a_weight_that_a_node_reads_twice_stays_one_weight(ways: str) -> None:
    """An input weight that is the recurrent weight as well; its factors could not be both."""
    square = np.stack([_square()] * (1 + (ways == "bidirectional")))
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["steps"]),
        helper.make_node("RNN", ["steps", "W", "W"], ["y"], hidden_size=8, direction=ways),
    ]
    model = _model(nodes, W=square, axis=np.array([0]))
    sites, skips = surgery.find_sites(model)
    assert not sites
    assert "its node reads the weight in two places" in {skip.reason for skip in skips}
    made = surgery.recompose(surgery.decompose(model, ranks=2).model).model
    assert [list(node.input) for node in made.graph.node] == [list(node.input) for node in model.graph.node]
    assert [tensor.name for tensor in made.graph.initializer] == ["W", "axis"]


def test_a_newer_version_of_the_format_is_named(tmp_path: Path) -> None:
    """The message says the version, and what is allowed."""
    model = _model([helper.make_node("MatMul", ["x", "W"], ["y"])], W=_square())
    model.ir_version = 99
    (tmp_path / "new.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match=r"version 99 .* newer") as caught:
        surgery.load(tmp_path / "new.onnx")
    assert str(onnx.IR_VERSION) in str(caught.value)
