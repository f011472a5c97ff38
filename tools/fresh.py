"""Measure speed-ups in new processes, on ONNX files written by torch's own exporter."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.runtime.fresh import time_apart
from surgery.system.quiet import quiet

__all__ = ["fresh_speedups"]

Model = nn.Module | ExportedProgram


def fresh_speedups(original: Model, changed: Model, args: tuple[Any, ...], seconds: float, times: int) -> list[float]:
    """Return the speed-ups of a changed model over the original, one from each round of new processes.

    Both models are exported with ``torch.onnx.export``, programs with their dynamic sizes, and run on the same tensors
    ``args`` for the given seconds in each round.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"original": original, "changed": changed}
        files = [str(_export(model, args, folder / f"{key}.onnx")) for key, model in models.items()]
        timings = (time_apart(files, args, seconds=seconds, seed=seed) for seed in range(times))
        return [timing.comparisons[0].speedup for timing in timings]


def _export(model: Model, args: tuple[Any, ...], path: Path) -> Path:
    with quiet(), torch.no_grad():
        given = () if isinstance(model, ExportedProgram) else args
        torch.onnx.export(model, given, path, dynamo=True, verbose=False, external_data=False)
    return path
