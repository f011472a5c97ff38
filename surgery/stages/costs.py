"""The seconds of operations and of stages: measured where the model can be exported to ONNX, else by a roofline.

A backend gives seconds by the names of values (``Backend.profile``), and those of a fused kernel for its last value. An
operation that gives a value with a time is *timed*. What was fused into its kernel lies before it: the operations on
the way back to other timed ones. A fused kernel passes over memory once, for its products, so that its time goes to
the operations of its group by their multiply-accumulates, and where there are none by the bytes that they move.

    conv (1000 MACs) -> norm -> relu, timed at relu: conv gets all
    add -> relu -> flatten, timed at flatten: by bytes

What belongs to no group gets its roofline, in proportion to the groups; at last all are scaled to the measured whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from surgery.cost.base import Backend, NodeTimes, make_backend
from surgery.errors import SurgeryError
from surgery.kinds.base import Cuttable, Kind, Pieces
from surgery.kinds.inputs import Inputs
from surgery.runtime.written import write_with_origins
from surgery.sites.network import Network, Operation
from surgery.stages.exported import measure_stages
from surgery.system.progress import Progress
from surgery.system.scratch import scratch_folder

__all__ = [
    "BANDWIDTH",
    "FLOPS",
    "Costs",
    "Times",
    "attribute",
    "measure_operations",
    "operation_times",
    "roofline",
    "stage_times",
]

FLOPS = 50e9  # of one core, a second; a multiply-accumulate is two
BANDWIDTH = 20e9  # bytes a second
_SECONDS = 2.0  # of measuring operations, and as many for stages
_LEAST = 1e-12  # seconds: no operation is free, so that each order has one best cut
# Kinds of operations that move no memory, and those that read only the rows that they give.
_VIEWS = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "detach", "alias")
_FREE = frozenset((*_VIEWS, "getitem", "dropout", "identity", "shape", "size", "sym_size", "constant"))
_ROWS = frozenset(("embedding", "gather", "index_select"))


@dataclass(frozen=True)
class Costs:
    """The seconds of each operation of a network in its order, and of the whole, which is their sum.

    ``measured`` is the share of the whole that was measured in kernels of known operations; the rest is a roofline's.
    """

    seconds: tuple[float, ...]
    total: float
    measured: float


def roofline(network: Network, *, flops: float = FLOPS, bandwidth: float = BANDWIDTH) -> tuple[float, ...]:
    """Return the seconds of each operation: of its arithmetic, or of the bytes that it moves, whichever takes longer.

    ``flops`` are operations a second, two for each multiply-accumulate; ``bandwidth`` is bytes a second (Williams,
    Waterman and Patterson, 2009).

    >>> from surgery.sites.network import Value
    >>> values = (Value("x", 4000), Value("y", 4000))
    >>> operations = (Operation("fc", "aten.linear", (0,), (1,), ("weight",), macs=1_000_000),)
    >>> roofline(Network(operations, values, (0,), (1,), {"weight": 4_000_000}))
    (0.0002004,)
    """
    moved = _bytes_moved(network)
    # In the example above, 2 million operations take 40 us, and 4000 + 4000 + 4,000,000 bytes 200.4 us.
    pairs = zip(network.operations, moved, strict=True)
    return tuple(max(_LEAST, 2 * operation.macs / flops, size / bandwidth) for operation, size in pairs)


def _bytes_moved(network: Network) -> list[int]:
    found = []
    for operation in network.operations:
        gives = sum(network.values[value].bytes for value in operation.gives)
        reads = sum(network.values[value].bytes for value in operation.reads)
        tensors = sum(network.bytes_of.get(name, 0) for name in operation.tensors)
        kind = _plain(operation)
        found.append(0 if kind in _FREE else 2 * gives if kind in _ROWS else gives + reads + tensors)
    return found


def _plain(operation: Operation) -> str:
    """Return the kind of an operation without its namespace and overload: "view" of "aten.view.default"."""
    return operation.kind.lower().rpartition("::")[2].removeprefix("aten.").partition(".")[0]


def measure_operations(
    cuttable: Cuttable,
    kind: Kind,
    inputs: Inputs,
    backend: Backend,
    *,
    threads: int | None = 1,
    seconds: float = 2.0,
    progress: Callable[[float], None] | None = None,
) -> Costs:
    """Return the seconds of each operation of a model as a backend measures them; what it has measured is looked up.

    The model is timed as the one stage that it is as a whole, since that has the names of the network, if its graph had
    to be captured as well. A model of PyTorch is exported to a temporary file. ``threads``, ``seconds`` and
    ``progress`` are those of ``Backend.profile``.

    Raises:
        CaptureError: the model cannot be written as ONNX.
        InputError: the backend cannot run it.
    """
    pieces = cuttable.cut([0] * len(cuttable.network.operations))
    stage = pieces.stages[0]
    known = dict(zip(pieces.inputs, kind.leaves(pieces, *inputs), strict=True))
    given = tuple(known[name] for name in stage.inputs)
    with scratch_folder() as folder:
        written, origins = write_with_origins(stage.model, (given, {}), folder / "model.onnx", "the model")
        times = backend.profile(written.file, threads=threads, seconds=seconds, progress=progress)
    return attribute(cuttable.network, times, origins)


def attribute(network: Network, times: NodeTimes, origins: Mapping[str, str]) -> Costs:
    """Return the seconds of each operation, from those of values by name.

    ``origins`` has for a value of the model that was timed the name of an operation of the network, or of a value of
    it, where the two differ.
    """
    given = {network.values[value].name: number for value, number in network.producer.items()}
    known = given | {operation.name: number for number, operation in enumerate(network.operations)}
    timed: dict[int, float] = {}
    for name, spent in times.seconds.items():
        number = known.get(origins.get(name, name))
        if number is not None:
            timed[number] = timed.get(number, 0.0) + spent
    estimate = roofline(network)
    found = [0.0] * len(estimate)
    rest = set(range(len(estimate)))
    for group, spent in _groups(network, timed):
        rest -= set(group)
        weights = [float(network.operations[number].macs) for number in group]
        weights = weights if any(weights) else [estimate[number] for number in group]
        for number, weight in zip(group, weights, strict=True):
            found[number] = max(_LEAST, spent * weight / sum(weights))
    measured = sum(timed.values())
    # Groups that took 2 ms and have a roofline of 1 ms make the roofline of the rest count twice.
    scale = measured / (sum(estimate) - sum(estimate[number] for number in rest)) if timed else 1.0
    for number in rest:
        found[number] = estimate[number] * scale
    factor = times.total / (sum(found) or 1.0)
    return Costs(tuple(spent * factor for spent in found), times.total, min(1.0, measured / times.total))


def _groups(network: Network, timed: Mapping[int, float]) -> Iterator[tuple[list[int], float]]:
    """Yield each timed operation with those that were fused into its kernel, and the kernel's seconds."""
    # Invariant: an operation is in one group at most, that of the first timed operation that needs it. For example in
    # conv -> relu -> (conv2, add -> conv3), timed at conv, conv2 and conv3: [conv], [conv2, relu], [conv3, add].
    taken = set(timed)
    for number in sorted(timed):
        group, waiting = [number], [number]
        while waiting:
            for value in network.operations[waiting.pop()].reads:
                source = network.producer.get(value)
                if source is not None and source not in taken:
                    taken.add(source)
                    group.append(source)
                    waiting.append(source)
        yield group, timed[number]


