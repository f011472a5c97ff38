"""Stages that run: the seconds of operations, pipelines in threads, and stages in processes that talk to each other."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import Tensor, nn

from surgery.cost.base import ModelFile, NodeTimes, make_backend
from surgery.cost.cache import Cache
from surgery.errors import InputError
from surgery.files.load import load
from surgery.kinds.base import Kind, Pieces
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import kind_of
from surgery.runtime.written import write_with_origins
from surgery.sites.network import Network, Operation, Value
from surgery.stages.bench import bench_pipeline
from surgery.stages.costs import attribute, measure_operations, roofline
from surgery.stages.distributed import pipeline_modules, pipeline_stages
from surgery.stages.exported import measure_stages
from surgery.stages.pipeline import Pipeline
from surgery.stages.split import load_split, split
from surgery.system.machine import usable_cores
from tests.gloo_stages import Net, work
from tests.test_backends import ByParameters
from tests.two_processes import WORLD, together, two_processes


class Small(nn.Module):
    """A convolution with what is fused into it, a branch, and a linear layer that is decomposed at export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        y = (y + y.sigmoid()).flatten(2).transpose(1, 2).contiguous()
        return self.fc(y).mean(1)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Small().eval(), torch.randn(2, 3, 8, 8)


class Networks:
    """Strategies for networks and for the seconds of some of their values."""

    @staticmethod
    @st.composite
    def timed(draw: st.DrawFn) -> tuple[Network, NodeTimes]:
        count = draw(st.integers(1, 12))
        operations = []
        for number in range(count):
            reads = draw(st.lists(st.integers(0, number), max_size=3))
            macs = draw(st.sampled_from((0, 0, 5, 1000)))
            operations.append(Operation(f"op{number}", "aten.op", tuple(reads), (number + 1,), macs=macs))
        values = tuple(Value(f"v{number}", draw(st.integers(0, 10**6))) for number in range(count + 1))
        names = [*(f"v{number}" for number in range(1, count + 1)), "unknown"]
        seconds = draw(st.dictionaries(st.sampled_from(names), st.floats(1e-6, 1e-2)))
        total = draw(st.floats(1e-5, 1.0))
        return Network(tuple(operations), values, (0,), (count,)), NodeTimes(total, seconds)


@given(case=Networks.timed())
@settings(max_examples=60, deadline=None)
def test_the_seconds_of_all_operations_are_those_of_the_whole(case: tuple[Network, NodeTimes]) -> None:
    network, times = case
    costs = attribute(network, times, {})
    assert len(costs.seconds) == len(network.operations)
    assert min(costs.seconds) > 0
    assert sum(costs.seconds) == pytest.approx(costs.total) == pytest.approx(times.total)
    assert 0 <= costs.measured <= 1


def chain(*rows: tuple[str, int]) -> Network:
    """Return a network of operations in a row; each gives a value of its own name."""
    operations = tuple(Operation(f"node_{n}", "k", (i,), (i + 1,), macs=macs) for i, (n, macs) in enumerate(rows))
    values = (Value("x", 8), *(Value(name, 8) for name, _ in rows))
    return Network(operations, values, (0,), (len(rows),))


def test_a_fused_kernel_counts_for_its_products() -> None:
    network = chain(("conv", 100), ("norm", 0), ("relu", 0), ("second", 300), ("add", 0))
    costs = attribute(network, NodeTimes(3.0, {"relu": 1.0, "out": 2.0}), {"out": "node_add"})
    assert costs.seconds == pytest.approx((1, 0, 0, 2, 0), abs=1e-6)
    assert costs.measured == 1


def test_without_measured_nodes_the_roofline_is_scaled() -> None:
    network = chain(("conv", 10**9), ("relu", 0))
    costs = attribute(network, NodeTimes(1.0, {}), {})
    assert costs.seconds == pytest.approx([each / sum(roofline(network)) for each in roofline(network)])
    assert costs.measured == 0


def test_a_roofline_knows_views_and_rows() -> None:
    values = (Value("x", 80), Value("y", 4000), Value("z", 4000))
    operations = (
        Operation("e", "aten.embedding.default", (0,), (1,), ("table",)),
        Operation("v", "aten.view.default", (1,), (2,)),
    )
    embedding, view = roofline(Network(operations, values, (0,), (2,), {"table": 10**9}), bandwidth=8e3)
    assert embedding == pytest.approx(1.0)
    assert view < 1e-6


