"""Operators that pick numbers by index, or find indices: gathers, scatters, the largest numbers, sums so far."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgery.kinds.onnx.ops.said import Op, Said, wrapped

__all__ = ["INDEXING"]

_REDUCED = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _gather(said: Said, x: Tensor, indices: Tensor) -> Tensor:
    axis = said.get("axis", 0) % x.dim()
    # Example of x (5, 8) and indices (2, 3) along axis 0: (6, 8), then (2, 3, 8).
    found = x.index_select(axis, wrapped(indices, x.shape[axis]).flatten())
    return found.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _gather_elements(said: Said, x: Tensor, indices: Tensor) -> Tensor:
    axis = said.get("axis", 0) % x.dim()
    return torch.gather(x, axis, wrapped(indices, x.shape[axis]))


def _gather_nd(said: Said, x: Tensor, indices: Tensor) -> Tensor:
    batch, depth = said.get("batch_dims", 0), indices.shape[-1]
    shape = (*indices.shape[:-1], *x.shape[batch + depth :])
    # Example of x (2, 3, 4), one batch axis and indices (2, 5, 1): row r of five picks from x[r],
    # and the result is (2, 5, 4).
    rows = math.prod(x.shape[:batch])
    x, indices = x.reshape(rows, *x.shape[batch:]), indices.reshape(rows, -1, depth)
    places = [wrapped(indices[..., at], x.shape[1 + at]) for at in range(depth)]
    return x[(torch.arange(rows)[:, None], *places)].reshape(shape)


def _scatter_elements(said: Said, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = said.get("axis", 0) % x.dim(), said.get("reduction", "none")
    indices = wrapped(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, indices, updates)
    return torch.scatter_reduce(x, axis, indices, updates, _REDUCED[reduction])


def _scatter_nd(said: Said, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor | None:
    depth, reduction = indices.shape[-1], said.get("reduction", "none")
    places = [wrapped(indices[..., at], x.shape[at]) for at in range(depth)]
    if reduction in ("none", "add"):
        return torch.index_put(x, tuple(places), updates, accumulate=reduction == "add")
    # the first axes as one, and the same index for all numbers of a row
    # Example of x (2, 3, 4) and indices of two numbers: the strides are 3 and 1, and place (1, 2) is row 5.
    strides = [math.prod(x.shape[at + 1 : depth]) for at in range(depth)]
    rows = sum(place * stride for place, stride in zip(places, strides, strict=True))
    flat, more = x.reshape(math.prod(x.shape[:depth]), -1), updates.reshape(indices[..., 0].numel(), -1)
    index = torch.as_tensor(rows).reshape(-1, 1).expand_as(more)
    return torch.scatter_reduce(flat, 0, index, more, _REDUCED[reduction]).reshape(x.shape)


def _one_hot(said: Said, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    size, axis = int(depth.item()), said.get("axis", -1)
    axis = axis + indices.dim() + 1 if axis < 0 else axis
    # an index out of bounds gives no hot number
    places = wrapped(indices, size).unsqueeze(axis)
    shape = [1] * (indices.dim() + 1)
    shape[axis] = size
    return torch.where(places == torch.arange(size).reshape(shape), values[1], values[0])


def _nonzero(said: Said, x: Tensor) -> Tensor:
    return torch.nonzero(x).T if x.dim() else torch.zeros(0, int(bool(x)), dtype=torch.int64)


def _top_k(said: Said, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count = said.get("k") if k is None else int(k.item())
    axis, largest = said.get("axis", -1), bool(said.get("largest", 1))
    # a stable sort: of equal numbers, the first comes first
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _arg(said: Said, x: Tensor) -> Tensor:
    axis, keep = said.get("axis", 0), bool(said.get("keepdims", 1))
    find = torch.argmax if said.op_type == "ArgMax" else torch.argmin
    if not said.get("select_last_index", 0):
        return find(x, axis, keep)
    # The first from behind is the last: of four numbers, place 0 of the flipped ones is place 3.
    return x.shape[axis] - 1 - find(x.flip(axis), axis, keep)


def _cum_sum(said: Said, x: Tensor, axis: Tensor) -> Tensor:
    at, reverse = int(axis.item()), said.get("reverse", 0)
    turned = x.flip(at) if reverse else x
    found = torch.cumsum(turned, at, dtype=x.dtype)
    # Without the number itself: 1 2 3 gives 0 1 3, and in reverse 5 3 0.
    if said.get("exclusive", 0):
        found = torch.cat([torch.zeros_like(found.narrow(at, 0, 1)), found.narrow(at, 0, x.shape[at] - 1)], at)
    return found.flip(at) if reverse else found


def _compress(said: Said, x: Tensor, condition: Tensor) -> Tensor:
    axis = said.get("axis")
    x, axis = (x.flatten(), 0) if axis is None else (x, axis)
    return x.index_select(axis, torch.nonzero(condition).flatten())


INDEXING: dict[str, Op] = {
    "ArgMax": _arg,
    "ArgMin": _arg,
    "Compress": _compress,
    "CumSum": _cum_sum,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _nonzero,
    "OneHot": _one_hot,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}
