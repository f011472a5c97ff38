"""Composition: the one operator that several steps are, exactly, or the reason why they are not one.

Two neighbours compose as matrices do, layer by layer (``compose``); convolutions have rules of their own
(``convolutions``). Branches are one operator if each of them is and all have the same form: kernels and biases add up.
An embedding followed by a linear layer is one embedding, whose rows are what the layer makes of its rows.

Reshapes come in two places:

- A ring's middle: channels (c n) are split, a convolution over one more dimension acts on c with a kernel of extent 1
  along n, and the channels are flattened again. That is the convolution with the kernel ``K (x) I_n``.
- Linear layers act on the last axis, and reshapes, transposes and shifts on the axes that it was split into. Such steps
  never see an axis in front of it, which the count of split axes proves. So they are one linear layer, and its weight
  is what the steps make of the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgery.algebra.convolutions import compose_convolutions
from surgery.algebra.operators import Conv, Embedding, Linear, Operator
from surgery.algebra.steps import Branches, Flatten, Link, Shift, Step, Transpose, Unflatten
from surgery.errors import Refusal

__all__ = ["add", "compose", "compose_steps"]


def compose_steps(steps: Sequence[Step]) -> Operator | Refusal:
    """Return the one operator that applies all steps in order, or the reason why they are not one.

    Computed in float64 and given back in the dtype of the first operator.
    """
    parts = _fold_rings(steps)
    for at, part in enumerate(parts):
        if isinstance(part, Branches):
            summed = add([compose_steps(row) for row in part.rows])
            if isinstance(summed, Refusal):
                return summed
            parts[at] = summed
    if any(isinstance(part, Link) for part in parts):
        return _compose_features(parts)
    operators = [part for part in parts if isinstance(part, Operator)]
    composed: Operator | Refusal = operators[0]
    for operator in operators[1:]:
        if isinstance(composed, Refusal):
            break
        composed = compose(composed, operator)
    return composed


def add(operators: Sequence[Operator | Refusal]) -> Operator | Refusal:
    """Return the operator that is the sum of several, or the reason why they do not sum to one."""
    found = [operator for operator in operators if isinstance(operator, Operator)]
    if len(found) < len(operators):
        return next(operator for operator in operators if isinstance(operator, Refusal))
    first = found[0]
    if len({operator.form.unbiased for operator in found}) > 1 or first.reads_indices:
        return Refusal("the branches of a sum differ in their form")
    weight = sum((operator.weight.double() for operator in found[1:]), first.weight.double())
    biases = [operator.bias.double() for operator in found if operator.bias is not None]
    bias = sum(biases[1:], biases[0]).to(first.weight.dtype) if biases else None
    return replace(first, weight=weight.to(first.weight.dtype), bias=bias)


def _fold_rings(steps: Sequence[Step]) -> list[Step]:
    """Put one convolution in the place of each split, convolution over one more dimension, and flatten."""
    # Invariant: what stands from ``at`` on is folded already, so that going backwards never meets a triple twice.
    # For example [conv A, split, conv B over one more dimension, flatten, conv C] becomes [A, B (x) I, C].
    parts: list[Step] = list(steps)
    for at in range(len(parts) - 3, -1, -1):
        split, conv, join = parts[at : at + 3]
        if not (isinstance(split, Unflatten) and isinstance(conv, Conv) and isinstance(join, Flatten)):
            continue
        folded = _fold_ring(split, conv, join)
        if folded is not None:
            parts[at : at + 3] = [folded]
    return parts


def _fold_ring(split: Unflatten, conv: Conv, join: Flatten) -> Conv | None:
    """Return the convolution that the three are; None where the middle one does more than act on c alone.

    With n = 2 copies, a 1x1 kernel K of shape (s, r) becomes ``K (x) I_2``, which maps channel (j, b) to (i, b) by
    K[i, j]: the channels of a copy only meet channels of the same copy.
    """
    g, dims = conv.geometry, conv.geometry.dims - 1
    inner = conv.kernel_size[0] == 1 and g.along({0}) == replace(g.along(()), dilation=g.along({0}).dilation)
    axes = (split.dim, join.start, join.end) == (-dims - 1, -dims - 2, -dims - 1)
    if not (inner and axes and len(split.sizes) == 2 and conv.bias is None and dims):
        return None
    copies = split.sizes[1]
    eye = torch.eye(copies, dtype=conv.weight.dtype, device=conv.weight.device)
    core = conv.kernel.squeeze(3)
    kernel = torch.einsum("grsk,ab->grasbk", core.flatten(3), eye)
    groups, rows, columns = core.shape[0], core.shape[1] * copies, core.shape[2] * copies
    geometry = replace(
        g,
        stride=g.stride[1:],
        padding=g.padding[1:],
        dilation=g.dilation[1:],
        output_padding=g.output_padding[1:],
    )
    return Conv.from_kernel(kernel.reshape(groups, rows, columns, *core.shape[3:]), geometry)


def _compose_features(steps: Sequence[Step]) -> Linear | Refusal:
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
        return depth + step.start - step.end if -step.start <= depth else 0
    if isinstance(step, Transpose):
        return depth if -step.first <= depth else 0
    if isinstance(step, Shift):
        return depth if depth == 1 else 0
    return depth if isinstance(step, Linear) else 0


def compose(first: Operator, second: Operator) -> Operator | Refusal:
    """Return the one operator that applies ``first``, then ``second``, or the reason why they are not one.

    Computed in float64 and given back in the dtype of ``first``.
    """
    if isinstance(first, Linear) and isinstance(second, Linear):
        return _compose_linear(first, second)
    if isinstance(first, Conv) and isinstance(second, Conv):
        return compose_convolutions(first, second)
    if isinstance(first, Embedding) and isinstance(second, Linear):
        rows = second.to(dtype=torch.float64)(first.weight.double())
        return replace(first, weight=rows.to(first.weight.dtype))
    return Refusal(f"{type(first).__name__} and {type(second).__name__} do not act on the same axes")


def _compose_linear(first: Linear, second: Linear) -> Linear:
    weight = second.weight.double() @ first.weight.double()
    bias = _carry_bias(first.bias, second.weight.double(), second.bias)
    return Linear(weight.to(first.weight.dtype), bias=None if bias is None else bias.to(first.weight.dtype))


def _carry_bias(bias: Tensor | None, matrix: Tensor, own: Tensor | None) -> Tensor | None:
    if bias is None:
        return own
    carried = matrix @ bias.double()
    return carried if own is None else carried + own.double()
