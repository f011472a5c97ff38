"""Tensors of ONNX models as torch tensors, and back."""

from __future__ import annotations

import math
import warnings

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

__all__ = ["DTYPES", "FLOATS", "numbers_of", "shape_of", "to_ir", "to_torch", "torch_dtype"]

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
}


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return the shape of a tensor."""
    return tuple(tensor.shape.numpy())


def numbers_of(tensor: ir.TensorProtocol) -> int:
    """Return how many numbers a tensor has."""
    return math.prod(shape_of(tensor))


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """Return a torch tensor with the numbers of an ONNX tensor; it shares their memory, and must not be changed."""
    array = np.asarray(tensor.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the array cannot be written
        if tensor.dtype == ir.DataType.BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array if min(array.strides, default=0) >= 0 else array.copy())


def to_ir(tensor: Tensor, name: str) -> ir.TensorProtocol:
    """Return an ONNX tensor with the numbers of a torch tensor, also of a transposed one; it shares their memory."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.uint16).numpy()
        return ir.Tensor(array, dtype=ir.DataType.BFLOAT16, shape=ir.Shape(tuple(tensor.shape)), name=name)
    return ir.Tensor(tensor.numpy(), name=name)


def torch_dtype(number: int | None) -> torch.dtype | None:
    """Return torch's type for ONNX's number of a type; None if torch has none for it."""
    return None if number is None else DTYPES.get(ir.DataType(number))