def test_a_module_is_estimated_as_its_program() -> None:
    layers = (nn.Embedding(5000, 16), nn.Dropout(), nn.Flatten(), nn.Linear(64, 8))
    model, ids = nn.Sequential(*layers).eval(), torch.zeros(2, 4, dtype=torch.long)
    found = [
        sum(roofline(kind_of(graph).cuttable(graph, ((ids,), {})).network))
        for graph in (model, torch.export.export(model, (ids,)))
    ]
    assert found[0] == pytest.approx(found[1], rel=0.01)


def written(folder: Path) -> ModelFile:
    """Return the file of a small ONNX model, of which one node has a name and the others have none."""
    sizes = {"w": (16, 3, 3, 3), "v": (16, 16, 1, 1)}
    tensors = [helper.make_tensor(n, 1, s, np.full(s, 0.1, np.float32)) for n, s in sizes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Conv", ["relu", "v"], ["second"]),
        helper.make_node("Add", ["second", "relu"], ["out"]),
    ]
    ends = [helper.make_tensor_value_info(n, 1, (1, c, 8, 8)) for n, c in (("x", 3), ("out", 16))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "m.onnx")
    return ModelFile("m", folder / "m.onnx", {"x": np.ones((1, 3, 8, 8), np.float32)})


def test_onnxruntime_times_the_kernels_of_a_model_once(tmp_path: Path) -> None:
    file = written(tmp_path)
    seen: list[float] = []
    before = set(tmp_path.iterdir())
    backend = make_backend(path=tmp_path / "cache" / "known.sqlite3")
    times = backend.profile(file, threads=1, seconds=0.02, progress=seen.append)
    assert "out" in times.seconds
    assert set(times.seconds) <= {"conv", "relu", "second", "out"}
    assert sum(times.seconds.values()) == pytest.approx(times.total)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert make_backend(path=tmp_path / "cache" / "known.sqlite3").profile(file, threads=1) == times
    assert set(tmp_path.iterdir()) - before == {tmp_path / "cache"}


@pytest.mark.parametrize("bad", [[1.0], {"out": "1"}, {"out": -1.0}, 1.0])
def test_kept_times_of_nodes_that_make_no_sense_are_measured_anew(bad: Any, tmp_path: Path) -> None:
    path, good = tmp_path / "known.sqlite3", NodeTimes(2.0, {"out": 1.0})
    Cache(path).recall(NodeTimes, {"model": 1}, lambda: NodeTimes(2.0, bad))
    assert Cache(path).recall(NodeTimes, {"model": 1}, lambda: good) == good


def test_weights_in_another_file_are_found(tmp_path: Path) -> None:
    file = written(tmp_path)
    outside = tmp_path / "outside" / "m.onnx"
    outside.parent.mkdir()
    onnx.save(onnx.load(file.path), outside, save_as_external_data=True, location="m.data", size_threshold=0)
    times = make_backend(keep=False).time_nodes(ModelFile("m", outside, file.feeds), threads=1, seconds=0.01)
    assert "out" in times.seconds


def test_a_backend_that_sees_no_nodes_times_the_whole(tmp_path: Path) -> None:
    times = ByParameters().profile(written(tmp_path))
    assert times.total == pytest.approx(688e-6)
    assert not times.seconds


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="m cannot be read as an ONNX model"):
        make_backend(keep=False).time_nodes(ModelFile("m", tmp_path / "m.onnx", {}), threads=1)


