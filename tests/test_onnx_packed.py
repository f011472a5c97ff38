"""Packed projections of attention in ONNX files: three sites, which come back as the one weight that they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import surgery
from surgery.algebra import relative_error
from surgery.passes.preview import find_sites
from tests.test_onnx import X, assert_valid, numbers, outputs, parsed

NAME = "a.in_proj_weight"
PARTS = ["a.in_proj_q", "a.in_proj_k", "a.in_proj_v"]
HEAD = "g (float[n, 8] x) => (float[n, 6] z) "
TAIL = "r = Relu(y)  z = MatMul(r, B)"
# what stands before r, and the shape of the packed weight
FORMS: dict[str, tuple[str, tuple[int, int]]] = {
    "matmul": ("y = MatMul(x, W)", (8, 12)),
    "add": ("t = MatMul(x, W)  y = Add(t, p)", (8, 12)),
    "bias-first": ("t = MatMul(x, W)  y = Add(p, t)", (8, 12)),
    "transpose": ("V = Transpose<perm = [1, 0]>(W)  t = MatMul(x, V)  y = Add(t, p)", (12, 8)),
    "cast": ("C = Cast<to = 1>(W)  V = Transpose(C)  t = MatMul(x, V)  y = Add(t, p)", (12, 8)),
    "gemm": ("y = Gemm<transB = 1, alpha = 1.0>(x, W, p)", (12, 8)),
    "gemm-turned": ("y = Gemm(x, W)", (8, 12)),
}


def packed(said: str, shape: tuple[int, ...], *, opset: int = 17, inner: bool = True) -> ir.Model:
    arrays: dict[str, Any] = {NAME: numbers(*shape), "p": numbers(12, seed=1), "B": numbers(12, 6, seed=2)}
    arrays[NAME] = arrays[NAME].astype(np.float16 if "Cast" in said else np.float32)
    arrays = {name: array for name, array in arrays.items() if f"{name})" in said or f"({name}" in said or name != "p"}
    text = f"{HEAD} {{ {said}  {TAIL} }}".replace("W", f'"{NAME}"')
    return parsed(text, opset=opset, **arrays)


def described(model: ir.Model) -> Any:
    """Return the nodes of a model in any order, its initializers, and its metadata."""
    proto = ir.to_proto(model)
    nodes = sorted(node.SerializeToString(deterministic=True) for node in proto.graph.node)
    return nodes, [tensor.SerializeToString() for tensor in proto.graph.initializer], proto.metadata_props


@pytest.mark.parametrize("name", FORMS)
def test_a_packed_weight_is_three_sites_and_comes_back(name: str) -> None:
    model = packed(*FORMS[name])
    before, allowed = outputs(model, X)[0], 1e-3 if name == "cast" else 1e-5  # parts are rounded to float16
    assert [site.name for site in find_sites(model, X)[0]] == [*PARTS, "B"]
    for ranks in ({"B": 2}, {PARTS[0]: 2}, {PARTS[2]: 3, "B": 2}, dict.fromkeys(PARTS, 2)):
        made = surgery.decompose(model, X, ranks=ranks)
        assert_valid(made.model)
        assert [change.site for change in made.changes] == list(ranks)
        assert (NAME in made.model.graph.initializers) is (list(ranks) == ["B"])
        back = surgery.recompose(made.model, X)
        assert relative_error(outputs(back.model, X)[0], outputs(made.model, X)[0]) <= allowed
        shapes = {key: value.shape for key, value in model.graph.initializers.items()}
        assert {key: value.shape for key, value in back.model.graph.initializers.items()} == shapes
        assert [(n.op_type, n.name) for n in back.model.graph] == [(n.op_type, n.name) for n in model.graph]
        full = surgery.decompose(model, X, ranks={site: 6 if site == "B" else 4 for site in ranks})
        assert relative_error(outputs(full.model, X)[0], before) <= allowed
    assert described(surgery.recompose(model, X).model) == described(model)
    only_last = surgery.decompose(model, X, ranks={"B": 2}).model
    assert [node for node in described(only_last)[0] if node in described(model)[0]] == sorted(
        node.SerializeToString(deterministic=True) for node in ir.to_proto(model).graph.node[:-1]
    )


LEFT: dict[str, Any] = {
    "read twice": (packed("a = MatMul(x, W)  b = MatMul(x, W)  y = Add(a, b)", (8, 12)), [NAME, "B"]),
    "not three": (parsed(f'{HEAD} {{ z = MatMul(x, "{NAME}") }}', **{NAME: numbers(8, 7)}), [NAME]),
    "an old opset": (packed(*FORMS["add"], opset=10), [NAME, "B"]),
    "names are taken": (
        parsed(
            f'{HEAD} {{ y = MatMul(x, "{NAME}")  s = ReduceSum<keepdims = 0>("a.in_proj_k.weight")  t = Mul(y, s)'
            "  z = MatMul(t, B) }",
            **{NAME: numbers(8, 12), "a.in_proj_k.weight": numbers(3), "B": numbers(12, 6)},
        ),
        [NAME, "B"],
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_packed_weights_stay_one_site(name: str) -> None:
    model, sites = LEFT[name]
    assert [site.name for site in find_sites(model, X)[0]] == sites


def test_joint_parts_share_a_factor_and_come_back() -> None:
    model = packed(*FORMS["add"])
    made = surgery.decompose(model, X, ranks=dict.fromkeys(PARTS, 3), joint="inputs")
    assert_valid(made.model)
    back = surgery.recompose(made.model, X)
    assert list(back.model.graph.initializers) == list(model.graph.initializers)
    assert relative_error(outputs(back.model, X)[0], outputs(made.model, X)[0]) <= 1e-5


def test_calibration_sees_the_parts() -> None:
    model = packed(*FORMS["add"])
    torch.manual_seed(0)
    made = surgery.decompose(model, X, ranks=dict.fromkeys(PARTS, 2), calibration=torch.randn(32, 8))
    assert [change.site for change in made.changes] == PARTS
    back = surgery.recompose(made.model, X).model
    assert [(node.op_type, node.name) for node in back.graph] == [(node.op_type, node.name) for node in model.graph]
