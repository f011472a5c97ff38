"""Recurrent layers of ONNX files: each direction is a site, and all nodes and weights come back as they were."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import surgery
from surgery.algebra import relative_error
from surgery.passes.preview import find_sites
from tests.test_onnx import assert_valid, numbers, outputs, parsed, weights

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, N, WIDE, H = 4, 2, 8, 5


def layer(op: str, said: str = "", *, both: bool = True, inputs: str = "", tail: str = "", **arrays: Any) -> ir.Model:
    """A recurrent node with a name and biases; ``inputs`` follow B, and ``tail`` makes z of y and h."""
    way, rows, d = "bidirectional" if both else "forward", GATES[op] * H, 1 + both
    node = f'{op} <direction = "{way}", hidden_size = {H}{said}> (x, W, R, B{inputs})'
    head, outs = f"g (float[t, n, {WIDE}] x) => (float[t, d, n, {H}] z, float[d, n, {H}] h)", "y, h"
    model = parsed(
        f"{head} {{ {outs}{', c' if op == 'LSTM' else ''} = {node}  {tail or 'z = Relu(y)'} }}",
        W=numbers(d, rows, WIDE), R=numbers(d, rows, H, seed=1), B=numbers(d, 2 * rows, seed=2), **arrays,
    )  # fmt: skip
    proto = ir.to_proto(model)
    proto.graph.node[0].name, proto.graph.node[0].doc_string = "rnn", "a layer"
    proto.graph.initializer[1].doc_string = "a weight"
    return ir.serde.deserialize_model(proto)


STATE = numbers(2, N, H, seed=3)
# of both directions: more attributes, the inputs after B, and what stands behind the node
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LSTM": ("", "", {}),
    "LSTM states": ("", ", , s, s", {"s": STATE}),
    "LSTM peepholes": ("", ", , s, s, P", {"s": STATE, "P": numbers(2, 3 * H, seed=4)}),
    "LSTM lengths": ("", ", l", {"l": np.array([4, 2], np.int32)}),
    "LSTM activations": (', activations = ["Sigmoid", "Tanh", "Tanh", "Sigmoid", "Tanh", "Relu"]', "", {}),
    "LSTM clip": (", clip = 0.5", "", {}),
    "GRU": ("", "", {}),
    "GRU reset after": (", linear_before_reset = 1", "", {}),
    "GRU states": (", linear_before_reset = 1", ", , s", {"s": STATE}),
    "RNN": ("", "", {}),
    "RNN relu": (', activations = ["Relu", "Relu"]', "", {}),
}


def form(name: str) -> ir.Model:
    said, inputs, arrays = FORMS[name]
    return layer(name.partition(" ")[0], said, inputs=inputs, **arrays)


def described(model: ir.Model) -> Any:
    """Return the nodes of a model, its initializers and its metadata."""
    proto = ir.to_proto(model)
    return (
        [node.SerializeToString(deterministic=True) for node in proto.graph.node],
        list(proto.graph.initializer),
        list(proto.metadata_props),
    )


def input_sites(model: ir.Model, x: Any) -> list[str]:
    return [site.name for site in find_sites(model, x)[0] if site.name.startswith("W")]


@pytest.mark.parametrize("name", FORMS)
def test_each_direction_is_a_site_and_comes_back(name: str) -> None:
    model, x = form(name), torch.randn(T, N, WIDE)
    before = outputs(model, x)
    assert input_sites(model, x) == ["W", "W_reverse"]
    assert described(surgery.decompose(model, x, ranks={}).model) == described(model)
    for sites in (["W"], ["W_reverse"], ["W", "W_reverse"]):
        largest = min(WIDE, GATES[name.partition(" ")[0]] * H)
        full = surgery.decompose(model, x, ranks=dict.fromkeys(sites, largest)).model
        for found, wanted in zip(outputs(full, x), before, strict=True):
            assert relative_error(found, wanted) <= 1e-5
        made = surgery.decompose(model, x, ranks=dict.fromkeys(sites, 2))
        assert_valid(made.model)
        assert [change.site for change in made.changes] == sites
        back = surgery.recompose(made.model, x)
        assert_valid(back.model)
        for found, wanted in zip(outputs(back.model, x), outputs(made.model, x), strict=True):
            assert relative_error(found, wanted) <= 1e-5
        assert weights(back.model) == weights(model)
        again = described(back.model)
        assert again[0] == described(model)[0]
        assert again[2] == described(model)[2]
        assert [tensor for tensor in again[1] if tensor.name != "W"] == described(model)[1][1:]


def test_a_layer_in_a_branch_is_split_there() -> None:
    node, ends = f'LSTM<direction = "bidirectional", hidden_size = {H}>', f"float[t, d, n, {H}]"
    text = f"""g (float[t, n, {WIDE}] x, bool c) => ({ends} z) {{
        z = If (c) <
            then_branch = a () => ({ends} y) {{ y = {node}(x, W, R) }},
            else_branch = b () => ({ends} u) {{ u = {node}(x, V, R) }}
        >
    }}"""
    arrays = {"W": numbers(2, 4 * H, WIDE), "V": numbers(2, 4 * H, WIDE, seed=2), "R": numbers(2, 4 * H, H, seed=1)}
    model, x = parsed(text, **arrays), (torch.randn(T, N, WIDE), torch.tensor(True))
    made = surgery.decompose(model, x, ranks={"W_reverse": 2})
    assert [change.site for change in made.changes] == ["W_reverse"]
    back = surgery.recompose(made.model, x)
    assert described(back.model)[0] == described(model)[0]
    assert weights(back.model) == weights(model)


def test_a_file_of_an_earlier_version_comes_back() -> None:
    """Both directions had one site then: W of 8 columns became a product with 2 columns and the weight of those."""
    text = f"g (float[t, n, {WIDE}] x) => (float[t, d, n, {H}] z) {{ z = LSTM"
    text += f'<direction = "bidirectional", hidden_size = {H}>(p, "W.1.weight", R) }}'
    text = text.replace("{ ", '{ p = MatMul(x, "W.0.weight")  ', 1)
    factors: dict[str, Any] = {"W.0.weight": numbers(WIDE, 2), "W.1.weight": numbers(2, 4 * H, 2, seed=3)}
    made = parsed(text, R=numbers(2, 4 * H, H, seed=1), **factors)
    entry = {"factorization": "svd", "rank": [2], "weight": "W", "stored": "out_in"}
    made.metadata_props["surgery"] = json.dumps({"version": 1, "sites": {"W": entry}, "ties": []})
    x = torch.randn(T, N, WIDE)
    back = surgery.recompose(made, x)
    assert [change.site for change in back.changes] == ["W"]
    assert weights(back.model) == {"W": (2, 4 * H, WIDE), "R": (2, 4 * H, H)}
    assert relative_error(outputs(back.model, x)[0], outputs(made, x)[0]) <= 1e-5


RECORDS: dict[str, Any] = {"nothing": None, "a number": 3, "no text": {"node": 3}, "no message": {"node": "AAAA"}}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_a_node_that_cannot_be_leaves_its_halves(name: str) -> None:
    model, x = form("GRU"), torch.randn(T, N, WIDE)
    made = surgery.decompose(model, x, ranks={"W": 2}).model
    record = json.loads(made.metadata_props["surgery"])
    record["layers"] = dict.fromkeys(record["layers"], RECORDS[name])
    made.metadata_props["surgery"] = json.dumps(record)
    back = surgery.recompose(made, x)
    assert [change.site for change in back.changes] == ["W"]
    assert relative_error(outputs(back.model, x)[0], outputs(made, x)[0]) <= 1e-5
    assert sum(node.op_type == "GRU" for node in back.model.graph) == 2
