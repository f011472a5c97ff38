"""The seconds of each part of a model under onnxruntime, by the names of the values that the parts compute.

onnxruntime's profiler times each kernel of the graph that it has made of a model. That graph is the one that its users
run, all optimisations on: at a lower level it keeps more of the names, but a ResNet-50 takes 71 ms instead of 49, and
the convolutions share them in other proportions. Three facts lead from a kernel back to the model:

- The fusions keep the value of the last node that they take in, so that a kernel has a name of the model as its output.
- The blocked convolutions give new values (``reorder_token_3``). Their nodes are named after the old: ``relu_nchwc``.
- What has neither name was put in between (a change of the layout or the shape). It counts with the kernel after it.

The profiler takes a microsecond or two of each kernel, which the same session does not once profiling has ended. So the
whole is timed afterwards. What all kernels exceed it by is taken off each alike, up to 3 us, and the rest is a factor.

    kernels 10 and 2 us, whole 14 us: 1 us more for each, 11 and 3
    kernels 100 and 20 us, whole 60 us: 3 us less for each, 97 and 17, times 60 / 114
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from surgery.cost.base import ModelFile, NodeTimes
from surgery.cost.timing import Budget, interleave, waited
from surgery.errors import InputError
from surgery.kinds.onnx.session import open_session, run_session
from surgery.system.scratch import scratch_folder
from surgery.text import first_line

__all__ = ["kernel_values", "profile", "settle"]

_WARMUP = 3  # runs that do not count
_LEAST, _MOST = 5, 200  # runs that do
_EVENTS = 400_000  # kernels in one profile: some 200 MB
_OWN = 3e-6  # seconds that the profiler adds to a kernel, or the session outside of it, at most
_LOW = 0.1  # the quantile of the seconds of a kernel
_SUFFIX = "_kernel_time"
_BLOCKED = "_nchwc"


def profile(
    model: ModelFile, *, threads: int | None, seconds: float, progress: Callable[[float], None] | None = None
) -> NodeTimes:
    """Return the seconds of one run of a model, and how they are shared by the values that its kernels compute.

    Half of ``seconds`` goes to the kernels, half to the whole; each gets at least five runs.

    Raises:
        InputError: onnxruntime cannot load or run the model.
    """
    show = progress or (lambda _: None)
    with scratch_folder() as folder:
        optimised = folder / "optimised.onnx"
        proto = _with_names(model)
        session = _open(proto, model, folder, optimised, threads)
        graph = onnx.load(optimised, load_external_data=False).graph
        most = max(_LEAST, min(_MOST, _EVENTS // max(1, len(graph.node))))
        budget = Budget(seconds / 2, _LEAST, most, _WARMUP)
        try:
            run_session(session, None, dict(model.feeds))  # what goes wrong is raised in our words
            _repeat(session, model, budget, lambda share: show(share / 2), float)
        finally:
            events = Path(session.end_profiling())
        kernels = _kernel_seconds(events)
    waits = waited if threads == 1 else float
    whole = _repeat(session, model, replace(budget, max_rounds=_MOST), lambda share: show(0.5 + share / 2), waits)
    known = [value for node in proto.graph.node for value in node.output if value]
    names = kernel_values(graph, known)
    return settle([(names.get(kernel), spent) for kernel, spent in kernels.items()], whole)


def _with_names(model: ModelFile) -> onnx.ModelProto:
    """Return the message of a model with a name of its own for each node, by which the profile tells them apart."""
    try:
        proto = onnx.load(model.path, load_external_data=False)
    except Exception as error:  # protobuf's own errors differ from version to version
        raise InputError(f"{model.name} cannot be read as an ONNX model: {first_line(error)}") from error
    for number, node in enumerate(proto.graph.node):
        node.name = f"node{number}"
    return proto


def _open(
    proto: onnx.ModelProto, model: ModelFile, folder: Path, optimised: Path, threads: int | None
) -> ort.InferenceSession:
    def configure(options: ort.SessionOptions) -> None:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = str(optimised)
        entries = {
            "session.model_external_initializers_file_folder_path": str(model.path.parent),
            "session.optimized_model_external_initializers_file_name": "optimised.data",  # of models above 2 GiB
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)

    try:
        return open_session(proto.SerializeToString(), threads=threads, configure=configure)
    except InputError as error:
        raise InputError(f"{model.name}: {error.what}", next_step=error.next_step) from error


def _repeat(
    session: ort.InferenceSession,
    model: ModelFile,
    budget: Budget,
    show: Callable[[float], None],
    waits: Callable[[], float],
) -> float:
    """Run a model within a budget, and return the median of one run."""
    names, feeds = [output.name for output in session.get_outputs()], dict(model.feeds)
    return interleave([lambda: session.run(names, feeds)], budget, progress=show, waited=waits)[0].median


def _kernel_seconds(path: Path) -> dict[str, float]:
    """Return the seconds of each kernel in a profile, without the first runs, which warmed up: its lowest decile.

    On a busy machine a thread whose slice is over waits for a core, and that comes as long after the start of each run:
    in the same kernels, whose medians were eight times too large.
    """
    spent: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(path.read_bytes()):
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            spent[event["name"].removesuffix(_SUFFIX)].append(event["dur"] / 1e6)
    return {name: float(np.quantile(values[_WARMUP + 1 :] or values, _LOW)) for name, values in spent.items()}


def kernel_values(graph: Any, known: Sequence[str]) -> Mapping[str, str]:
    """Return for each node of an optimised graph, by name, the value of the model that its time counts for.

    ``known`` are the values that the model's own nodes give. A node from which no such value follows has none.

    >>> from onnx import helper
    >>> nodes = [helper.make_node("Conv", ["x"], ["t"], "relu_nchwc"), helper.make_node("Reorder", ["t"], ["u"], "r")]
    >>> nodes.append(helper.make_node("Gemm", ["u"], ["y"], "g"))
    >>> kernel_values(helper.make_graph(nodes, "g", [], []), ["conv", "relu", "y"])
    {'g': 'y', 'r': 'y', 'relu_nchwc': 'relu'}
    """
    # Invariant: from the last node to the first, ``after`` has for each value that a later node reads the value of the
    # model that the first such node counts for. In the example "r" is seen when after == {"u": "y"}: it counts for y.
    names, found = set(known), {}
    after: dict[str, str] = {}
    for node in reversed(graph.node):
        own = node.name.rpartition(_BLOCKED)[0]
        given = [value for value in node.output if value in names] or ([own] if own in names else [])
        given = given or [after[value] for value in node.output if value in after]
        if given:
            found[node.name] = given[0]
            after |= dict.fromkeys(node.input, given[0])
    return found


def settle(kernels: Sequence[tuple[str | None, float]], whole: float) -> NodeTimes:
    """Return the seconds of each value, so that all kernels together take as long as the whole does.

    >>> settle([("conv", 10e-6), (None, 1e-6), ("relu", 1e-6)], 15e-6).seconds
    {'conv': 1.1e-05, 'relu': 2e-06}
    """
    # In the example above 3 us are missing of three kernels, 1 us each: 11 + 2 + 2 = 15. What is beyond ``_OWN``
    # for each goes in proportion.
    gap = whole - sum(spent for _, spent in kernels)
    share = float(np.clip(gap / max(1, len(kernels)), -_OWN, _OWN))
    moved = [(name, max(spent + share, spent / 10)) for name, spent in kernels]
    factor = whole / (sum(spent for _, spent in moved) or 1.0)
    found: dict[str, float] = {}
    for name, spent in moved:
        if name is not None:
            found[name] = found.get(name, 0.0) + round(spent * factor, 12)
    return NodeTimes(whole, found)
