"""Recurrent layers of ONNX files: each direction is a site, and all nodes and weights come back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from surgery.data.collect import collect
from surgery.data.samples import read_calibration
from surgery.passes.preview import find_sites
from tests.covering import in_turns
from tests.test_onnx import assert_valid, numbers, outputs, parsed, weights

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, N, WIDE, H = 4, 2, 8, 5


def layer(op: str, said: str = "", *, opset: int = 17, inputs: str = "", **arrays: Any) -> ir.Model:
    """A recurrent node of both directions with a name and biases; ``inputs`` follow B."""
    rows = GATES[op] * H
    node = f'{op} <direction = "bidirectional", hidden_size = {H}{said}> (x, W, R, B{inputs})'
    head, outs = f"g (float[t, n, {WIDE}] x) => (float[t, d, n, {H}] z, float[d, n, {H}] h)", "y, h"
    model = parsed(
        f"{head} {{ {outs}{', c' if op == 'LSTM' else ''} = {node}  z = Relu(y) }}", opset=opset,
        W=numbers(2, rows, WIDE), R=numbers(2, rows, H, seed=1), B=numbers(2, 2 * rows, seed=2), **arrays,
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


def form(name: str, opset: int = 17) -> ir.Model:
    said, inputs, arrays = FORMS[name]
    return layer(name.partition(" ")[0], said, opset=opset, inputs=inputs, **arrays)


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


OPENED = [name for name in FORMS if name in ("LSTM", "LSTM states", "GRU reset after", "GRU states", "RNN", "RNN relu")]


def hidden_sites(model: ir.Model, x: Any) -> list[str]:
    return [site.name for site in find_sites(model, x)[0] if site.name.startswith("R")]


@pytest.mark.parametrize("name", FORMS)
def test_recurrent_weights_are_sites_where_a_loop_computes_the_same(name: str) -> None:
    model, x = form(name), torch.randn(T, N, WIDE)
    both = ["R", "R_reverse"]
    # of the node with other activations in one direction, the other direction is torch's layer
    wanted = both if name in OPENED else both[:1] if name == "LSTM activations" else []
    assert hidden_sites(model, x) == wanted
    assert [skip.name for skip in find_sites(model, x)[1]] == [weight for weight in both if weight not in wanted]


@pytest.mark.parametrize(("name", "opset"), in_turns(OPENED, [9, 12, 17, 21]))
def test_recurrent_weights_come_back(name: str, opset: int) -> None:
    model, x = form(name, opset), torch.randn(T, N, WIDE)
    before = outputs(model, x)
    for sites in (["R"], ["R_reverse"], ["R", "R_reverse"], ["W", "R"], ["W", "W_reverse", "R", "R_reverse"]):
        widest = {"W": min(WIDE, GATES[name.partition(" ")[0]] * H), "R": H}
        full = surgery.decompose(model, x, ranks={site: widest[site[0]] for site in sites}).model
        for found, wanted in zip(outputs(full, x), before, strict=True):
            assert relative_error(found, wanted) <= 1e-5
        made = surgery.decompose(model, x, ranks=dict.fromkeys(sites, 2))
        assert_valid(made.model)
        assert [change.site for change in made.changes] == sorted(sites, key=["W", "R", "W_reverse", "R_reverse"].index)
        assert sum(weight.size for weight in stored(made.model).values()) == made.after.parameters
        back = surgery.recompose(made.model, x)
        assert_valid(back.model)
        for found, wanted in zip(outputs(back.model, x), outputs(made.model, x), strict=True):
            assert relative_error(found, wanted) <= 1e-5
        again = described(back.model)
        assert again[0] == described(model)[0]
        assert again[2] == described(model)[2]
        kept = [tensor for tensor in described(model)[1] if not {tensor.name, f"{tensor.name}_reverse"} & set(sites)]
        assert [tensor for tensor in again[1] if tensor.name in {each.name for each in kept}] == kept
        assert [tensor.name for tensor in again[1]] == [tensor.name for tensor in described(model)[1]]


def stored(model: ir.Model) -> dict[str, Any]:
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    arrays = {name: tensor.numpy() for name, tensor in held.items() if tensor is not None}
    return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}


def test_what_another_session_changes_leaves_a_loop_as_it_is() -> None:
    model, x = form("LSTM"), torch.randn(T, N, WIDE)
    made = surgery.decompose(model, x, ranks={"R": 2}).model
    again = surgery.decompose(made, x, ranks={"W": 2, "R_reverse": 3})
    assert [change.site for change in again.changes] == ["W", "R_reverse"]
    for found, wanted in zip(outputs(again.model, x), outputs(made, x), strict=True):
        assert found.shape == wanted.shape
    assert [node.SerializeToString() for node in map(ir.to_proto, made.graph)] == [
        node.SerializeToString() for node in map(ir.to_proto, surgery.decompose(made, x, ranks={}).model.graph)
    ]
    back = surgery.recompose(again.model, x)
    assert [change.site for change in back.changes] == ["W", "R", "R_reverse"]
    assert described(back.model)[0] == described(model)[0]
    assert weights(back.model) == weights(model)


def test_calibration_sees_every_step() -> None:
    model = form("LSTM")
    torch.manual_seed(0)
    data = [torch.randn(T, 1, WIDE) for _ in range(16)]
    made = surgery.decompose(model, ranks="2", calibration=data)
    assert [change.site for change in made.changes] == ["W", "R", "W_reverse", "R_reverse"]
    collected = collect(model, read_calibration(data, model))
    assert {name: moments.count for name, moments in collected.items()} == dict.fromkeys(collected, 16 * T)
    assert described(surgery.recompose(made.model, data[0]).model)[0] == described(model)[0]


def test_factors_are_cut_to_lower_ranks() -> None:
    model, x = form("GRU states"), torch.randn(T, N, WIDE)
    made = surgery.decompose(model, x, ranks={"R": 4, "W": 4}).model
    cut = surgery.decompose(made, x, ranks={"R": 2, "W": 3})
    assert {change.site: change.rank for change in cut.changes} == {"R": (2,), "W": (3,)}
    plain = surgery.decompose(model, x, ranks={"R": 2, "W": 3})
    assert {change.site: change.macs for change in cut.changes} == {c.site: c.macs for c in plain.changes}
    for found, wanted in zip(outputs(cut.model, x), outputs(plain.model, x), strict=True):
        assert relative_error(found, wanted) <= 1e-4
    assert described(surgery.recompose(cut.model, x).model)[0] == described(model)[0]


def test_both_directions_may_share_a_factor() -> None:
    model, x = form("LSTM"), torch.randn(T, N, WIDE)
    made = surgery.decompose(model, x, ranks={"W": 3, "W_reverse": 3, "R": 2}, joint="inputs")
    assert_valid(made.model)
    assert "W_reverse.0.weight" not in made.model.graph.initializers
    back = surgery.recompose(made.model, x)
    assert {change.site for change in back.changes} == {"W", "W_reverse", "R"}
    assert described(back.model)[0] == described(model)[0]
    for found, wanted in zip(outputs(back.model, x), outputs(made.model, x), strict=True):
        assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("method", ["tt", "tr"])
def test_other_factorizations_of_both_weights(method: str) -> None:
    model, x = form("GRU reset after"), torch.randn(T, N, WIDE)
    full = surgery.decompose(model, x, ranks="full", factorization=method)
    for found, wanted in zip(outputs(full.model, x), outputs(model, x), strict=True):
        assert relative_error(found, wanted) <= 1e-5
    made = surgery.decompose(model, x, ranks="2", factorization=method)
    assert made.changes
    back = surgery.recompose(made.model, x)
    assert {change.site for change in back.changes} == {change.site for change in made.changes}
    assert described(back.model)[0] == described(model)[0]


def test_what_else_a_loop_must_keep() -> None:
    """Outputs that nothing reads, a weight that something else reads, and one layer behind another."""
    text = f"""g (float[t, n, {WIDE}] x) => (float[d, n, {H}] z, float[a, b, c] w) {{
        a, b = RNN<hidden_size = {H}>(x, W, R)  s = Squeeze(a, axis)
        c, z = RNN<hidden_size = {H}, direction = "reverse">(s, V, Q)  p, q = RNN<hidden_size = {H}>(s, V, U)
        w = Mul(U, q) }}"""
    weight = {name: numbers(1, H, H, seed=at) for at, name in enumerate("RVQU")}
    model = parsed(text, W=numbers(1, H, WIDE), axis=np.array([1]), **weight)
    x = torch.randn(T, 1, WIDE)
    assert [site.name for site in find_sites(model, x)[0]] == ["W", "R", "V"]
    assert described(surgery.decompose(model, x, ranks={}).model) == described(model)
    made = surgery.decompose(model, x, ranks="2")
    assert_valid(made.model)
    back = surgery.recompose(made.model, x).model
    assert described(back)[0] == described(model)[0]
    assert weights(back) == weights(model)


def test_weights_that_are_inputs_stay_inputs() -> None:
    text = f"""g (float[t, n, {WIDE}] x, float[1, {H}, {WIDE}] W, float[1, {H}, {H}] R) => (float[t, d, n, {H}] z) {{
        z = RNN<hidden_size = {H}>(x, W, R) }}"""
    model, x = parsed(text, W=numbers(1, H, WIDE), R=numbers(1, H, H)), torch.randn(T, N, WIDE)
    made = surgery.decompose(model, x, ranks={"R": 2}).model
    assert [value.name for value in made.graph.inputs] == ["x", "W", "R.0.weight", "R.1.weight"]
    assert_valid(made)
    back = surgery.recompose(made, x).model
    assert [value.name for value in back.graph.inputs] == ["x", "W", "R"]
    assert described(back)[0] == described(model)[0]


def test_numbers_of_another_type_keep_it() -> None:
    text = f"g (double[t, n, {WIDE}] x) => (double[t, d, n, {H}] z) {{ z = RNN<hidden_size = {H}>(x, W, R) }}"
    model = parsed(text, W=numbers(1, H, WIDE, dtype=np.float64), R=numbers(1, H, H, dtype=np.float64))
    made = surgery.decompose(model, ranks={"R": 2, "W": 2}).model  # without inputs: onnxruntime has no such RNN
    assert {array.dtype.name for array in stored(made).values()} == {"float64"}
    assert_valid(made)
    back = surgery.recompose(made).model
    assert described(back)[0] == described(model)[0]
    assert weights(back) == weights(model)


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
    made = surgery.decompose(model, x, ranks={"W_reverse": 2, "R": 2})
    assert {change.site for change in made.changes} == {"W_reverse", "R"}
    assert_valid(made.model)
    back = surgery.recompose(made.model, x)
    assert described(back.model)[0] == described(model)[0]
    assert weights(back.model) == weights(model)


@pytest.mark.parametrize("d", [1, 2])
def test_a_file_of_an_earlier_version_comes_back(d: int) -> None:
    """Both directions had one site then, and the record said that nodes store their weights as (out, in)."""
    way = ', direction = "bidirectional"' if d == 2 else ""
    text = f"""g (float[t, n, {WIDE}] x) => (float[t, d, n, {H}] z) {{
        p = MatMul(x, "W.0.weight")  z = LSTM<hidden_size = {H}{way}>(p, "W.1.weight", R) }}"""
    factors: dict[str, Any] = {"W.0.weight": numbers(WIDE, 2), "W.1.weight": numbers(d, 4 * H, 2, seed=3)}
    made = parsed(text, R=numbers(d, 4 * H, H, seed=1), **factors)
    entry = {"factorization": "svd", "rank": [2], "weight": "W", "stored": "out_in"}
    made.metadata_props["surgery"] = json.dumps({"version": 1, "sites": {"W": entry}, "ties": []})
    x = torch.randn(T, N, WIDE)
    back = surgery.recompose(made, x)
    assert [change.site for change in back.changes] == ["W"]
    assert_valid(back.model)
    assert [node.op_type for node in back.model.graph] == ["LSTM"]
    assert weights(back.model) == {"W": (d, 4 * H, WIDE), "R": (d, 4 * H, H)}
    assert relative_error(outputs(back.model, x)[0], outputs(made, x)[0]) <= 1e-5


RECORDS: dict[str, Any] = {"nothing": None, "a number": 3, "no text": {"node": 3}, "no message": {"node": "AAAA"}}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_a_node_that_cannot_be_is_done_without(name: str) -> None:
    """The halves of a node stay apart then, and a loop becomes a node without the names of the one before."""
    for model, site in ((form("GRU"), "W"), (form("GRU states"), "R")):
        x = torch.randn(T, N, WIDE)
        made = surgery.decompose(model, x, ranks={site: 2}).model
        record = json.loads(made.metadata_props["surgery"])
        record["layers"] = dict.fromkeys(record["layers"], RECORDS[name])
        made.metadata_props["surgery"] = json.dumps(record)
        back = surgery.recompose(made, x)
        assert [change.site for change in back.changes] == [site]
        assert_valid(back.model)
        assert relative_error(outputs(back.model, x)[0], outputs(made, x)[0]) <= 1e-5
        assert [node.op_type for node in back.model.graph if node.op_type in ("GRU", "Scan")] == ["GRU"] * 2


def test_a_step_may_add_its_bias_in_parts() -> None:
    rows = 3 * H
    text = f"""g (float[t, n, {WIDE}] x, float[n, {H}] s) => (float[t, n, {H}] z) {{
        p = MatMul(x, W)  q = Add(p, b)
        h, z = Scan<num_scan_inputs = 1, body = step (float[n, {H}] a, float[n, {rows}] g) =>
            (float[n, {H}] e, float[n, {H}] o) {{
                c = MatMul(a, R)
                gr, gz, gn = Split<axis = -1>(g)  cr, cz, cn = Split<axis = -1>(c)  br, bz, bn = Split<axis = -1>(d)
                r0 = Add(cr, br)  r1 = Add(gr, r0)  r = Sigmoid(r1)
                z0 = Add(bz, cz)  z1 = Add(z0, gz)  u = Sigmoid(z1)
                n0 = Add(cn, bn)  n1 = Mul(r, n0)  n2 = Add(gn, n1)  n = Tanh(n2)
                k = Sub(a, n)  l = Mul(u, k)  e = Add(n, l)  o = Identity(e)
            }}>(s, q) }}"""
    arrays = {"W": numbers(WIDE, rows), "R": numbers(H, rows, seed=1), "b": numbers(rows), "d": numbers(rows, seed=2)}
    model, x = parsed(text, **arrays), (torch.randn(T, N, WIDE), torch.randn(N, H))
    made = surgery.decompose(model, x, ranks="3")
    assert [change.site for change in made.changes] == ["W", "R"]
    assert_valid(made.model)
    back = surgery.recompose(made.model, x).model
    assert relative_error(outputs(back, *x)[0], outputs(made.model, *x)[0]) <= 1e-5
    assert [node.op_type for node in back.graph] == ["Unsqueeze", "GRU", "Squeeze"]


class Layers(nn.Module):
    """All kinds of recurrent layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(WIDE, H, bidirectional=True), nn.GRU(2 * H, H, num_layers=2, batch_first=True)
        self.plain = nn.GRU(H, H, bias=False, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        z, last = self.gru(y.transpose(0, 1))
        out: Tensor = self.plain(z.transpose(0, 1), last)[0]
        return out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
def test_loops_of_an_export_become_nodes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Layers().eval(), torch.randn(T, N, WIDE)
    made = surgery.decompose(module, x, ranks="2")
    surgery.export_onnx(made.model, tmp_path / "m.onnx", x)
    model: Any = surgery.load(tmp_path / "m.onnx")
    assert [node.op_type for node in model.graph].count("Scan") == 6
    assert described(surgery.decompose(model, x, ranks={}).model) == described(model)
    back = surgery.recompose(model, x)
    assert {change.site for change in back.changes} == {change.site for change in made.changes}
    assert_valid(back.model)
    assert relative_error(outputs(back.model, x)[0], outputs(model, x)[0]) <= 1e-5
    assert [node.op_type for node in back.model.graph if node.op_type in (*GATES, "Scan")] == ["LSTM"] * 2 + ["GRU"] * 4
    assert sum(array.size for array in stored(back.model).values()) == sum(p.numel() for p in module.parameters())
    one = {change.site: 2 for change in made.changes if change.site != "lstm.hh_l0"}
    again = surgery.decompose(back.model, x, ranks=one)
    assert {change.site for change in again.changes} == set(one)
    assert [node.op_type for node in again.model.graph].count("Scan") == 5


PLAIN: dict[str, dict[str, Any]] = {
    "tanh": {},
    "relu": {"nonlinearity": "relu", "bias": False, "num_layers": 2},
    "both": {"bidirectional": True, "batch_first": True},
    "deep": {"bidirectional": True, "num_layers": 2, "nonlinearity": "relu"},
}


class Plain(nn.Module):
    """A plain layer with a name, and both of its outputs."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        self.rnn = nn.RNN(WIDE, H, **said)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, last = self.rnn(x)
        return y, last


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")  # a cache of torch's layers
@pytest.mark.law(2)
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_layer_is_a_node_with_the_sites_of_its_module(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Plain(**PLAIN[name]).eval(), torch.randn(N, T, WIDE)
    program = torch.export.export(module, (x,))
    surgery.export_onnx(program, tmp_path / "m.onnx", x)
    model: Any = surgery.load(tmp_path / "m.onnx")
    assert [node.op_type for node in model.graph].count("RNN") == PLAIN[name].get("num_layers", 1)
    sites = [{site.name: site.macs for site in find_sites(each, x)[0]} for each in (program, model)]
    assert sites[0] == sites[1]
    assert sites[0]
    for found, wanted in zip(outputs(model, x), module(x), strict=True):
        assert relative_error(found, wanted.detach()) <= 1e-5
    ranks: Any = dict.fromkeys(sites[0], 2)
    made = surgery.decompose(program, x, ranks=ranks)
    surgery.export_onnx(made.model, tmp_path / "made.onnx", x)
    exported: Any = surgery.load(tmp_path / "made.onnx")
    factored = surgery.decompose(model, x, ranks=ranks)
    assert [(c.site, c.rank, c.macs) for c in factored.changes] == [(c.site, c.rank, c.macs) for c in made.changes]
    for found, wanted in zip(outputs(factored.model, x), outputs(exported, x), strict=True):
        assert relative_error(found, wanted) <= 1e-5
    assert described(surgery.recompose(factored.model, x).model)[0] == described(model)[0]


STEP = "c = MatMul(a, R)  d = Add(b, c)  e = Tanh(d)  o = Identity(e)"
BODIES: dict[str, tuple[str, bool]] = {  # the nodes of a body that gives e and o, and whether it is a layer's step
    "a layer": (STEP, True),
    "terms turned": ("c = MatMul(a, R)  d = Add(c, b)  e = Tanh(d)  o = Identity(e)", True),
    "a factored one": ("u = MatMul(a, R)  c = MatMul(u, R)  d = Add(b, c)  e = Tanh(d)  o = Identity(e)", True),
    "other rows": ("c = MatMul(a, R)  d = Add(b, c)  e = Tanh(d)  o = Tanh(e)", False),
    "another function": ("c = MatMul(a, R)  d = Add(b, c)  e = Erf(d)  o = Identity(e)", False),
    "a difference": ("c = MatMul(a, R)  d = Sub(b, c)  e = Tanh(d)  o = Identity(e)", False),
    "no part": ("c = MatMul(a, R)  d = Add(a, c)  e = Tanh(d)  o = Identity(e)", False),
    "doubled": (
        "c = MatMul(a, R)  d0 = Add(c, b)  " + "  ".join(f"d{at + 1} = Add(d{at}, d{at})" for at in range(50))
        + "  e = Tanh(d50)  o = Identity(e)",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_scan_is_a_layer_if_it_computes_one(name: str) -> None:
    body, is_layer = BODIES[name]
    text = f"""g (float[t, n, {H}] x, float[n, {H}] s) => (float[t, n, {H}] z) {{
        h, z = Scan<num_scan_inputs = 1, body = step (float[n, {H}] a, float[n, {H}] b) =>
            (float[n, {H}] e, float[n, {H}] o) {{ {body} }}>(s, x) }}"""
    model = parsed(text, R=numbers(H, H))
    x = (torch.randn(T, N, H), torch.randn(N, H))
    sites, skips = find_sites(model, x)
    assert [site.name for site in sites] + [skip.name for skip in skips] == ["R"]
    wanted = [T * N * H * H * body.count("MatMul")] if is_layer else []
    assert [site.macs for site in sites] == wanted
    if wanted:
        made = surgery.decompose(model, x, ranks={"R": 2}).model
        assert_valid(made)
        back = surgery.recompose(made, x).model
        assert relative_error(outputs(back, *x)[0], outputs(made, *x)[0]) <= 1e-5
        assert weights(back) == weights(model)


def test_a_layer_says_why_its_recurrent_weight_is_no_site() -> None:
    reasons = {
        name: find_sites(form(name), torch.randn(T, N, WIDE))[1][0].reason for name in FORMS if name not in OPENED
    }
    assert "reset gate" in reasons["GRU"]
    assert "length" in reasons["LSTM lengths"]
    assert "clips" in reasons["LSTM clip"]


# the node through which a layer reads each of its weights
LIFTED = {"identity": "Identity({})", "unsqueeze": "Unsqueeze({}, axis)", "cast": "Cast <to = 1> ({})"}


@pytest.mark.parametrize(("name", "ways"), [*in_turns([*LIFTED, "constant"], [1, 2]), ("constant", 1), ("cast", 2)])
def test_weights_that_other_nodes_hold_move_or_convert(name: str, ways: int) -> None:
    """They are sites as if they were initializers, and recompose gives back the nodes through which they are read."""
    ways = 1 if name == "unsqueeze" else ways  # of both directions, no axis is missing
    dtype = np.float16 if name == "cast" else np.float32
    shapes = {"W": (ways, 4 * H, WIDE), "R": (ways, 4 * H, H), "B": (ways, 8 * H)}
    arrays = {key: numbers(*shape, seed=at, dtype=dtype) for at, (key, shape) in enumerate(shapes.items())}
    said = "  ".join(f"{key}_read = {LIFTED.get(name, 'Identity({})').format(key)}" for key in arrays)
    if name == "unsqueeze":
        arrays = {key: array[0] for key, array in arrays.items()} | {"axis": np.array([0])}
    way = 'direction = "bidirectional",' if ways == 2 else ""
    node = f"LSTM <{way} hidden_size = {H}> (x, W_read, R_read, B_read)"
    text = f"g (float[t, n, {WIDE}] x) => (float[t, d, n, {H}] z) {{ {said}  z = {node} }}"
    model, x = parsed(text, **arrays), torch.randn(T, N, WIDE)
    if name == "constant":
        model = _with_constants(model)
    names = [f"{weight}{end}" for end in ("", "_reverse")[:ways] for weight in "WR"]
    sites, skips = find_sites(model, x)
    assert ([site.name for site in sites], skips) == (names, ())
    assert ir.to_proto(surgery.decompose(model, x, ranks={}).model) == ir.to_proto(model)
    before, allowed = outputs(model, x)[0], 2e-3 if dtype == np.float16 else 1e-5
    full = surgery.decompose(model, x, ranks="full").model
    assert relative_error(outputs(full, x)[0], before) <= 1e-5
    for some in (["W"], ["R"], names):
        made = surgery.decompose(model, x, ranks=dict.fromkeys(some, 2)).model
        assert_valid(made)
        back = surgery.recompose(made, x).model
        assert_valid(back)
        assert relative_error(outputs(back, x)[0], outputs(made, x)[0]) <= allowed
        assert weights(back) == weights(model)
        again, wanted = described(back), described(model)
        assert (again[1], again[2]) == (wanted[1], wanted[2]) or name != "constant"
        assert sorted(map(_without_numbers, again[0])) == sorted(map(_without_numbers, wanted[0]))


def _without_numbers(said: bytes) -> bytes:
    node = onnx.NodeProto.FromString(said)
    for attribute in node.attribute:
        attribute.t.ClearField("raw_data")
    return node.SerializeToString(deterministic=True)


def _with_constants(model: ir.Model) -> ir.Model:
    proto = ir.to_proto(model)
    for tensor in list(proto.graph.initializer):
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        proto.graph.node.insert(0, node)
        proto.graph.initializer.remove(tensor)
    return ir.serde.deserialize_model(proto)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("float[1, 10] B", "its bias is an input of the model"),
        ("B = Neg(b)", "its bias is computed by Neg"),
        ("N = Neg(b)  B = Identity(N)", "its bias is computed by Neg"),
        ("S = Neg(R)", "its recurrent weight is also read by Neg"),
        ("Q = Identity(R)  S = Neg(Q)", "its recurrent weight is also read by Neg"),
        ("R = Neg(r)", "its recurrent weight is computed by Neg"),
    ],
)
@pytest.mark.parametrize("ways", [1, 2])
def test_a_layer_says_which_of_its_weights_is_in_the_way(said: str, reason: str, ways: int) -> None:
    given = "float" in said
    way = 'direction = "bidirectional",' if ways == 2 else ""
    head = (
        f"g (float[t, n, {WIDE}] x{', ' + said.replace('1', str(ways), 1) if given else ''}) => (float[t, d, n, {H}] z)"
    )
    recurrent = "Q" if "Q" in said else "R"
    text = f"{head} {{ {'' if given else said}  z = RNN <{way} hidden_size = {H}> (x, W, {recurrent}, B) }}"
    arrays = {
        "W": numbers(ways, H, WIDE),
        "R": numbers(ways, H, H),
        "B": numbers(ways, 2 * H),
        "r": numbers(ways, H, H),
    }
    arrays |= {"b": numbers(ways, 2 * H)}
    made_here = "B" if given or "B =" in said else "R" if "R =" in said else ""
    model = parsed(text, **{key: array for key, array in arrays.items() if key != made_here})
    x = (torch.randn(T, N, WIDE), *([torch.randn(ways, 2 * H)] if given else []))
    reasons = [skip.reason for skip in find_sites(model, x)[1] if "loop" in skip.reason]
    assert len(reasons) == 1
    assert reasons[0].endswith(reason)


def test_the_name_of_the_other_direction_may_be_taken() -> None:
    text = f"""g (float[t, n, {WIDE}] x) => (float[t, d, n, {H}] z, float[t, n, {WIDE}] W_reverse) {{
        z = RNN <direction = "bidirectional", hidden_size = {H}> (x, W, R)  W_reverse = Relu(x) }}"""
    model, x = parsed(text, W=numbers(2, H, WIDE), R=numbers(2, H, H)), torch.randn(T, N, WIDE)
    assert [site.name for site in find_sites(model, x)[0]] == ["W", "R", "W_reverse_1", "R_reverse"]
    made = surgery.decompose(model, x, ranks="2").model
    assert_valid(made)
    back = surgery.recompose(made, x).model
    assert described(back)[0] == described(model)[0]
    assert weights(back) == weights(model)


def test_an_input_weight_without_numbers_is_told() -> None:
    text = f"""g (float[t, n, {WIDE}] x, float[1, {H}, {WIDE}] W) => (float[t, d, n, {H}] z) {{
        z = RNN <hidden_size = {H}> (x, W, R) }}"""
    _, skips = find_sites(parsed(text, R=numbers(1, H, H)), (torch.randn(T, N, WIDE), torch.randn(1, H, WIDE)))
    assert [skip.name for skip in skips] == ["z", "R"]
    assert all("input weight is an input of the model" in skip.reason for skip in skips)


def test_tables_that_are_added_or_stand_beside_are_no_weights() -> None:
    text = f"""g (float[n, {WIDE}] x) => (float[m, {WIDE}] z) {{
        y = Add(x, A)  u = Mul(A, y)  z = Concat <axis = 0> (u, A) }}"""
    assert find_sites(parsed(text, A=numbers(N, WIDE)), torch.randn(N, WIDE)) == ((), ())


def test_bisect_tells_the_directions_and_both_weights_apart() -> None:
    model, x = form("LSTM"), torch.randn(T, N, WIDE)
    wanted = outputs(model, x)[0]

    def metric(run: Any) -> float:
        return -float((run(x)[0] - wanted).norm())

    ranks: dict[str, Any] = {"W": 2, "R": 1, "W_reverse": 3, "R_reverse": 2}
    made = surgery.decompose(model, x, ranks=ranks).model
    found = surgery.bisect(model, made, x, metric=metric, least=0.0)
    assert not found.skips
    for site in ranks:
        without = surgery.decompose(model, x, ranks={**ranks, site: None}).model
        gain = -float((outputs(without, x)[0] - wanted).norm() - (outputs(made, x)[0] - wanted).norm())
        alone = [blame.gain for blame in found.blames if blame.sites == (site,)]
        assert alone == [pytest.approx(gain, abs=1e-4)]


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_an_empty_batch_is_refused(op: str) -> None:
    """Before onnxruntime runs it, as that ends the whole process; the sequences of an LSTM may be empty."""
    model = layer(op, ", linear_before_reset = 1" if op == "GRU" else "")
    message = f"{op} rnn reads an empty value"
    with pytest.raises(surgery.InputError, match=message):
        surgery.compare(model, model, torch.zeros(T, 0, WIDE))
    with pytest.raises(surgery.InputError, match=message):
        surgery.bench([model, model], torch.zeros(T, 0, WIDE), seconds=0.1)
    if op == "GRU":
        with pytest.raises(surgery.InputError, match=message):
            surgery.compare(model, model, torch.zeros(0, N, WIDE))
        return
    assert surgery.compare(model, model, torch.zeros(0, N, WIDE)).outputs[0].shape == (0, 2, N, H)
    assert {skip.reason for skip in find_sites(model, torch.zeros(0, N, WIDE))[1]} == {
        "it is called on an empty input", "its loop has no steps on the example inputs",
    }  # fmt: skip
