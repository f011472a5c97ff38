"""The geometry of Conv and ConvTranspose nodes: strides, dilations, and pads that are said or have to be computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from surgery.algebra import Geometry
from surgery.errors import Refusal
from surgery.kinds.onnx.ops.linear import same_pads

__all__ = ["geometry_of"]


def geometry_of(
    said: Mapping[str, Any], kernel: Sequence[int], source: ir.Value | None, *, transposed: bool
) -> Geometry | Refusal:
    """Return the geometry of a convolution with these attributes, over a kernel of these sizes, on a value."""
    dims = len(kernel)
    stride = tuple(said.get("strides", (1,) * dims))
    dilation = tuple(said.get("dilations", (1,) * dims))
    extra = tuple(said.get("output_padding", (0,) * dims))
    auto = said.get("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        return Refusal("its auto_pad is unknown")
    if transposed and "output_shape" in said:
        return Refusal("it is a ConvTranspose with output_shape")
    pads = list(said.get("pads", (0,) * 2 * dims))
    padding: tuple[tuple[int, int], ...] | Refusal = tuple(zip(pads[:dims], pads[dims:], strict=True))
    if auto == "VALID":
        padding = ((0, 0),) * dims
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        padding = _same(kernel, stride, dilation, source, transposed=transposed, lower=auto == "SAME_LOWER")
    if isinstance(padding, Refusal):
        return padding
    if any(side < 0 for pair in padding for side in pair):
        return Refusal("it has negative pads")
    if transposed and any(before != after for before, after in padding):
        return Refusal("it is a ConvTranspose with unequal pads")
    return Geometry(stride, padding, dilation, extra, transposed=transposed)


def _same(
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    source: ir.Value | None,
    *,
    transposed: bool,
    lower: bool,
) -> tuple[tuple[int, int], ...] | Refusal:
    """Return the pads by which an output is as large as its input, divided by the stride and rounded up."""
    if transposed:
        return Refusal("it is a ConvTranspose with auto_pad")
    sizes = [] if source is None or source.shape is None else list(source.shape)[2:]
    padding = []
    for at, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        size = sizes[at] if at < len(sizes) else None
        if s > 1 and not isinstance(size, int):
            return Refusal("its pads depend on the size of its input (auto_pad with a stride)")
        padding.append(same_pads(size if isinstance(size, int) else 0, k, s, d, lower=lower))
    return tuple(padding)