@dataclass(frozen=True)
class Times:
    """The seconds of each operation, and what to say of them."""

    seconds: tuple[float, ...]
    notes: tuple[str, ...] = ()


def operation_times(
    cuttable: Cuttable, kind: Kind, inputs: Inputs | None, *, measure: bool, progress: Progress
) -> Times:
    """Return the seconds of the operations of a model; estimates where nothing is to be measured, or can be."""
    network = cuttable.network
    if not measure:
        return Times(roofline(network), ("times are estimates, by 50 GFLOP and 20 GB a second",))
    if inputs is None:
        return Times(roofline(network), ("times are estimates: there are no inputs to measure on",))
    try:
        costs = measure_operations(
            cuttable,
            kind,
            inputs,
            make_backend(),
            seconds=_SECONDS,
            progress=lambda share: progress("operations", round(100 * share), 100),
        )
    except SurgeryError as error:
        return Times(roofline(network), (f"times are estimates: {error.what}",))
    return Times(costs.seconds)


def stage_times(kind: Kind, pieces: Pieces, inputs: Inputs, progress: Progress) -> tuple[float, ...] | None:
    """Return the median seconds of a run of each stage by itself; None where a stage cannot be exported."""
    try:
        samples = measure_stages(
            pieces,
            kind,
            inputs,
            make_backend(),
            seconds=_SECONDS,
            progress=lambda share: progress("stages", round(100 * share), 100),
        )
    except SurgeryError:
        return None
    return tuple(each.median for each in samples)
