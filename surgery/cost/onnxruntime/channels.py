"""The number of channels that onnxruntime's convolutions like on this machine."""

from __future__ import annotations

from functools import cache

import onnx
import onnxruntime as ort
import torch

from surgery.algebra.operators import Conv, Geometry
from surgery.cost.onnxruntime.model import build_model
from surgery.errors import FileError
from surgery.system.scratch import scratch_folder

__all__ = ["channel_multiple"]


@cache
def channel_multiple() -> int:
    """Return the channel block of onnxruntime's fast convolution here: ranks that are multiples of it waste nothing.

    onnxruntime asks MLAS (``MlasNchwcGetBlockSize``): 16 with AVX-512, 8 with other vector units of x86-64, 16 with
    NEON in recent versions. This number is found, not guessed: onnxruntime optimises a convolution to one channel, and
    its filter comes back padded to a whole block. Without blocked convolutions, or room for a temporary file, the
    number is 16 with AVX-512 and 8 otherwise.
    """
    graph = _optimised(build_model(Conv(torch.ones(1, 64, 3, 3), geometry=Geometry.pointwise(2)), (1, 64, 3, 3)))
    if graph is not None and any(node.domain == "com.microsoft.nchwc" for node in graph.node):
        return max(int(weight.dims[0]) for weight in graph.initializer)
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def _optimised(model: bytes) -> onnx.GraphProto | None:
    """Return the graph that onnxruntime makes of a model; None if there is no room for the file that this takes."""
    try:
        with scratch_folder() as folder:
            file = folder / "optimised.onnx"
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.optimized_model_filepath = str(file)
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            return onnx.load(file).graph
    except FileError:
        return None
