"""Split, save, load and join: nothing is lost on the way, nothing is half written, and no folder is trusted."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import surgery
from surgery.errors import FileError, InputError, SurgeryError
from surgery.report import render_split
from surgery.sites.network import Network, Operation, Value
from surgery.stages.folder import read_folder, read_report
from surgery.stages.manifest import MANIFEST, read_manifest
from surgery.stages.named import stages_at
from surgery.stages.report import Crossing, SplitReport
from surgery.stages.strip import strip_of
from surgery.system.writing import write_folder
from tests.command_line import run
from tests.hostile.manifests import FOLDERS
from tests.zoo import Inputs, call, export, graph

# -- networks without a framework ---------------------------------------------------------------------------------------


def network(reads: list[list[int]], *, groups: tuple[frozenset[int], ...] = ()) -> Network:
    """Operation ``n`` gives value ``n + 1`` and reads values; value 0 is the input."""
    operations = [
        Operation(f"op{n}", "k", tuple(each), (n + 1,), (f"block{n // 2}.layer{n}.weight",) if n % 2 == 0 else ())
        for n, each in enumerate(reads)
    ]
    values = [Value("x", 4), *(Value(f"v{n}", 8 * (n + 1)) for n in range(len(reads)))]
    return Network(tuple(operations), tuple(values), (0,), (len(reads),), together=groups)


CHAIN = network([[0], [1], [2], [3]])
RESIDUAL = network([[0], [1], [2, 1], [3]])


@pytest.mark.parametrize(
    ("net", "cuts", "stages"),
    [
        (CHAIN, ["v1"], (0, 0, 1, 1)),
        (CHAIN, ["v2", "v0"], (0, 1, 1, 2)),
        (RESIDUAL, ["v2"], (0, 0, 0, 1)),
        (RESIDUAL, ["v0"], (0, 1, 1, 1)),
        (RESIDUAL, ["v0", "v1"], (0, 1, 2, 2)),
        (network([[0], [0], [1, 2]]), ["v0", "v1"], (0, 0, 1)),
    ],
)
def test_named_values_alone_cross(net: Network, cuts: list[str], stages: tuple[int, ...]) -> None:
    assert stages_at(net, cuts) == stages


@pytest.mark.parametrize(
    ("net", "cuts", "said"),
    [
        (RESIDUAL, ["v1"], "'v1' does not separate the graph: v0 would cross"),
        (network([[0], [1], [2]], groups=(frozenset({0, 2}),)), ["v1"], "does not separate"),
        (CHAIN, ["v3"], "no two operations share it.*allowed: .*v1"),
        (CHAIN, ["x"], "no two operations share it"),
        (CHAIN, ["nothing"], "no value of this name"),
        (CHAIN, ["v1", "v1"], "two cuts at 'v1'"),
    ],
)
def test_cuts_that_do_not_separate_are_refused(net: Network, cuts: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        stages_at(net, cuts)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    count = draw(st.integers(2, 12))
    reads = [draw(st.lists(st.integers(0, n), min_size=1, max_size=3, unique=True)) for n in range(count)]
    return network(reads)


@given(networks(), st.data())
def test_stages_at_named_values_keep_their_promise(net: Network, data: st.DataObject) -> None:
    inner = [net.values[value].name for value in net.readers if value in net.producer]
    cuts = data.draw(st.lists(st.sampled_from(inner), min_size=1, unique=True)) if inner else ["x"]
    try:
        stages = stages_at(net, cuts)
    except InputError:
        return
    crossing = set()
    for value, readers in net.readers.items():
        for reader in readers:
            if value in net.producer and stages[reader] != stages[net.producer[value]]:
                assert stages[reader] > stages[net.producer[value]]
                crossing.add(net.values[value].name)
    assert crossing == set(cuts)
    assert set(stages) == set(range(max(stages) + 1))


def test_a_strip_has_the_time_of_all_and_the_bytes_that_cross() -> None:
    layers = strip_of(RESIDUAL, (0, 0, 0, 1), [1.0, 2.0, 3.0, 4.0])
    assert [(layer.name, layer.stage, layer.seconds, layer.bytes_after) for layer in layers] == [
        ("block0.layer0", 0, 3.0, 24),  # v0 and v1
        ("block1.layer2", 0, 3.0, 24),  # v2
        ("op3", 1, 4.0, 0),
    ]


# -- models -------------------------------------------------------------------------------------------------------------

CASES = [
    *(("unet", kind) for kind in ("module", "graph", "program", "program-dynamic", "onnx")),
    ("tied", "module"),
    ("tied", "program"),
    ("called-twice", "program-dynamic"),
    ("two-names", "graph"),
    ("recurrent", "program"),
    ("attention", "module"),
    ("hf-bert", "program"),
    ("hf-swin", "module"),
    ("resnet-basic", "onnx"),
]


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def made(name: str) -> Path:
        path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
        program, inputs = graph(name, "program")
        surgery.export_onnx(program, path, inputs)
        return path

    return made


def _opened(name: str, kind: str, onnx_files: Callable[[str], Path]) -> tuple[Any, Inputs]:
    return (surgery.load(onnx_files(name)), graph(name, "program")[1]) if kind == "onnx" else graph(name, kind)


def _called(model: Any, inputs: Inputs) -> Any:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    if isinstance(model, surgery.Split):
        return model.run(*args, **kwargs)
    return surgery.runtime.compare.run_model(model, (args, kwargs))


def _equal(a: Any, b: Any) -> bool:
    mine, other = pytree.tree_leaves(a), pytree.tree_leaves(b)
    pairs = zip(mine, other, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _state(model: Any) -> dict[str, Tensor]:
    return dict(surgery.kinds.registry.kind_of(model).tensors(model))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_split_save_load_join_is_the_identity(
    name: str, kind: str, tmp_path: Path, onnx_files: Callable[[str], Path]
) -> None:
    model, inputs = _opened(name, kind, onnx_files)
    cut = surgery.split(model, inputs, stages=3 if name == "unet" else 2, measure=False)
    assert [type(stage) for stage in cut.stages] == [type(cut.stages[0])] * len(cut.stages)
    expected = _called(model, inputs)
    with torch.no_grad():
        assert _equal(_called(cut, inputs), expected)
    cut.save(tmp_path / "stages")
    back = surgery.load_split(tmp_path / "stages")
    assert back.report == cut.report
    with torch.no_grad():
        assert _equal(_called(back, inputs), expected)
    joined = surgery.join(tmp_path / "stages")
    state = _state(joined)
    original = _state(model)
    assert list(state) == list(original)
    assert all(torch.equal(state[key], tensor) for key, tensor in original.items())
    assert _equal(_called(joined, inputs), expected)
    if isinstance(model, ExportedProgram):
        assert str(joined.graph) == str(model.graph)
        assert joined.range_constraints == model.range_constraints
