"""Sizes of ONNX graphs that vary stay so: chains with reshapes run at other sizes than those of the example."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from tests.test_onnx import assert_valid, numbers, outputs, parsed, weights

TEXTS = {
    "conv1d": "g (float[n, 6, l] x) => (float[n, 8, k] z) { z = Conv <pads = [1, 1], strides = [2]> (x, W, b) }",
    "conv2d": "g (float[n, 6, h, w] x) => (float[n, 8, k, m] z) { z = Conv <pads = [1, 1, 1, 1]> (x, W, b) }",
    "upward": "g (float[n, 8, h, w] x) => (float[n, 6, k, m] z) { z = ConvTranspose <strides = [2, 2]> (x, W, c) }",
    "linear": "g (float[n, t, 6] x) => (float[n, t, 8] z) { y = MatMul(x, W)  z = Add(y, b) }",
}
WEIGHTS = {"conv1d": (8, 6, 3), "conv2d": (8, 6, 3, 3), "upward": (8, 6, 3, 3), "linear": (6, 8)}
SIZES: dict[str, list[tuple[int, ...]]] = {
    "conv1d": [(2, 6, 7), (1, 6, 12), (0, 6, 9)],
    "conv2d": [(2, 6, 8, 8), (2, 6, 5, 10), (3, 6, 11, 4), (0, 6, 5, 7)],
    "upward": [(2, 8, 4, 4), (1, 8, 3, 6)],
    "linear": [(2, 5, 6), (3, 4, 6), (1, 1, 6)],
}

PAIRS = [(name, method) for name in TEXTS for method in ("cp", "tt", "tr") if (name, method) != ("linear", "cp")]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def made(name: str, *, opset: int = 17) -> ir.Model:
    arrays = {"W": numbers(*WEIGHTS[name]), "b": numbers(8, seed=1), "c": numbers(6, seed=1)}
    read = {key: array for key, array in arrays.items() if re.search(rf"[ (]{key}[,)]", TEXTS[name])}
    return parsed(TEXTS[name], opset=opset, **read)


def node_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_same(first: ir.Model, second: ir.Model, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    [a], [b] = outputs(first, x), outputs(second, x)
    assert a.shape == b.shape
    assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize(("name", "method"), PAIRS)
@pytest.mark.parametrize("opset", [7, 13, 23])
def test_sizes_that_vary_stay_so(name: str, method: str, opset: int) -> None:
    model, example = made(name, opset=opset), SIZES[name][0]
    for ranks in ("full", "2"):
        result = surgery.decompose(model, random(*example), ranks=ranks, factorization=method)
        assert len(result.changes) == 1
        assert_valid(result.model)
        back = surgery.recompose(result.model, random(*example))
        assert_valid(back.model)
        assert weights(back.model) == weights(model)
        assert node_types(back.model) == node_types(model)
        assert set(back.model.graph.initializers) == set(model.graph.initializers)
        for shape in SIZES[name]:
            assert_same(back.model, result.model, shape)
            if ranks == "full" and method != "cp":
                assert_same(result.model, model, shape)


def ring() -> ir.Model:
    result = surgery.decompose(made("conv2d"), random(*SIZES["conv2d"][0]), ranks="2", factorization="tr")
    reshapes = ["Unsqueeze", "Reshape", "Conv", "Reshape", "Squeeze"]
    assert node_types(result.model) == ["Conv", *reshapes, "Conv"]
    return result.model


def said_otherwise(model: ir.Model, words: str) -> None:
    next(node for node in model.graph if node.op_type == "Squeeze").metadata_props["surgery"] = words


def read_by_another(model: ir.Model) -> None:
    [middle] = next(node for node in model.graph if node.op_type == "Unsqueeze").outputs
    assert middle.name is not None
    model.graph.outputs.append(middle)


def without_the_first(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "Unsqueeze").metadata_props.clear()


WORDS = ("", "flatten -4 -3", "last of two: flatten -4 x", "last of two: unflatten -3 2 2", "unflatten")
CHANGES: list[Callable[[ir.Model], None]] = [
    *(
        partial(said_otherwise, words=words)
        for words in ("", "flatten -4 -3", "last of two: flatten -4 x", "unflatten")
    ),
    read_by_another,
    without_the_first,
]


@pytest.mark.parametrize("change", CHANGES)
def test_two_nodes_that_are_no_reshape_any_more_stay(change: Callable[[ir.Model], None]) -> None:
    model = ring()
    change(model)
    back = surgery.recompose(model)
    assert not back.changes
    assert [skip.name for skip in back.skips] == ["W"]
    assert node_types(back.model) == node_types(model)


def test_a_reshape_of_earlier_files_is_one_node() -> None:
    model = ring()
    unsqueeze, reshape, *_ = [node for node in model.graph if node.op_type in ("Unsqueeze", "Reshape")]
    sizes = ir.Value(name="sizes", const_value=ir.tensor(np.array([0, 2, 2, 8, 8], dtype=np.int64), name="sizes"))
    model.graph.register_initializer(sizes)
    reshape.replace_input_with(0, unsqueeze.inputs[0])
    reshape.replace_input_with(1, sizes)
    reshape.metadata_props["surgery"] = reshape.metadata_props["surgery"].removeprefix("last of two: ")
    model.graph.remove(unsqueeze, safe=True)
    back = surgery.recompose(model)
    assert node_types(back.model) == ["Conv"]
    assert_same(back.model, model, SIZES["conv2d"][0])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.parametrize("method", ["tt", "tr"])
def test_a_program_with_sizes_that_vary_is_exported_and_told(method: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3)).eval()
    x, size = random(2, 6, 8, 12), torch.export.Dim
    sizes = ({0: size("n"), 2: size("h", min=4), 3: size("w", min=4)},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes)
    factored = surgery.decompose(program, ranks="2", factorization=method)
    assert [change.site for change in factored.changes] == ["0", "2"]
    path = tmp_path / "model.onnx"
    surgery.export_onnx(factored.model, path)
    exported: Any = surgery.load(path)
    back = surgery.recompose(exported)
    assert sorted([*(fusion.site for fusion in back.changes), *(skip.name for skip in back.skips)]) == ["0", "2"]
    for shape in ((2, 6, 8, 12), (3, 6, 5, 9)):
        [expected] = outputs(exported, random(*shape))
        assert relative_error(factored.model.module()(random(*shape)), expected) <= 1e-5
        assert_same(back.model, exported, shape)
