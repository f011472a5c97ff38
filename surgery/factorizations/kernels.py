"""Shared by methods that take a kernel apart along its dimensions: which dimensions extend, and their geometries."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.algebra.operators import Geometry, Operator, Shape
from surgery.errors import Refusal

__all__ = ["along_each", "only", "refuse_channels", "spatial_dims"]


def spatial_dims(kernel: Shape) -> list[int]:
    """Return the dimensions along which a kernel (g, O, I, *size) extends."""
    return [dim for dim, size in enumerate(kernel[3:]) if size > 1]


def along_each(geometry: Geometry, kernel: Shape) -> list[Geometry]:
    """Return the geometry along each dimension that extends; the first one also has that of those that do not."""
    dims = spatial_dims(kernel)
    flat = set(range(geometry.dims)) - set(dims)
    return [geometry.along({dim} | flat if dim == dims[0] else {dim}) for dim in dims]


def only(size: Sequence[int], dim: int) -> Shape:
    """Return the size along one dimension, and 1 along the others."""
    return tuple(n if i == dim else 1 for i, n in enumerate(size))


def refuse_channels(operator: Operator) -> Refusal | None:
    """Refuse linear and 1x1 (svd is the same with fewer operators) and depthwise convolutions."""
    _, out, columns, *size = operator.kernel.shape
    if math.prod(size) == 1:
        return Refusal("it has a single kernel position, where svd is the same with fewer operators")
    if out == 1 and columns == 1:
        return Refusal("it is depthwise: one input and one output channel in each group")
    return None
