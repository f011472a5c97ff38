"""Operators that move numbers without changing them: reshapes, slices, pads, and those that say shapes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.errors import InputError
from surgery.kinds.onnx.ops.said import Op, Said, axes_of, ints
from surgery.kinds.onnx.tensors import to_torch, torch_dtype
from surgery.system.memory import available_memory

__all__ = ["SHAPES"]

_LARGE = 2**30  # bytes


def _shape(said: Said, x: Tensor) -> Tensor:
    sizes = list(x.shape)[said.get("start", 0) : said.get("end")]
    return torch.tensor(sizes, dtype=torch.int64)


def _reshape(said: Said, x: Tensor, shape: Tensor | None = None) -> Tensor:
    sizes = ints(said.get("shape") if shape is None else shape)
    if not said.get("allowzero", 0):
        sizes = [x.shape[at] if size == 0 else size for at, size in enumerate(sizes)]
    if -1 in sizes:  # torch does not infer a size beside a zero
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = x.numel() // rest if rest else 0
    return x.reshape(sizes)


def _flatten(said: Said, x: Tensor) -> Tensor:
    axis = said.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(said: Said, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = axes_of(said, axes, x.dim())
    return x.squeeze() if found is None else x.squeeze(tuple(found))


def _unsqueeze(said: Said, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = ints(said.get("axes") if axes is None else axes)
    for axis in sorted(axis % (x.dim() + len(given)) for axis in given):
        x = x.unsqueeze(axis)
    return x


def _transpose(said: Said, x: Tensor) -> Tensor:
    return x.permute(tuple(said.get("perm", range(x.dim() - 1, -1, -1))))


def _concat(said: Said, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, said.get("axis", 1))


def _split(said: Said, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = said.get("axis", 0)
    given = said.get("split") if sizes is None else sizes
    if given is not None:
        return torch.split(x, ints(given), axis)
    parts = said.get("num_outputs", said.named)
    return torch.split(x, max(1, math.ceil(x.shape[axis] / parts)), axis)


def _slice(
    said: Said,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = ints(said.get("starts") if starts is None else starts)
    last = ints(said.get("ends") if ends is None else ends)
    along = axes_of(said, axes, x.dim()) or range(len(first))
    by = [1] * len(first) if steps is None else ints(steps)
    index: list[Any] = [slice(None)] * x.dim()
    for axis, start, end, step in zip(along, first, last, by, strict=True):
        # A range that is sliced has its ends clamped, as ONNX wants it: of 5 numbers, 3:100 are 3 and 4.
        chosen = range(x.shape[axis])[slice(start, end, step) if step > 0 else _backwards(start, end, step, x, axis)]
        if step > 0:
            index[axis] = slice(chosen.start, max(chosen.start, chosen.stop), step)
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x[tuple(index)]


def _backwards(start: int, end: int, step: int, x: Tensor, axis: int) -> slice:
    """Return the slice of a negative step; an end below -size means that the first number is taken too."""
    return slice(start, None if end < -x.shape[axis] else end, step)


def _pad(
    said: Said, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor | None:
    given = ints(said.get("pads") if pads is None else pads)
    half = len(given) // 2
    along = [axis % x.dim() for axis in ints(axes)] if axes is not None else list(range(half))
    pairs = [(0, 0)] * x.dim()
    for axis, before, after in zip(along, given[:half], given[half:], strict=True):
        pairs[axis] = before, after
    mode = said.get("mode", "constant")
    if mode == "constant":
        filled = said.get("value", 0.0) if value is None or not value.numel() else value.item()
        return F.pad(x, [side for pair in reversed(pairs) for side in pair], value=filled)
    if mode not in ("reflect", "edge", "wrap") or any(side < 0 for pair in pairs for side in pair):
        return None
    for axis, (before, after) in enumerate(pairs):
        if before or after:
            x = x.index_select(axis, _padding_indices(mode, before, x.shape[axis], after))
    return x


def _padding_indices(mode: str, before: int, size: int, after: int) -> Tensor:
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    # A reflection repeats itself after going there and back. Example of four numbers with two before and after: places
    # -2 .. 5 modulo 6 are 4 5 0 1 2 3 4 5, and those from 4 on go back: 2 1 0 1 2 3 2 1.
    period = max(1, 2 * (size - 1))
    places = places % period
    return torch.where(places < size, places, period - places)


def _expand(said: Said, x: Tensor, shape: Tensor) -> Tensor:
    sizes = torch.broadcast_shapes(x.shape, tuple(ints(shape)))
    needed = math.prod(sizes) * x.element_size()
    # torch repeats numbers without memory, so that nothing would end what reads them
    if needed > _LARGE and needed > (available_memory() or math.inf):
        raise InputError(f"an Expand gives {needed} bytes", allowed="what fits into memory")
    return x.expand(sizes)


def _tile(said: Said, x: Tensor, repeats: Tensor, axis: Tensor | None = None) -> Tensor | None:
    return x.repeat(ints(repeats)) if axis is None else None


def _range(said: Said, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _constant_of_shape(said: Said, shape: Tensor) -> Tensor:
    value = said.get("value")
    filled = torch.zeros(1) if value is None else to_torch(value)
    return torch.full(ints(shape), filled.item(), dtype=filled.dtype)


def _eye_like(said: Said, x: Tensor) -> Tensor | None:
    to = x.dtype if said.get("dtype") is None else torch_dtype(said.get("dtype"))
    if to is None:
        return None
    rows, columns = x.shape
    return torch.eye(rows, columns, dtype=to) if not said.get("k", 0) else None


def _trilu(said: Said, x: Tensor, k: Tensor | None = None) -> Tensor:
    place = 0 if k is None else int(k.item())
    return torch.triu(x, place) if said.get("upper", 1) else torch.tril(x, place)


def _depth_to_space(said: Said, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = said.get("blocksize")
    # Channel (i b + j) c + k (DCR), or k b^2 + i b + j (CRD), goes to channel k, row h b + i, column w b + j.
    if said.get("mode", "DCR") == "DCR":
        x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // (b * b), h * b, w * b)


def _space_to_depth(said: Said, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = said.get("blocksize")
    # Channel k at row h b + i, column w b + j goes to channel (i b + j) c + k: the inverse of DCR.
    x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)


# -- sequences and optional values: lists of tensors, and None ---------------------------------------------------------


def _at(sequence: list[Tensor], position: Tensor | None) -> int:
    return len(sequence) if position is None else int(position.item())


def _insert(said: Said, sequence: list[Tensor], x: Tensor, position: Tensor | None = None) -> list[Tensor]:
    at = _at(sequence, position)
    at = at + len(sequence) if at < 0 else at
    return [*sequence[:at], x, *sequence[at:]]


def _erase(said: Said, sequence: list[Tensor], position: Tensor | None = None) -> list[Tensor]:
    at = len(sequence) - 1 if position is None else _at(sequence, position) % len(sequence)
    return [*sequence[:at], *sequence[at + 1 :]]


def _concat_sequence(said: Said, sequence: list[Tensor]) -> Tensor:
    join = torch.stack if said.get("new_axis", 0) else torch.cat
    return join(sequence, said.get("axis"))


def _split_sequence(said: Said, x: Tensor, split: Tensor | None = None) -> list[Tensor]:
    axis = said.get("axis", 0)
    if split is None:
        parts = torch.split(x, 1, axis)
        return list(parts) if said.get("keepdims", 1) else [part.squeeze(axis) for part in parts]
    return list(torch.split(x, int(split.item()) if split.dim() == 0 else ints(split), axis))


SHAPES: dict[str, Op] = {
    "Concat": _concat,
    "ConcatFromSequence": _concat_sequence,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "OptionalHasElement": lambda said, x=None: torch.tensor(x is not None),
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "SequenceAt": lambda said, sequence, position: sequence[int(position.item())],
    "SequenceConstruct": lambda said, *inputs: list(inputs),
    "SequenceEmpty": lambda said: [],
    "SequenceErase": _erase,
    "SequenceInsert": _insert,
    "SequenceLength": lambda said, sequence: torch.tensor(len(sequence)),
    "Shape": _shape,
    "Size": lambda said, x: torch.tensor(x.numel()),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "SplitToSequence": _split_sequence,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
