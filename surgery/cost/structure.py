"""What the latency of a whole .onnx file depends on, but for the values of its weights, as JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

__all__ = ["described_file"]

_LARGE = 1024  # bytes of a tensor whose values say nothing of the graph, as those of a shape do
_DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data")


def described_file(path: Path, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Return a digest of the graph of an .onnx file, without the numbers of large weights, and of its inputs' shapes.

    Names count, because what is measured of nodes is told by names.
    """
    proto = onnx.load(path, load_external_data=False)
    for node in proto.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() > _LARGE or tensor.data_location == onnx.TensorProto.EXTERNAL:
            for name in _DATA:
                tensor.ClearField(name)
    shapes = [(name, list(array.shape), str(array.dtype)) for name, array in feeds.items()]
    found = hashlib.sha256(proto.SerializeToString(deterministic=True))
    found.update(json.dumps(shapes).encode())
    return {"file": found.hexdigest()}
