"""The meaning of torch's convolution arguments and weight layouts for operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from surgery.algebra.operators import Geometry, Layout, Operator, PaddingMode
from surgery.errors import Refusal

__all__ = ["conv_geometry", "stored_weight"]


def stored_weight(operator: Operator, stored: Layout) -> Tensor:
    """Return an operator's weight in the layout in which a graph stores it."""
    return operator.weight.t().contiguous() if stored == "in_out" else operator.weight


def conv_geometry(
    kernel_size: tuple[int, ...],
    *,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
    transposed: bool,
    padding_mode: PaddingMode = "zeros",
) -> Geometry | Refusal:
    """Return the geometry for torch's arguments (numbers, sequences, 'same', 'valid'), or why there is none."""
    dims = len(kernel_size)
    spread = [_spread(value, dims) for value in (stride, dilation, output_padding)]
    if any(value is None for value in spread):
        return Refusal("its stride, dilation or output padding is computed by the graph")
    strides, dilations, output_paddings = (value or () for value in spread)
    if isinstance(padding, str):
        spans = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel_size, strict=True)]
        pads = tuple((span // 2, span - span // 2) for span in spans)
    else:
        sides = _spread(padding, dims)
        if sides is None:
            return Refusal("its padding is computed by the graph")
        pads = tuple((side, side) for side in sides)
    return Geometry(strides, pads, dilations, output_paddings, transposed, padding_mode)


def _spread(value: Any, dims: int) -> tuple[int, ...] | None:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    values = values * dims if len(values) == 1 else values
    return values if len(values) == dims and all(isinstance(v, int) for v in values) else None
