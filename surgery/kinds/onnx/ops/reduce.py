"""Operators that reduce axes or normalise over them: sums, means, softmax, the kinds of normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.kinds.onnx.ops.said import Op, Said, axes_of

__all__ = ["REDUCTIONS"]


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Op:
    def run(said: Said, x: Tensor, axes: Tensor | None = None) -> Tensor:
        along = axes_of(said, axes, x.dim())
        if not along and said.get("noop_with_empty_axes", 0):
            # each number is reduced on its own
            return function(x.unsqueeze(-1), [x.dim()], False)
        return function(x, along or list(range(x.dim())), bool(said.get("keepdims", 1)))

    return run


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not x.is_floating_point():
        count = math.prod(x.shape[axis] for axis in axes)
        return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")
    return x.mean(axes, keep) if axes else x


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.linalg.vector_norm(x, dim=axes or None, keepdim=keep)


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep) if axes else x


def _over_rest(function: Callable[..., Tensor]) -> Op:
    """Return a softmax: over one axis; before version 13, over all axes from that one on."""

    def run(said: Said, x: Tensor) -> Tensor:
        if said.opset >= 13:
            return function(x, dim=said.get("axis", -1))
        axis = said.get("axis", 1)
        axis = axis + x.dim() if axis < 0 else axis
        # Example of (2, 3, 4) with axis 1: two rows of twelve numbers, each of which sums to 1.
        rows = math.prod(x.shape[:axis])
        return function(x.reshape(rows, -1), dim=-1).reshape(x.shape)

    return run


def _batch_norm(said: Said, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor | None:
    old = said.opset < 7 or not said.get("spatial", 1)  # they may train, or have a mean for each place
    if old or said.get("training_mode", 0) or x.dim() < 2:
        return None
    mean, variance, scale, bias = (each.to(x.dtype) for each in (mean, variance, scale, bias))
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, said.get("epsilon", 1e-5))


def _instance_norm(said: Said, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    # by the moments: torch refuses a channel of one number
    axes = list(range(2, x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    shape = (1, -1, *[1] * len(axes))
    return (x - mean) * torch.rsqrt(variance + said.get("epsilon", 1e-5)) * scale.reshape(shape) + bias.reshape(shape)


def _layer_norm(said: Said, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axis, epsilon = said.get("axis", -1) % x.dim(), said.get("epsilon", 1e-5)
    if said.outputs == 1 and scale.shape == x.shape[axis:] and scale.dtype == x.dtype:
        return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, list(range(axis, x.dim())), correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + epsilon)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias, mean, inverse)[: said.outputs]


def _rms_norm(said: Said, x: Tensor, scale: Tensor) -> Any:
    axis, wide = said.get("axis", -1) % x.dim(), x if x.dtype == torch.float64 else x.float()
    axes = list(range(axis, x.dim()))
    inverse = torch.rsqrt(wide.square().mean(axes, keepdim=True) + said.get("epsilon", 1e-5))
    y = (wide * inverse).to(x.dtype) * scale
    return y if said.outputs == 1 else None


def _group_norm(said: Said, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = said.get("num_groups")
    if said.opset < 21:  # one number for each group
        scale, bias = (each.repeat_interleave(x.shape[1] // groups) for each in (scale, bias))
    return F.group_norm(x, groups, scale.to(x.dtype), bias.to(x.dtype), said.get("epsilon", 1e-5))


def _lp_norm(said: Said, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, said.get("p", 2), said.get("axis", -1), keepdim=True)
    return x / norm.clamp(min=torch.finfo(x.dtype).tiny)


def _mean_variance(said: Said, x: Tensor) -> Tensor:
    axes = list(said.get("axes", (0, 2, 3)))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)


def _local_norm(said: Said, x: Tensor) -> Tensor | None:
    size = said.get("size")
    if size % 2 == 0:
        return None
    return F.local_response_norm(x, size, said.get("alpha", 1e-4), said.get("beta", 0.75), said.get("bias", 1.0))


def _skip_norm(said: Said, x: Tensor, skip: Tensor, scale: Tensor, *more: Tensor | None) -> Any:
    """The norm of a sum, of com.microsoft; its outputs in the middle are not asked for outside of training."""
    simple = said.op_type.startswith("SkipSimplified")
    shifts = more if simple else more[1:]
    total = x + skip
    for shift in shifts:
        total = total if shift is None else total + shift
    epsilon = said.get("epsilon", 1e-12 if not simple else 1e-6)
    if simple:
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + epsilon) * scale
    else:
        y = F.layer_norm(total, x.shape[-1:], scale, more[0] if more else None, epsilon)
    return y if said.outputs == 1 else (y, None, None, total)


REDUCTIONS: dict[str, Op] = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _over_rest(torch.log_softmax),
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": _rms_norm,
    "ReduceL1": _reduction(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(lambda x, axes, keep: _sum(x, axes, keep).log()),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "SimplifiedLayerNormalization": _rms_norm,
    "Softmax": _over_rest(torch.softmax),
    "com.microsoft.SkipLayerNormalization": _skip_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_norm,
}
