"""Flows that are written down by hand: what is found in them, and what is one operator. No framework is needed."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.algebra import Chain, Conv, Geometry, Linear, Shift
from surgery.factorizations import FACTORIZATIONS
from surgery.sites import (
    Activation,
    BatchNorm,
    Call,
    Element,
    FactoredSite,
    Flow,
    FusableChain,
    Left,
    Other,
    Reshape,
    Skip,
    Sum,
    Tensors,
)
from surgery.sites.find import find
from surgery.sites.fusable import fusable

ROOT = Path(surgery.__file__).parent
WIDTH = 6


def linear(seed: int, rows: int = WIDTH, columns: int = WIDTH) -> Linear:
    return Linear(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def flow(
    elements: Sequence[Element],
    reads: Mapping[int, Sequence[int]],
    *,
    ties: Mapping[str, str] | None = None,
    uses: Mapping[str, Sequence[int]] | None = None,
    left: Sequence[Left] = (),
    origins: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
) -> Flow:
    """A flow of these elements; ``reads`` says from which values each is computed, ``ties`` which weights are one."""
    calls = [element for element in elements if isinstance(element, Call)]
    names = dict.fromkeys(call.weight for call in calls)
    keys = {name: (ties or {}).get(name, name) for name in names}
    readers: dict[str, set[int]] = {key: set() for key in keys.values()}
    for call in calls:
        readers[keys[call.weight]].add(call.user)
    for name, values in (uses or {}).items():
        readers[keys[name]].update(values)
    users: dict[int, set[int]] = {element.value: set() for element in elements}
    for value, sources in reads.items():
        for source in sources:
            users[source].add(value)
    shapes = {element.value: (4, WIDTH) for element in elements}
    return Flow(
        tuple(elements),
        {value: frozenset(own) for value, own in users.items()},
        Tensors(keys, dict.fromkeys(names, WIDTH * WIDTH), {key: frozenset(own) for key, own in readers.items()}),
        shapes,
        shapes,
        macs=dict.fromkeys(shapes, 7),
        labels={value: f"v{value}" for value in shapes},
        left=tuple(left),
        origins=origins or {},
        recorded=frozenset(origins or {}),
    )


def call(value: int, source: int, weight: str, operator: Linear | None = None) -> Call:
    return Call(value, source, operator or linear(value), weight)


def test_a_tied_weight_is_one_site_with_the_shapes_of_all_its_calls() -> None:
    shared = linear(0)
    elements: list[Element] = [Other(0), call(1, 0, "a.weight", shared), Other(2), call(3, 2, "b.weight", shared)]
    found = find(flow(elements, {1: [0], 2: [1], 3: [2]}, ties={"b.weight": "a.weight"}))
    [placement] = found.placements
    assert (placement.site.name, placement.site.aliases) == ("a", ("b",))
    assert [each.value for each in placement.calls] == [1, 3]
    assert placement.site.macs == 2 * 4 * WIDTH * WIDTH
    assert found.totals.parameters == WIDTH * WIDTH


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    found = find(flow([Other(0), call(1, 0, "a.weight"), Other(2)], {1: [0], 2: [1]}, uses={"a.weight": [2]}))
    assert not found.placements
    assert [skip.reason for skip in found.skips] == ["its weight is also used by v2"]


def test_what_a_kind_leaves_alone_is_counted_once() -> None:
    skip = Skip("odd", "einsum", "it is odd")
    found = find(flow([Other(0), Other(1), Other(2)], {1: [0], 2: [1]}, left=[Left(skip, (1, 2))]))
    assert [(each.name, each.macs) for each in found.skips] == [("odd", 14)]
    assert found.totals.macs == 14


@pytest.mark.parametrize("others", [0, 1])
def test_an_epilogue_has_no_other_reader(others: int) -> None:
    elements: list[Element] = [Other(0), call(1, 0, "a.weight"), Other(2, BatchNorm()), Other(3, Activation("Relu"))]
    elements += [Other(4)] * others
    reads = {1: [0], 2: [1], 3: [2]} | ({4: [1]} if others else {})
    [placement] = find(flow(elements, reads)).placements
    assert placement.site.epilogue == (() if others else (BatchNorm(), Activation("Relu")))


def test_a_value_that_is_read_twice_ends_a_chain() -> None:
    elements: list[Element] = [
        Other(0),
        call(1, 0, "a.weight"),
        call(2, 1, "b.weight"),
        call(3, 2, "c.weight"),
        Other(4),
    ]
    chains, _ = fusable(flow(elements, {1: [0], 2: [1], 3: [2], 4: [1]}))
    [chain] = chains
    assert chain.weights == ("b.weight", "c.weight")


def test_chains_over_the_same_weights_are_fused_together_or_not_at_all() -> None:
    a, b = linear(1), linear(2)
    elements: list[Element] = [Other(0), call(1, 0, "a.weight", a), call(2, 1, "b.weight", b)]
    elements += [Other(3), call(4, 3, "a.weight", a), call(5, 4, "b.weight", b)]
    reads = {1: [0], 2: [1], 3: [2], 4: [3], 5: [4]}
    [chain], _ = fusable(flow(elements, reads))
    assert isinstance(chain, FusableChain)
    assert len(chain.rows) == 2


def test_branches_of_a_factored_site_are_one_operator_and_those_of_a_model_are_not() -> None:
    names = [f"p.0.{row}.0.weight" for row in (0, 1)]
    elements: list[Element] = [
        Other(0),
        call(1, 0, names[0]),
        call(2, 0, names[1]),
        Sum(3, (1, 2)),
        call(4, 3, "p.1.weight"),
    ]
    reads = {1: [0], 2: [0], 3: [1, 2], 4: [3]}
    [chain], _ = fusable(flow(elements, reads))
    expected = (elements[1].operator.weight + elements[2].operator.weight).T @ elements[4].operator.weight.T
    assert torch.allclose(chain.operators[0].weight, expected.T, atol=1e-5)
    heads: list[Element] = [
        Other(0),
        call(1, 0, "left.weight"),
        call(2, 0, "right.weight"),
        Sum(3, (1, 2)),
        call(4, 3, "p.weight"),
    ]
    assert fusable(flow(heads, reads)) == ([], [])


def test_a_chain_of_known_origin_is_a_site_that_can_be_cut() -> None:
    chain = FACTORIZATIONS["svd"].factor(linear(3), (2,))
    assert isinstance(chain, Chain)
    first, second = chain.operators
    elements: list[Element] = [Other(0), Call(1, 0, first, "p.0.weight"), Call(2, 1, second, "p.1.weight")]
    reads = {1: [0], 2: [1]}
    [placement] = find(flow(elements, reads, origins={"p": ("svd", (2,))})).placements
    assert isinstance(placement.site, FactoredSite)
    assert placement.site.made_by == ("svd", (2,))
    others = find(flow(elements, reads, origins={"p": ("svd", (3,))}))  # the record says something else
    assert not others.placements
    assert all("cannot be cut as it stands" in skip.reason for skip in others.skips)


@given(st.lists(st.sampled_from(["call", "shift", "other"]), min_size=1, max_size=9))
def test_rows_of_calls_compose_to_what_they_compute(kinds: list[str]) -> None:
    """Whatever stands in a row, each chain is as long as it can be and computes what its parts compute."""
    elements: list[Element] = [Other(0)]
    for value, kind in enumerate(kinds, 1):
        bias = torch.full((WIDTH,), float(value))
        made: dict[str, Element] = {
            "call": call(value, value - 1, f"w{value}.weight"),
            "shift": Reshape(value, value - 1, Shift(bias), bias=f"s{value}.bias"),
            "other": Other(value),
        }
        elements.append(made[kind])
    chains, _ = fusable(flow(elements, {value: [value - 1] for value in range(1, len(elements))}))
    x = torch.eye(WIDTH).double()
    for chain in chains:
        assert isinstance(chain, FusableChain)
        [row] = chain.rows
        y = x
        for part in row:
            y = part.step.to(dtype=torch.float64)(y)
        assert torch.allclose(chain.operators[0].to(dtype=torch.float64)(x), y, rtol=1e-4, atol=1e-4)
    stretches = "".join(kind[0] for kind in kinds).split("o")
    assert len(chains) == sum(stretch.count("c") > 1 for stretch in stretches)


def test_a_padded_convolution_behind_a_bias_is_refused() -> None:
    def conv(bias: bool) -> Conv:
        geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), (0, 0))
        return Conv(torch.ones(2, 2, 3, 3), geometry, bias=torch.ones(2) if bias else None)

    elements: list[Element] = [
        Other(0),
        Call(1, 0, conv(True), "a.weight", "a.bias"),
        Call(2, 1, conv(False), "b.weight"),
    ]
    chains, skips = fusable(flow(elements, {1: [0], 2: [1]}))
    assert not chains
    assert [skip.name for skip in skips] == ["a -> b"]


FRAMEWORKS = ("torch.fx", "torch.export", "onnx", "onnxruntime", "onnx_ir")
FREE = ("algebra", "solvers", "factorizations", "sites", "data", "plans", "passes", "training")


@pytest.mark.parametrize("room", FREE)
def test_frameworks_stop_at_the_kinds(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            known = [
                name for name in names if name in FRAMEWORKS or name.startswith(tuple(f"{f}." for f in FRAMEWORKS))
            ]
            assert not known, f"{path.relative_to(ROOT)} imports {known[0]}"


def test_only_the_registry_asks_of_what_class_a_model_is() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            if asks and isinstance(node, ast.Call):
                assert "ExportedProgram" not in ast.unparse(node.args[1]), path


def test_a_factor_of_a_site_that_cannot_be_cut_is_no_site_of_its_own() -> None:
    """Factors that two sites share, and chains of which nothing says how they were made, are recomposed first."""
    shared = linear(1)
    elements: list[Element] = [Other(0), call(1, 0, "p.0.weight", shared), call(2, 1, "p.1.weight")]
    elements += [call(3, 0, "q.0.weight", shared), call(4, 3, "q.1.weight")]
    reads = {1: [0], 2: [1], 3: [0], 4: [3]}
    made = {"p": ("svd", (WIDTH,)), "q": ("svd", (WIDTH,))}
    found = find(flow(elements, reads, ties={"q.0.weight": "p.0.weight"}, origins=made))
    assert not found.placements
    assert {skip.name for skip in found.skips} == {"p.0", "p.1", "q.1"}
    assert any("p and q share" in skip.reason for skip in found.skips)
