"""What an ONNX model has besides its weights stays: compared field by field with the file that came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import surgery
from surgery.errors import FileError, InputError
from surgery.kinds.onnx.proto import write_proto
from tests.test_onnx import X, assert_comes_back, numbers, outputs, parsed


def about(message: Any, name: str) -> Any:
    """Give a message everything that says something about it."""
    if "doc_string" in message.DESCRIPTOR.fields_by_name:
        message.doc_string = f"about {name}"
    if "metadata_props" in message.DESCRIPTOR.fields_by_name:
        message.metadata_props.add(key=f"key of {name}", value="said")
    return message


def nodes() -> list[Any]:
    found = [
        helper.make_node("MatMul", ["x", "A"], ["a"], name="first"),
        helper.make_node("Add", ["a", "p"], ["b"]),  # without a name
        helper.make_node("Clip", ["b", "", "most"], ["c"], name="clip"),
        helper.make_node("Double", ["c"], ["d"], name="double", domain="own", overload="of floats"),
        helper.make_node("Gemm", ["d", "B"], ["e"], transB=1),
        helper.make_node("Add", ["e", "sparse"], ["f"]),
        helper.make_node("Identity", ["f"], ["z"], name="last"),
    ]
    for node in found[::2]:
        about(node, node.output[0])
    part = found[0].device_configurations.add(configuration_id="two", pipeline_stage=1)
    part.sharding_spec.add(tensor_name="A", device=[0, 1])
    return found


def function() -> Any:
    inner = [helper.make_node("Add", ["u", "u"], ["v"], name="inner")]
    made = helper.make_function("own", "Double", ["u"], ["v"], inner, [helper.make_opsetid("", 18)])
    made.overload = "of floats"
    made.value_info.append(about(helper.make_tensor_value_info("v", TensorProto.FLOAT, ["n", 16]), "v"))
    return about(made, "Double")


def everything(*, ir_version: int = 11) -> Any:
    """A model with everything that the format knows besides weights, and weights to factor in it."""
    weights = [numpy_helper.from_array(numbers(*shape, seed=at), name)
               for at, (name, shape) in enumerate({"A": (8, 16), "p": (16,), "B": (6, 16)}.items())]  # fmt: skip
    weights.append(numpy_helper.from_array(np.array(3.0, np.float32), "most"))
    for tensor in weights:
        about(tensor, tensor.name)
    values = [about(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]), name)
              for name, size in (("a", 16), ("b", 16), ("d", 16), ("e", 6))]  # fmt: skip
    ends = [about(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]), name)
            for name, size in (("x", 8), ("z", 6))]  # fmt: skip
    ends[0].type.denotation, ends[0].type.tensor_type.shape.dim[0].denotation = "TENSOR", "DATA_BATCH"
    graph = helper.make_graph(nodes(), "whole", ends[:1], ends[1:], weights, value_info=values)
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.array([1, 2], np.float32), "sparse"),
                                       numpy_helper.from_array(np.array([1, 4]), ""), [6])  # fmt: skip
    graph.sparse_initializer.append(sparse)
    graph.quantization_annotation.append(onnx.TensorAnnotation(tensor_name="b"))
    graph.quantization_annotation[0].quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="most")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1), helper.make_opsetid("com.example", 7)]
    model = helper.make_model(about(graph, "graph"), opset_imports=opsets, functions=[function()],
                              producer_name="somebody", producer_version="1.2", ir_version=ir_version)  # fmt: skip
    model.domain, model.model_version = "org.example", 5
    model.configuration.add(name="two", num_devices=2, device=["a", "b"])
    model.training_info.add().algorithm.CopyFrom(helper.make_graph([], "train", [], []))
    return about(model, "model")


FORMS = ("raw_data", "float_data", "data_location")  # of the same numbers


def flat(message: Any, path: str = "") -> dict[str, Any]:
    """All fields of a message by path; repeated messages with names go by name, and numbers of weights are left out."""
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name in FORMS:
            continue
        here = f"{path}.{field.name}"
        if field.message_type is None:
            found[here] = list(value) if field.is_repeated else value
        elif field.is_repeated:
            for at, each in enumerate(value):
                called = next(
                    (getattr(each, key) for key in ("key", "domain", "tensor_name") if hasattr(each, key)), ""
                )
                if field.name in ("initializer", "value_info", "input", "output"):
                    called = each.name
                found |= flat(each, f"{here}[{called or at}]")
        else:
            found |= flat(value, here)
    return found


def by_output(model: Any) -> dict[str, dict[str, Any]]:
    return {",".join(node.output): flat(node) for node in model.graph.node}


def without_nodes(model: Any) -> dict[str, Any]:
    return {path: value for path, value in flat(model).items() if not path.startswith(".graph.node")}


@pytest.mark.parametrize("as_file", [True, False])
def test_only_what_stands_in_the_place_of_weights_is_new(as_file: bool, tmp_path: Path) -> None:
    proto = everything()
    onnx.save(proto, tmp_path / "m.onnx")
    given: Any = tmp_path / "m.onnx" if as_file else proto
    made = written(surgery.decompose(given, X, ranks="3").model)
    onnx.checker.check_model(made, full_check=False)
    before, after = by_output(proto), by_output(made)
    assert set(before) - set(after) == {"a"}, "the product and the Add of its bias are one call"
    assert {output for output in set(before) & set(after) if before[output] != after[output]} == {"b", "e"}
    old, new = without_nodes(proto), without_nodes(made)
    # what was said of a value that is gone must not stay
    gone, added = {part(path) for path in old.keys() - new.keys()}, {part(path) for path in new.keys() - old.keys()}
    assert gone == {"initializer[A]", "initializer[B]", "value_info[a]"}
    factors = {f"initializer[{site}.{place}.weight]" for site in "AB" for place in (0, 1)}
    assert added == factors | {"metadata_props[surgery]"}
    assert {path: value for path, value in old.items() if path in new and new[path] != value} == {}


def part(path: str) -> str:
    """The first part of a path that has a name.

    >>> part(".graph.value_info[a].type")
    'value_info[a]'
    """
    return next(each for each in path.split("].")[0].split(".", maxsplit=2) if "[" in each).removesuffix("]") + "]"


def written(model: Any) -> Any:
    return model if isinstance(model, onnx.ModelProto) else write_proto(model)


@pytest.mark.parametrize("ranks", ["full", "3"])
def test_a_model_that_comes_back_is_the_one_that_went(ranks: str) -> None:
    proto = everything()
    back = surgery.recompose(surgery.decompose(proto, X, ranks=ranks).model, X).model
    assert without_nodes(back) == without_nodes(proto)
    assert by_output(back) == by_output(proto)
    twice = surgery.decompose(surgery.decompose(proto, X, ranks="4").model, X, ranks="2").model  # chains are cut
    back = surgery.recompose(twice, X).model
    assert without_nodes(back) == without_nodes(proto)
    assert by_output(back) == by_output(proto)


def test_weights_are_listed_in_their_order() -> None:
    proto = everything()
    made = written(surgery.decompose(proto, X, ranks="3").model)
    assert [tensor.name for tensor in made.graph.initializer] == [
        *("A.0.weight", "A.1.weight", "p", "B.0.weight", "B.1.weight", "most")
    ]
    back = written(surgery.recompose(surgery.decompose(made, X, ranks="2").model, X).model)
    assert [tensor.name for tensor in back.graph.initializer] == ["A", "p", "B", "most"]


def test_a_bias_that_is_read_first_is_read_first_again() -> None:
    model = parsed(
        "g (float[n, 8] x) => (float[n, 6] z) { y = MatMul(x, W)  z = Add(b, y) }", W=numbers(8, 6), b=numbers(6)
    )
    back = surgery.recompose(surgery.decompose(model, X, ranks="2").model, X).model
    assert [value.name for value in back.graph[-1].inputs] == ["b", "y"]


def test_old_files_have_their_weights_among_the_inputs() -> None:
    proto = everything()
    proto.ir_version = 3
    del proto.configuration[:], proto.graph.node[0].device_configurations[:]
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    dense = numpy_helper.from_array(np.array([0, 1, 0, 0, 2, 0], np.float32), "sparse")  # IR 3 has none
    proto.graph.initializer.append(dense)
    proto.graph.input.append(helper.make_tensor_value_info("sparse", TensorProto.FLOAT, [6]))
    del proto.graph.sparse_initializer[:], proto.functions[:]
    for node in proto.graph.node:
        if node.op_type == "Double":
            node.op_type = "Abs"
            node.ClearField("domain")
            node.ClearField("overload")
    made = surgery.decompose(proto, X, ranks="3").model
    names = {value.name for value in made.graph.input}
    assert names == {"x", "p", "most", "sparse", "A.0.weight", "A.1.weight", "B.0.weight", "B.1.weight"}
    back = surgery.recompose(made, X).model
    assert without_nodes(back) == without_nodes(proto)
    assert by_output(back) == by_output(proto)


def test_a_damaged_note_of_what_was_there_is_left_alone() -> None:
    proto = everything()
    made = surgery.decompose(proto, X, ranks="3").model
    for said in ("no base64 *", "AAAA", ""):
        for node in made.graph.node:
            for entry in node.metadata_props:
                entry.value = said if entry.key == "surgery.was" else entry.value
        back = surgery.recompose(made, X).model
        assert {tensor.name for tensor in back.graph.initializer} == {t.name for t in proto.graph.initializer}


def test_a_sparse_weight_is_a_site(tmp_path: Path) -> None:
    proto = ir.to_proto(parsed("g (float[n, 8] x) => (float[n, 6] z) { z = MatMul(x, W) }"))
    places, values = np.array([1, 9, 40]), numpy_helper.from_array(np.array([1, 2, 3], np.float32), "W")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, numpy_helper.from_array(places), [8, 6]))
    onnx.save(proto, tmp_path / "m.onnx")
    model = surgery.load(tmp_path / "m.onnx")
    assert isinstance(model, ir.Model)
    assert_comes_back(model, X, ["W"])


def test_sparse_initializers_that_cannot_be_right_are_told(tmp_path: Path) -> None:
    places, values = np.array([1, 9]), np.array([1, 2], np.float32)
    for dims, said in (([6], "cannot be right"), ([1 << 40, 6], "of .* numbers"), ([-6], "cannot be right|do not fit")):
        proto = everything()
        sparse = proto.graph.sparse_initializer[0]
        sparse.indices.CopyFrom(numpy_helper.from_array(places))
        sparse.values.CopyFrom(numpy_helper.from_array(values, "sparse"))
        del sparse.dims[:]
        sparse.dims.extend(dims)
        (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(FileError, match=said):
            surgery.load(tmp_path / "m.onnx")


def test_messages_that_cannot_be_read_are_told() -> None:
    text = "g (float[n, 8] x) => (float[n, 6] z) { z = MatMul(x, W) }"
    twice = write_proto(parsed(text, W=numbers(8, 6)))
    twice.graph.initializer.append(numpy_helper.from_array(numbers(8, 6, seed=1), "W"))
    with pytest.raises(InputError, match=r"the onnx\.ModelProto has two weights named W; export the model again"):
        surgery.find_sites(twice, X)
    in_node = write_proto(parsed(text, W=numbers(8, 6)))
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "W"), helper.make_tensor("i", 7, [1], [3]), [8, 6]
    )
    in_node.graph.node.insert(0, helper.make_node("Constant", [], ["V"], sparse_value=sparse))
    with pytest.raises(InputError, match=r"the onnx\.ModelProto has parts that onnx_ir cannot read"):
        surgery.find_sites(in_node, X)


def test_an_addition_after_a_gemm_stays_an_addition() -> None:
    text = "g (float[n, 8] x) => (float[n, 6] z) { y = Gemm(x, W)  z = Add(y, b) }"
    made = assert_comes_back(parsed(text, W=numbers(8, 6), b=numbers(6)), X, ["W"])
    assert [node.op_type for node in surgery.recompose(made, X).model.graph] == ["Gemm", "Add"]


def test_branches_may_have_weights_of_one_name() -> None:
    """A branch does not see the other, so that the name is free there when the weight comes back."""
    text = """g (float[n, 8] x, bool c) => (float[n, 6] z) {
        z = If (c) <then_branch = t () => (float[n, 6] a) { a = MatMul(x, w) },
                    else_branch = e () => (float[n, 6] b) { y = MatMul(x, w)  b = Relu(y) }> }"""
    proto = ir.to_proto(parsed(text))
    for seed, attribute in enumerate(proto.graph.node[0].attribute):
        attribute.g.initializer.append(numpy_helper.from_array(numbers(8, 6, seed=seed), "w"))
    model, inputs = ir.serde.deserialize_model(proto), (torch.ones(2, 8), torch.tensor(True))
    made = surgery.decompose(model, inputs, ranks="2").model
    assert ir.to_proto(made) != proto
    back = ir.to_proto(surgery.recompose(made, inputs).model)
    for branch, before in zip(back.graph.node[0].attribute, proto.graph.node[0].attribute, strict=True):
        assert branch.g.node == before.g.node
        assert [tensor.name for tensor in branch.g.initializer] == ["w"]


def test_what_a_graph_says_of_a_weight_comes_back() -> None:
    proto = ir.to_proto(parsed("g (float[n, 8] x) => (float[n, 6] z) { z = MatMul(x, w) }", w=numbers(8, 6)))
    del proto.graph.value_info[:]
    said = about(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 6]), "w")
    proto.graph.value_info.append(said)
    note = proto.graph.quantization_annotation.add(tensor_name="w")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "s"))
    made = surgery.decompose(proto, X, ranks="2").model
    assert not [*made.graph.value_info, *made.graph.quantization_annotation]
    back = surgery.recompose(made, X).model
    assert list(back.graph.value_info) == [said]
    assert list(back.graph.quantization_annotation) == [note]


def test_weights_of_constant_nodes_stand_in_nodes_again(tmp_path: Path) -> None:
    text = """g (float[n, 8] x, bool c) => (float[n, 6] z, float[n, 8] t) {
        a = MatMul(x, U)  b = Relu(a)  t = MatMul(b, U)
        z = If (c) <then_branch = t () => (float[n, 6] p) { p = MatMul(t, V) },
                    else_branch = e () => (float[n, 6] q) { q = MatMul(t, W) }> }"""
    proto = ir.to_proto(parsed(text))
    homes = [proto.graph, *(attribute.g for attribute in proto.graph.node[3].attribute)]
    for name, home, size in zip("UVW", homes, (8, 6, 6), strict=True):
        node = helper.make_node(
            "Constant", [], [name], f"node of {name}", value=numpy_helper.from_array(numbers(8, size))
        )
        node.doc_string = f"what {name} is for"
        node.metadata_props.add(key="owner", value=name)
        home.node.insert(0, node)
    inputs = (torch.ones(2, 8), torch.tensor(True))
    wanted = bare(proto)
    first = surgery.decompose(proto, inputs, ranks={"V": 2}).model
    assert bare(first) != wanted
    second = surgery.decompose(first, inputs, ranks={"U": 3, "V": 2}).model
    surgery.save(second, tmp_path / "m.onnx")
    back = surgery.recompose(onnx.load(tmp_path / "m.onnx"), inputs).model
    assert bare(back) == wanted
    assert not back.metadata_props
    record = json.loads(second.metadata_props[0].value)
    assert set(record["constants"]) == {"U", "V"}
    odd = {"shape": [8, 8], "name": [], "doc": 2, "metadata": "none", "list": True, "typed": 3}
    some: list[Any] = ["no table", {"U": 1}, {"U": odd}, {"z": odd, "x": {}, "t": {"shape": 1}}]
    for damaged in some:
        other = onnx.ModelProto.FromString(second.SerializeToString())
        other.metadata_props[0].value = json.dumps({**record, "constants": damaged})
        if damaged == "no table":
            with pytest.raises(FileError, match="a damaged record"):
                surgery.recompose(other, inputs)
        else:
            again, wanted_outputs = surgery.recompose(other, inputs).model, outputs(ir.from_proto(back), *inputs)
            for found, known in zip(outputs(ir.from_proto(again), *inputs), wanted_outputs, strict=True):
                assert torch.equal(found, known)


def bare(proto: onnx.ModelProto) -> list[bytes]:
    """The nodes without the numbers of constants, in branches too, and the names of initializers."""
    found = []
    for node in proto.graph.node:
        node = onnx.NodeProto.FromString(node.SerializeToString())
        for each in (node, *(inner for attribute in node.attribute for inner in attribute.g.node)):
            for attribute in each.attribute:
                attribute.t.ClearField("raw_data")
                attribute.t.ClearField("name")
        found.append(node.SerializeToString(deterministic=True))
    return [*found, *(tensor.name.encode() for tensor in proto.graph.initializer)]
