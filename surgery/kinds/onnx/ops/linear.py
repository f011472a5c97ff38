"""Linear operators: products of matrices, convolutions, and sums over indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.kinds.onnx.ops.said import Op, Said

__all__ = ["LINEAR", "padded", "pads_around", "same_pads"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def pads_around(
    said: Said, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the pads before and after each axis, as ``pads`` says, or as ``auto_pad`` asks for inputs of a size."""
    dims, auto = len(kernel), said.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [(0, 0)] * dims
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        pads = said.get("pads", [0] * 2 * dims)
        return list(zip(pads[:dims], pads[dims:], strict=True))
    rows = zip(sizes, kernel, stride, dilation, strict=True)
    return [same_pads(size, k, s, d, lower=auto == "SAME_LOWER") for size, k, s, d in rows]


def same_pads(size: int, kernel: int, stride: int, dilation: int, *, lower: bool) -> tuple[int, int]:
    """Return the pads of an axis by which the output has the input's size, divided by the stride and rounded up.

    ceil(size / stride) windows of span d (k - 1) + 1 fit with them. With stride 1 they are the same for all sizes.

    >>> same_pads(5, 3, 2, 1, lower=False), same_pads(6, 3, 2, 1, lower=False)
    ((1, 1), (0, 1))
    """
    total = max(0, (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
    small, large = total // 2, total - total // 2
    return (large, small) if lower else (small, large)


def padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Return a tensor with numbers around its last axes; negative pads crop it."""
    return F.pad(x, [side for pair in reversed(pads) for side in pair], value=value)


def _conv(said: Said, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    dims = weight.dim() - 2
    if dims not in _CONV:
        return None
    stride, dilation = tuple(said.get("strides", (1,) * dims)), tuple(said.get("dilations", (1,) * dims))
    pads = pads_around(said, x.shape[2:], weight.shape[2:], stride, dilation)
    even = all(before == after >= 0 for before, after in pads)
    padding = tuple(before if even else 0 for before, _ in pads)
    x = x if even else padded(x, pads)
    return _CONV[dims](x, weight, bias, stride, padding, dilation, said.get("group", 1))


def _conv_transpose(said: Said, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    dims = weight.dim() - 2
    if dims not in _TRANSPOSED or "output_shape" in said.attributes:
        return None
    if said.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    stride, dilation = tuple(said.get("strides", (1,) * dims)), tuple(said.get("dilations", (1,) * dims))
    extra, groups = tuple(said.get("output_padding", (0,) * dims)), said.get("group", 1)
    pads = pads_around(said, x.shape[2:], weight.shape[2:], stride, dilation)
    even = all(before == after for before, after in pads)
    if even and all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        padding = tuple(before for before, _ in pads)
        return _TRANSPOSED[dims](x, weight, bias, stride, padding, extra, groups, dilation)
    # All (n - 1) s + d (k - 1) + 1 numbers, then pads as crops. Example of pads (1, 0) and output_padding 1: -1 and +1.
    y = _TRANSPOSED[dims](x, weight, None, stride, 0, 0, groups, dilation)
    y = padded(y, [(-before, e - after) for (before, after), e in zip(pads, extra, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *[1] * dims)


def _gemm(said: Said, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = a.mT if said.get("transA", 0) else a, b.mT if said.get("transB", 0) else b
    alpha, beta = said.get("alpha", 1.0), said.get("beta", 1.0)
    if not a.is_floating_point():
        alpha, beta = int(alpha), int(beta)
    if c is not None and c.dim() <= 2:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    return a @ b if alpha == 1 else alpha * (a @ b)


def _einsum(said: Said, *inputs: Tensor) -> Tensor:
    return torch.einsum(said.get("equation"), *inputs)


def _fused_matmul(said: Said, a: Tensor, b: Tensor) -> Tensor | None:
    if said.get("transBatchA", 0) or said.get("transBatchB", 0):
        return None
    a, b = a.mT if said.get("transA", 0) else a, b.mT if said.get("transB", 0) else b
    return said.get("alpha", 1.0) * (a @ b)


# -- attention ---------------------------------------------------------------------------------------------------------


def _attention(said: Said, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *more: Any) -> Tensor | None:
    """The attention of version 23, without a cache and a soft cap."""
    if any(each is not None for each in more) or said.outputs > 1 or said.get("softcap", 0.0):
        return None
    flat = q.dim() == 3
    if flat:
        heads, shared = said.get("q_num_heads"), said.get("kv_num_heads")
        # (N, L, heads D) -> (N, heads, L, D)
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = (each.unflatten(-1, (shared, -1)).transpose(1, 2) for each in (k, v))
    if mask is not None and mask.shape[-1] != k.shape[-2]:
        return None
    if k.shape[1] != q.shape[1]:
        # Example of 8 heads of queries and 2 of keys: heads 0 to 3 read head 0, heads 4 to 7 head 1.
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scale = said.get("scale") or 1 / math.sqrt(q.shape[-1])
    # (N, heads, L, D) @ (N, heads, D, S)
    scores = q @ k.mT * scale
    if said.get("is_causal", 0):
        # Query l sees key s <= l.
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    y = torch.softmax(scores, -1) @ v
    return y.transpose(1, 2).flatten(-2) if flat else y


LINEAR: dict[str, Op] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": lambda said, a, b: torch.matmul(a, b),
    "com.microsoft.FusedMatMul": _fused_matmul,
}
