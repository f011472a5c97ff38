"""The seconds of operations and of stages: measured where the model can be exported to ONNX, estimated elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.cost.base import make_backend
from surgery.errors import SurgeryError
from surgery.kinds.base import Cuttable, Kind, Pieces
from surgery.kinds.inputs import Inputs
from surgery.stages.costs import measure_operations, roofline
from surgery.stages.exported import measure_stages
from surgery.system.progress import Progress

__all__ = ["Times", "operation_times", "stage_times"]

_SECONDS = 2.0  # of measuring operations, and as many for stages


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
