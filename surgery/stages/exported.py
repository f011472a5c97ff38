"""The stages of a model as .onnx files, each with the values that it gets when the whole runs; their seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.cost.base import Backend, ModelFile
from surgery.cost.timing import Samples
from surgery.kinds.base import Kind, Piece, Pieces
from surgery.kinds.inputs import Inputs
from surgery.runtime.written import write_model
from surgery.system.scratch import scratch_folder

__all__ = ["StageOnnx", "measure_stages", "run_in_order", "write_stages"]


@dataclass(frozen=True, eq=False)
class StageOnnx:
    """A stage as an .onnx file. ``inputs`` and ``outputs`` are the names of the model's values, in the file's order."""

    file: ModelFile
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Tensors(nn.Module):
    """A stage that takes and gives tensors alone: numbers, as sizes are, are those of the example."""

    def __init__(self, stage: Piece, kind: Kind, values: Sequence[Any]) -> None:
        super().__init__()
        self.stage = kind.runnable(stage.model)
        self._values = tuple(None if isinstance(value, Tensor) else value for value in values)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        found = self.stage(*(next(given) if value is None else value for value in self._values))
        return tuple(value for value in found if isinstance(value, Tensor))


def run_in_order(pieces: Pieces, kind: Kind, inputs: Inputs) -> Iterator[tuple[Piece, list[Any], tuple[Any, ...]]]:
    """Run the stages one after another; yield each with the values that it gets, and those that it gives."""
    known = dict(zip(pieces.inputs, kind.leaves(pieces, *inputs), strict=True))
    for stage in pieces.stages:
        values = [known[name] for name in stage.inputs]
        found = kind.run_stage(stage.model, values)
        yield stage, values, found
        known |= zip(stage.outputs, found, strict=True)


def write_stages(pieces: Pieces, kind: Kind, inputs: Inputs, folder: Path) -> list[StageOnnx]:
    """Write each stage to a folder as ONNX, with the inputs that it gets when the model runs on ``inputs``.

    Raises:
        CaptureError, CheckError: a stage cannot be exported.
        InputError: the inputs do not fit the model.
    """
    written = []
    for number, (stage, values, found) in enumerate(run_in_order(pieces, kind, inputs)):
        model = stage.model if all(isinstance(v, Tensor) for v in (*values, *found)) else _Tensors(stage, kind, values)
        tensors = tuple(value for value in values if isinstance(value, Tensor))
        file = write_model(model, (tensors, {}), folder / f"stage{number}.onnx", f"stage {number}").file
        named = zip(stage.inputs, values, strict=True), zip(stage.outputs, found, strict=True)
        taken, given = (tuple(name for name, value in pairs if isinstance(value, Tensor)) for pairs in named)
        written.append(StageOnnx(file, taken, given))
    return written


def measure_stages(
    pieces: Pieces,
    kind: Kind,
    inputs: Inputs,
    backend: Backend,
    *,
    threads: int | None = 1,
    seconds: float = 5.0,
    progress: Callable[[float], None] | None = None,
) -> tuple[Samples, ...]:
    """Return the seconds of the runs of each stage by itself, as a backend times whole models.

    ``threads``, ``seconds`` and ``progress`` are those of ``Backend.time_models``; raises as ``write_stages`` does.
    """
    with scratch_folder() as folder:
        files = [stage.file for stage in write_stages(pieces, kind, inputs, folder)]
        return backend.time_models(files, threads=threads, seconds=seconds, progress=progress).samples