def test_the_values_of_an_export_are_followed_to_nodes_of_the_program(
    small: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    module, x = small
    program = torch.export.export(module, (x,))
    _, origins = write_with_origins(program, ((x,), {}), tmp_path / "m.onnx", "m")
    made = {node.name for node in program.graph.nodes}
    assert set(origins.values()) <= made
    assert {"batch_norm", "relu_", "sigmoid", "linear", "mean"} <= set(origins.values())
    assert origins["view"] == "flatten"  # the exporter has other names than the program


def test_the_values_of_an_export_are_followed_to_nodes_of_a_graph_module(
    small: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    module, x = small
    graph = torch.fx.symbolic_trace(module)
    notes = [dict(node.meta) for node in graph.graph.nodes]
    _, origins = write_with_origins(graph, ((x,), {}), tmp_path / "m.onnx", "m")
    assert {"norm", "act", "add", "sigmoid", "fc", "mean"} <= set(origins.values())
    assert [dict(node.meta) for node in graph.graph.nodes] == notes


@pytest.fixture(scope="module")
def onnx_pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pieces, Kind, Inputs]:
    """Two stages of a small ONNX model: a value goes to both, and the input of the model to the second as well."""
    model = load(written(tmp_path_factory.mktemp("model")).path)
    kind = kind_of(model)
    inputs: Inputs = ((torch.randn(1, 3, 8, 8),), {})
    cuttable = kind.cuttable(model, inputs)
    network = cuttable.network
    cut = next(number for number, operation in enumerate(network.operations) if operation.kind == "Relu")
    return cuttable.cut([int(number > cut) for number in range(len(network.operations))]), kind, inputs


def test_each_stage_is_timed_by_the_backend(onnx_pieces: tuple[Pieces, Kind, Inputs]) -> None:
    samples = measure_stages(*onnx_pieces, ByParameters())
    assert [each.median for each in samples] == pytest.approx([432e-6, 256e-6])


def test_operations_of_an_onnx_model_are_timed(onnx_pieces: tuple[Pieces, Kind, Inputs]) -> None:
    pieces, kind, inputs = onnx_pieces
    cuttable = kind.cuttable(kind.join(pieces), inputs)
    costs = measure_operations(cuttable, kind, inputs, make_backend(keep=False, threads=1), seconds=0.01)
    assert sum(costs.seconds) == pytest.approx(costs.total)
    assert costs.measured > 0.9


def test_operations_of_a_module_are_timed(small: tuple[nn.Module, Tensor]) -> None:
    module, x = small
    kind, inputs = kind_of(module), ((x,), dict[str, Any]())
    cuttable = kind.cuttable(module, inputs)
    costs = measure_operations(cuttable, kind, inputs, make_backend(keep=False, threads=1), seconds=0.01)
    assert costs.measured > 0.5
    by_name = {o.name: spent for o, spent in zip(cuttable.network.operations, costs.seconds, strict=True)}
    assert by_name["conv"] > 100 * by_name["norm"]  # which is fused into it


def test_a_pipeline_is_timed_against_the_whole(onnx_pieces: tuple[Pieces, Kind, Inputs]) -> None:
    core = usable_cores()[0]
    shares: list[float] = []
    timing = bench_pipeline(*onnx_pieces, seconds=0.05, cores=[core], progress=shares.append)
    assert timing.cores == (core, core)
    assert timing.error < 1e-5
    assert shares[-1] == 1
    assert [stage.runs > 0 for stage in timing.stages] == [True, True]
    found = json.loads(json.dumps(timing.to_json()))
    assert found["speedup"]["value"] == pytest.approx(timing.whole.median / timing.pipeline.median)
    assert {len(row) for row in timing.rows()} == {5}
    with pytest.raises(InputError, match="allowed: some of"):
        bench_pipeline(*onnx_pieces, cores=[10_000])


@given(items=st.lists(st.integers(), max_size=30), count=st.integers(1, 4), flight=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_a_pipeline_gives_what_its_steps_give_in_a_row(items: list[int], count: int, flight: int) -> None:
    steps: list[Callable[[int], int]] = [lambda x, k=k: 3 * x + k for k in range(count)]  # type: ignore[misc]
    wanted = list(items)
    for step in steps:
        wanted = list(map(step, wanted))
    with Pipeline(steps, flight=flight) as pipeline:
        assert list(pipeline.map(items)) == wanted
        assert list(pipeline.map(items)) == wanted  # and once more
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]


def test_no_more_than_the_flight_is_under_way() -> None:
    inside, most = [0], [0]

    def enter(x: int) -> int:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        return x

    with Pipeline([enter, lambda x: x], flight=3) as pipeline:
        for _ in pipeline.map(range(20)):
            inside[0] -= 1
    assert most[0] <= 3


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_what_a_step_raises_closes_the_pipeline(error: BaseException) -> None:
    def step(x: int) -> int:
        if x == 3:
            raise error
        return x

    pipeline = Pipeline([lambda x: x, step, lambda x: x])
    with pytest.raises(type(error)):
        list(pipeline.map(range(100)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]
    with pytest.raises(InputError, match="the pipeline is closed"):
        list(pipeline.map([1]))


def test_a_pipeline_ends_on_ctrl_c() -> None:
    def step(x: int) -> int:
        if x == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return x

    with pytest.raises(KeyboardInterrupt), Pipeline([lambda x: x, step]) as pipeline:
        list(pipeline.map(range(1000)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]


def test_a_caller_that_wants_no_more_ends_the_threads() -> None:
    pipeline = Pipeline([lambda x: x])
    found = pipeline.map(range(100))
    assert next(found) == 0
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]


@pytest.mark.parametrize("bad", [{"cores": [0]}, {"flight": 0}])
def test_bad_pipelines_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="allowed"):
        Pipeline([lambda x: x, lambda x: x], **bad)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not pin threads")
def test_each_step_has_a_core_of_its_own() -> None:
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    with Pipeline([lambda _: os.sched_getaffinity(0)], cores=[core]) as pipeline:
        assert list(pipeline.map([None])) == [{core}]
    assert os.sched_getaffinity(0) == before


@pytest.fixture(scope="module")
def found_together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found that ran stages together over gloo."""
    folder = tmp_path_factory.mktemp("together")
    together(work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@two_processes
def test_stages_in_two_processes_give_the_bits_of_the_whole(found_together: list[dict[str, Any]]) -> None:
    assert [found["inference"] for found in found_together] == [None, True]


@two_processes
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_training_through_stages_is_training_the_whole(found_together: list[dict[str, Any]], schedule: str) -> None:
    rows = [found[schedule] for found in found_together]
    assert [row["equal"] for row in rows] == [None, True]
    gradients = {name: gap for row in rows for name, gap in row["gradients"].items()}
    assert gradients.keys() == dict(Net().named_parameters()).keys()
    assert max(gradients.values()) < 1e-5
    buffers = {name: gap for row in rows for name, gap in row["buffers"].items()}
    assert buffers.keys() == dict(Net().named_buffers()).keys()
    assert max(buffers.values()) < 1e-6


@two_processes
def test_stages_and_microbatches_that_processes_cannot_share_are_refused(found_together: list[dict[str, Any]]) -> None:
    first, last = (found["refused"] for found in found_together)
    assert first[0] == last[0]
    assert first[0].startswith("3 stages for 2 processes")
    assert "of shape (1, 3, 6, 6), in stages made for (2, 3, 6, 6)" in first[1]


def test_a_pipeline_of_processes_needs_modules_and_a_group(onnx_pieces: tuple[Pieces, Kind, Inputs]) -> None:
    with pytest.raises(InputError, match="ONNX models do not run"):
        pipeline_modules(*onnx_pieces[:2])
    with pytest.raises(InputError, match="no process group"):
        pipeline_stages(*onnx_pieces)


def test_stages_that_would_train_one_weight_apart_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    net[2].weight = net[0].weight
    x = torch.ones(2, 4)
    kind = kind_of(net)
    assert len(pipeline_modules(split(net.eval(), x, at=["_1"], measure=False).pieces, kind)) == 2
    learning = split(net.train(), x, at=["_1"], measure=False).pieces
    with pytest.raises(InputError, match="in the stages 0 and 1, which would train it apart"):
        pipeline_modules(learning, kind)


@pytest.mark.parametrize("saved", [False, True])
def test_a_weight_in_two_stages_of_a_program_is_not_trained(saved: bool, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()).eval()
    net[2].weight = net[0].weight
    x = torch.ones(2, 4)
    pieces = split(torch.export.export(net, (x,)), x, at=["relu"], measure=False)
    if saved:
        pieces.save(tmp_path / "stages")
        pieces = load_split(tmp_path / "stages")
    first, second = pipeline_modules(pieces.pieces, pieces.kind)
    with torch.no_grad():
        assert torch.equal(second(*first(x)), net(x))
    with pytest.raises(InputError, match="in the stages 0 and 1, which would train it apart"):
        second(*first(x)).sum().backward()
