"""The table of all operators that run in torch, by name; those of other domains have the domain in front."""

from __future__ import annotations

from surgery.kinds.onnx.ops.indexing import INDEXING
from surgery.kinds.onnx.ops.linear import LINEAR
from surgery.kinds.onnx.ops.pointwise import POINTWISE
from surgery.kinds.onnx.ops.recurrent import RECURRENT
from surgery.kinds.onnx.ops.reduce import REDUCTIONS
from surgery.kinds.onnx.ops.said import Op
from surgery.kinds.onnx.ops.shapes import SHAPES
from surgery.kinds.onnx.ops.windows import WINDOWS

__all__ = ["OPS"]

OPS: dict[str, Op] = {**POINTWISE, **SHAPES, **INDEXING, **REDUCTIONS, **LINEAR, **WINDOWS, **RECURRENT}
