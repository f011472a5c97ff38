"""Speed-ups measured in processes of their own, on ONNX files that torch's own exporter wrote."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, python looks in tools/ only

from surgery.export import quiet

__all__ = ["fresh_speedups"]

Model = nn.Module | ExportedProgram
_RUN = """
import json, sys
import numpy, surgery
*models, inputs, seconds, seed = sys.argv[1:]
with numpy.load(inputs) as arrays:
    values = tuple(arrays.values())
found = surgery.bench(models, values, seconds=float(seconds), seed=int(seed)).comparisons[0]
print(json.dumps(found.speedup))
"""


def fresh_speedups(original: Model, changed: Model, args: tuple[Any, ...], seconds: float, times: int) -> list[float]:
    """Return how many times as fast as the original a changed model is, from each of so many new processes.

    Both are exported with ``torch.onnx.export``, of a program with its dynamic sizes, and run on the same tensors
    ``args``, interleaved for so many seconds in all.

    Raises:
        RuntimeError: a process that fails, with what it wrote.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"original": original, "changed": changed}
        files = [str(_export(model, args, folder / f"{key}.onnx")) for key, model in models.items()]
        inputs = folder / "inputs.npz"
        np.savez(inputs, *(tensor.numpy() for tensor in args))
        return [_measure([*files, str(inputs), str(seconds), str(seed)]) for seed in range(times)]


def _export(model: Model, args: tuple[Any, ...], path: Path) -> Path:
    with quiet(), torch.no_grad():
        given = () if isinstance(model, ExportedProgram) else args
        torch.onnx.export(model, given, path, dynamo=True, verbose=False, external_data=False)
    return path


def _measure(arguments: list[str]) -> float:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", _RUN, *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"timing in a new process failed: {done.stderr.strip()}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))
