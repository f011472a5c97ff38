"""Operators over windows and grids: poolings, and resizing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.kinds.onnx.ops.linear import padded, pads_around
from surgery.kinds.onnx.ops.said import Op, Said

__all__ = ["WINDOWS"]

_MAX: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class _Windows:
    """The windows of a pooling; ``pads`` reach as far as the windows do, ``inside`` without what ``ceil_mode`` adds."""

    def __init__(self, said: Said, x: Tensor) -> None:
        self.kernel = tuple(said.get("kernel_shape"))
        dims = len(self.kernel)
        self.stride = tuple(said.get("strides", (1,) * dims))
        self.dilation = tuple(said.get("dilations", (1,) * dims))
        self.inside = pads_around(said, x.shape[2:], self.kernel, self.stride, self.dilation)
        self.pads = []
        rows = zip(x.shape[2:], self.kernel, self.stride, self.dilation, self.inside, strict=True)
        for size, k, s, d, (before, after) in rows:
            # Example of 5 numbers, k = 2, s = 2 with ceil_mode: ceil(3 / 2) + 1 = 3 windows need 6,
            # so that 1 more is behind.
            span = d * (k - 1) + 1
            steps = (size + before + after - span) / s
            count = math.ceil(steps) + 1 if said.get("ceil_mode", 0) else math.floor(steps) + 1
            # no window may start behind the input and the pads before it
            count -= said.get("ceil_mode", 0) and (count - 1) * s >= size + before
            self.pads.append((before, max(after, (count - 1) * s + span - size - before)))


def _max_pool(said: Said, x: Tensor) -> Tensor | None:
    if said.outputs > 1 or len(said.get("kernel_shape")) not in _MAX or not x.is_floating_point():
        return None
    found = _Windows(said, x)
    even = all(before == after <= k // 2 for (before, after), k in zip(found.pads, found.kernel, strict=True))
    padding = tuple(before if even else 0 for before, _ in found.pads)
    x = x if even else padded(x, found.pads, -math.inf)
    return _MAX[len(found.kernel)](x, found.kernel, found.stride, padding, found.dilation)


def _average_pool(said: Said, x: Tensor) -> Tensor | None:
    found = _Windows(said, x)
    dims = len(found.kernel)
    if dims not in _MEAN or any(step != 1 for step in found.dilation):
        return None
    pool = _MEAN[dims]
    mean = pool(padded(x, found.pads), found.kernel, found.stride)
    if not any(side for pair in found.pads for side in pair):
        return mean
    # the share of each window that counts: the input, or all that ``pads`` says
    # Example of a window of 2 with the number 3 and one pad: the mean 1.5 over the share 0.5 is 3.
    counts = x.new_ones((1, 1, *x.shape[2:]))
    if said.get("count_include_pad", 0):
        counts = padded(counts, found.inside, 1.0)
        rest = [(0, b - d) for (_, b), (_, d) in zip(found.pads, found.inside, strict=True)]
        return mean / pool(padded(counts, rest), found.kernel, found.stride)
    return mean / pool(padded(counts, found.pads), found.kernel, found.stride)


def _global(reduce: Callable[[Tensor, list[int]], Tensor]) -> Op:
    return lambda said, x: reduce(x, list(range(2, x.dim())))


# -- resizing: along one axis after another, each new number from one, two or four old ones ----------------------------


def _resize(
    said: Said, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor | None:
    if said.opset < 11:  # Upsample, and the first Resize, whose second input are the scales
        scales = scales if roi is None else roi
    given = said.get("scales") if scales is None or not scales.numel() else scales.tolist()
    refused = said.get("antialias", 0) or said.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    if refused or said.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    axes = [axis % x.dim() for axis in said.get("axes", range(x.dim()))]
    new = [int(n) for n in sizes.tolist()] if sizes is not None and sizes.numel() else None
    if new is None:
        # in float32, in which 5 * 1.4 is 7
        new = [int(torch.tensor(float(x.shape[axis])) * scale) for axis, scale in zip(axes, given, strict=True)]
        by = list(given)
    else:
        by = [size / x.shape[axis] for axis, size in zip(axes, new, strict=True)]
    for axis, size, scale in zip(axes, new, by, strict=True):
        if size != x.shape[axis] or scale != 1:
            x = _along(said, x, axis, size, scale)
    return x


def _along(said: Said, x: Tensor, axis: int, size: int, scale: float) -> Tensor:
    mode, old = said.get("mode", "nearest"), x.shape[axis]
    places = _places(said, old, size, scale)
    if mode == "nearest":
        return x.index_select(axis, _nearest(said, places, scale).clamp(0, old - 1))
    if mode == "linear":
        places = places.clamp(0, old - 1)
        first = places.floor()
        near, shares = [first, first + 1], [1 - (places - first), places - first]
    else:
        first = places.floor()
        near = [first - 1, first, first + 1, first + 2]
        shares = _cubic(places - first, said.get("cubic_coeff_a", -0.75))
        if said.get("exclude_outside", 0):
            shares = [s * ((n >= 0) & (n < old)) for s, n in zip(shares, near, strict=True)]
            total = torch.stack(shares).sum(0)
            shares = [share / total for share in shares]
    shape = [-1 if at == axis else 1 for at in range(x.dim())]
    parts = [x.index_select(axis, n.long().clamp(0, old - 1)) for n in near]
    weighted = [p * s.reshape(shape).to(x.dtype) for p, s in zip(parts, shares, strict=True)]
    return torch.stack(weighted).sum(0) if len(weighted) > 2 else weighted[0] + weighted[1]


def _places(said: Said, old: int, new: int, scale: float) -> Tensor:
    """Return where the new numbers lie between the old ones; in float32, as onnxruntime computes it."""
    default = "half_pixel" if said.opset >= 11 else "asymmetric"
    mode = said.get("coordinate_transformation_mode", default)
    at = torch.arange(new, dtype=torch.float32)
    # Example of 2 numbers made 4, scale 2: asymmetric 0 0.5 1 1.5, half_pixel -0.25 0.25 0.75 1.25,
    # align_corners 0 1/3 2/3 1.
    if mode == "asymmetric":
        return at / scale
    if mode == "align_corners":
        return at * (old - 1) / (new - 1) if new > 1 else at * 0
    if mode == "pytorch_half_pixel" and new == 1:
        return at * 0
    if mode == "half_pixel_symmetric":
        middle = old / 2
        return middle * (1 - new / (scale * old)) + (at + 0.5) / scale - 0.5
    return (at + 0.5) / scale - 0.5


def _nearest(said: Said, places: Tensor, scale: float) -> Tensor:
    if said.opset < 11:
        return (places.ceil() if scale < 1 else places.floor()).long()
    mode = said.get("nearest_mode", "round_prefer_floor")
    if mode == "floor":
        return places.floor().long()
    if mode == "ceil":
        return places.ceil().long()
    # 2.5 goes to 3 here, and to 2 in the last line; 2.4 and 2.6 go to 2 and 3 in both.
    if mode == "round_prefer_ceil":
        return (places + 0.5).floor().long()
    return (places - 0.5).ceil().long()


def _cubic(t: Tensor, a: float) -> list[Tensor]:
    """Return the shares of the four numbers around a place, of which ``t`` is the part behind the second."""
    # Keys' kernel W at the distances 1 + t, t, 1 - t and 2 - t: (a + 2) d^3 - (a + 3) d^2 + 1 up to 1, and a d^3 - 5 a
    # d^2 + 8 a d - 4 a up to 2. The four sum to 1: for t = 1/2 and a = -3/4, -3/32, 19/32, 19/32, -3/32.
    return [
        ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a,
        ((a + 2) * t - (a + 3)) * t * t + 1,
        ((a + 2) * (1 - t) - (a + 3)) * (1 - t) * (1 - t) + 1,
        ((a * (2 - t) - 5 * a) * (2 - t) + 8 * a) * (2 - t) - 4 * a,
    ]


def _grid_sample(said: Said, x: Tensor, grid: Tensor) -> Tensor | None:
    mode = {"bilinear": "bilinear", "linear": "bilinear", "nearest": "nearest"}.get(said.get("mode", "linear"))
    if mode is None or x.dim() != 4:
        return None
    padding: Any = said.get("padding_mode", "zeros")
    return F.grid_sample(x, grid, mode, padding, bool(said.get("align_corners", 0)))


WINDOWS: dict[str, Op] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(lambda x, axes: x.mean(axes, keepdim=True)),
    "GlobalMaxPool": _global(lambda x, axes: x.amax(axes, keepdim=True)),
    "GridSample": _grid_sample,
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Upsample": _resize,
}
