"""Composition over reshapes: steps on the last axis, and on the axes that it is split into, are one linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery.algebra.operators import Linear, Operator
from surgery.algebra.steps import Flatten, Shift, Step, Transpose, Unflatten
from surgery.errors import Refusal

__all__ = ["compose_features"]


def compose_features(steps: Sequence[Step]) -> Linear | Refusal:
    """Return the linear layer that steps on the last axis are, or the reason why they are none."""
    first = next((step for step in steps if isinstance(step, Operator)), None)
    if not isinstance(first, Linear):
        return Refusal("reshapes between its operators are more than a split of the last axis")
    # Invariant: ``depth`` is how many axes the original last axis is split into. A step that reaches no axis beyond
    # them cannot see the rows in front, so that the identity, given row by row, shows all that the steps do. Example:
    # split 6 = 2 x 3 (depth 2), transpose the two, flatten (depth 1) is the 6 x 6 permutation that they make of I_6.
    depth, width = 1, _in_features(steps)
    for step in steps:
        depth = _depth(step, depth)
        if not depth:
            return Refusal("a reshape between its operators reaches the axes in front")
    if depth > 1 or width is None:
        return Refusal("its operators act on a part of the last axis only")
    size = width
    wide = [step.to(dtype=torch.float64) for step in steps]
    rows = torch.eye(size, dtype=torch.float64, device=first.weight.device)
    offset = rows.new_zeros(1, size)
    for step in wide:  # apart, since weights may be far smaller than biases
        rows, offset = _without_bias(step)(rows), step(offset)
    shifted = any(step.bias is not None for step in steps if isinstance(step, Operator | Shift))
    # What the steps make of I is I W^T.
    weight, dtype = rows.mT.contiguous(), first.weight.dtype
    return Linear(weight.to(dtype), bias=offset[0].to(dtype) if shifted else None)


def _without_bias(step: Step) -> Step:
    if isinstance(step, Operator):
        return step.with_bias(None)
    return Shift(torch.zeros_like(step.bias)) if isinstance(step, Shift) else step


def _in_features(steps: Sequence[Step]) -> int | None:
    """Return the size of the last axis that the first steps need; None where they do not say."""
    for step in steps:
        if isinstance(step, Linear):
            return step.in_channels
        if isinstance(step, Unflatten):
            return math.prod(step.sizes) if step.dim == -1 else None
        if isinstance(step, Shift):
            return step.bias.numel()
    return None


def _depth(step: Step, depth: int) -> int:
    """Return how many axes the last one is split into after a step; 0 if the step reaches any other."""
    if isinstance(step, Unflatten):
        return depth + len(step.sizes) - 1 if -step.dim <= depth else 0
    if isinstance(step, Flatten):
        # Example: flattening the axes -2 and -1 makes depth 3 into 3 - 2 + 1 = 2.
        return depth + step.start - step.end if -step.start <= depth else 0
    if isinstance(step, Transpose):
        return depth if -step.first <= depth else 0
    if isinstance(step, Shift):
        return depth if depth == 1 else 0
    return depth if isinstance(step, Linear) else 0
