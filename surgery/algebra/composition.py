"""Composition: contract the steps of a chain back to the one operator that they are.

They are one when, along each dimension,

- one of them is trivial there (kernel 1, stride 1, no padding): the other's geometry holds;
- or B does not pad: taps add up, ``t = u dA + v sA dB``, with stride sA sB and A's padding;
- or A is a bare stride (kernel 1, no padding): B's geometry scaled by sA.

B's zero padding puts zeros where A would have put its bias, so that a biased A under a zero-padded B is refused.
Groups: both are written with gcd(gA, gB) groups, as block-diagonal kernels.

Two neighbours compose as matrices do, layer by layer; convolutions have the rules above. Branches are one operator if
each of them is and all have the same form: kernels and biases add up. An embedding followed by a linear layer is one
embedding, whose rows are what the layer makes of its rows.

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
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.algebra.features import compose_features
from surgery.algebra.operators import Conv, Embedding, Geometry, Linear, Operator, PaddingMode
from surgery.algebra.steps import Branches, Flatten, Link, Step, Unflatten
from surgery.errors import Refusal

__all__ = ["BLOCK", "add", "compose", "compose_convolutions", "compose_steps"]

BLOCK = 2**20  # numbers that are in float64 at once


def compose_convolutions(first: Conv, second: Conv) -> Conv | Refusal:
    """Return the one convolution that applies ``first``, then ``second``, or the reason why they are not one.

    >>> a, b = (Conv(torch.ones(1, 1, k), Geometry.pointwise(1)) for k in (2, 3))
    >>> compose_convolutions(a, b).weight.tolist()  # (1 + z) (1 + z + z^2)
    [[[1.0, 2.0, 2.0, 1.0]]]
    """
    if first.geometry.dims != second.geometry.dims:
        return Refusal("the convolutions have different numbers of dimensions")
    merged = _merge_geometry(first, second)
    if isinstance(merged, Refusal):
        return merged
    bias = _merge_bias(first, second)
    if isinstance(bias, Refusal):
        return bias
    geometry, steps = merged
    groups = math.gcd(first.groups, second.groups)
    dtype = first.weight.dtype
    kernel = _contract(
        _stuff(_regroup(first.kernel, groups), [a for a, _ in steps]),
        _stuff(_regroup(second.kernel, groups), [b for _, b in steps]),
        dtype,
    )
    return Conv.from_kernel(kernel, geometry, None if bias is None else bias.to(dtype))


def _merge_bias(first: Conv, second: Conv) -> Tensor | Refusal | None:
    if first.bias is None or not bool(first.bias.any()):
        return second.bias
    if second.geometry.padded and second.geometry.padding_mode == "zeros":
        return Refusal("the first convolution has a bias and the second pads with zeros, so the border differs")
    if second.geometry.transposed and not second.pointwise:
        return Refusal("the first convolution has a bias and the second is transposed, so the border differs")
    # To the second, the bias of the first is a constant input: each output gets it times the
    # sum of its taps, (g, o, i).
    taps = second.kernel.double().flatten(3).sum(-1)
    carried = torch.einsum("goi,gi->go", taps, first.bias.double().view(second.groups, -1)).flatten()
    return carried if second.bias is None else carried + second.bias.double()


@dataclass(frozen=True)
class _Axis:
    """One dimension of a convolution."""

    kernel: int
    stride: int
    padding: tuple[int, int]
    dilation: int
    output_padding: int

    @property
    def trivial(self) -> bool:
        return (self.kernel, self.stride, self.padding, self.output_padding) == (1, 1, (0, 0), 0)


def _axes(conv: Conv) -> list[_Axis]:
    g = conv.geometry
    rows = zip(conv.kernel_size, g.stride, g.padding, g.dilation, g.output_padding, strict=True)
    return [_Axis(*row) for row in rows]


def _merge_geometry(first: Conv, second: Conv) -> tuple[Geometry, list[tuple[int, int]]] | Refusal:
    """Return the geometry of the composition, and the tap steps of both kernels along each dimension."""
    transposed = _merge_transposed(first, second)
    if isinstance(transposed, Refusal):
        return transposed
    mode = _merge_mode(first.geometry, second.geometry)
    if isinstance(mode, Refusal):
        return mode
    axes, steps = [], []
    for dim, (a, b) in enumerate(zip(_axes(first), _axes(second), strict=True)):
        merged = _merge_axis(a, b, transposed=transposed, mode=mode)
        if merged is None:
            return Refusal(f"the second convolution pads what the first has made along dimension {dim}")
        axes.append(merged[0])
        steps.append(merged[1])
    return Geometry(
        stride=tuple(axis.stride for axis in axes),
        padding=tuple(axis.padding for axis in axes),
        dilation=tuple(axis.dilation for axis in axes),
        output_padding=tuple(axis.output_padding for axis in axes),
        transposed=transposed,
        padding_mode=mode,
    ), steps


def _merge_transposed(first: Conv, second: Conv) -> bool | Refusal:
    if first.pointwise and not second.pointwise:
        return second.geometry.transposed
    if second.pointwise and not first.pointwise:
        return first.geometry.transposed
    if first.pointwise:
        return first.geometry.transposed or second.geometry.transposed
    if first.geometry.transposed != second.geometry.transposed:
        return Refusal("one convolution is transposed and the other is not")
    return first.geometry.transposed


def _merge_mode(first: Geometry, second: Geometry) -> PaddingMode | Refusal:
    modes = {g.padding_mode for g in (first, second) if g.padded}
    if len(modes) > 1:
        return Refusal(f"the convolutions pad in different modes ({', '.join(sorted(modes))})")
    if modes:
        return modes.pop()
    return next((g.padding_mode for g in (first, second) if g.padding_mode != "zeros"), "zeros")


def _merge_axis(a: _Axis, b: _Axis, *, transposed: bool, mode: str) -> tuple[_Axis, tuple[int, int]] | None:
    """Merge one dimension; None where the two are not one convolution along it.

    Returned with the merged axis are the distances, in taps of the merged kernel, between the taps of either kernel.
    """
    # Invariant: tap u of A and tap v of B meet the input at ``u * a.dilation + v * a.stride * b.dilation``, so that the
    # merged taps stand at multiples of the greatest common divisor of the two steps. Example: a kernel of 3 taps with
    # stride 2, then one of 2 taps with dilation 3: steps 1 and 6, so that 2 + 6 + 1 = 9 taps with stride 2 remain.
    if b.trivial:  # the dilation of a single tap has no effect, but the original may name one
        return replace(a, dilation=max(a.dilation, b.dilation) if a.kernel == 1 else a.dilation), (1, 1)
    if a.trivial:
        return b, (1, 1)
    bare_stride = a.kernel == 1 and a.padding == (0, 0) and mode == "zeros"
    if transposed or not (b.padding == (0, 0) or bare_stride):
        return None
    # A bare stride looks at every sA-th place, so that distances in B count sA times. Example: stride 2, then 3 taps
    # with padding 1, is 3 taps with dilation 2, padding 2 and stride 2: 7 places become 4 either way.
    step_a = a.dilation if a.kernel > 1 else 0
    step_b = a.stride * b.dilation if b.kernel > 1 else 0
    dilation = math.gcd(step_a, step_b) or 1
    before, after = b.padding
    padding = (before * a.stride, after * a.stride) if bare_stride else a.padding
    kernel = (step_a * (a.kernel - 1) + step_b * (b.kernel - 1)) // dilation + 1
    merged = _Axis(kernel, a.stride * b.stride, padding, dilation, 0)
    return merged, (step_a // dilation or 1, step_b // dilation or 1)


def _regroup(kernel: Tensor, groups: int) -> Tensor:
    """Write a kernel with fewer groups, as a block-diagonal one.

    For example two groups of kernels A and B become one group with the kernel [[A, 0], [0, B]].
    """
    blocks = kernel.shape[0] // groups
    if blocks == 1:
        return kernel
    _, rows, columns, *size = kernel.shape
    dense = kernel.new_zeros(groups, blocks, rows, blocks, columns, *size)
    index = torch.arange(blocks, device=kernel.device)
    # Index arrays on both sides of a slice put their axis in front: (blocks, groups, rows, columns, *size).
    dense[:, index, :, index] = kernel.unflatten(0, (groups, blocks)).transpose(0, 1)
    return dense.flatten(3, 4).flatten(1, 2)


def _stuff(kernel: Tensor, steps: Sequence[int]) -> Tensor:
    """Put zeros between the taps, so that they stand ``steps`` apart."""
    for dim, step in enumerate(steps, start=3):
        if step > 1 and kernel.shape[dim] > 1:
            size = list(kernel.shape)
            size[dim] = (size[dim] - 1) * step + 1
            wide = kernel.new_zeros(size)
            wide.index_copy_(dim, torch.arange(0, size[dim], step, device=kernel.device), kernel)
            kernel = wide
    return kernel


def _contract(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``_convolve_kernels`` computes in float64, in another dtype; of some outputs at a time."""
    # A product may be far larger than the kernels, and in float64 it would be so twice.
    groups, _, _, *size_b = second.shape
    size = [a + b - 1 for a, b in zip(first.shape[3:], size_b, strict=True)]
    rows = max(1, BLOCK // max(1, groups * first.shape[2] * math.prod(size)))
    wide = first.double()
    parts = [_convolve_kernels(wide, part.double()).to(dtype) for part in second.split(rows, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _convolve_kernels(first: Tensor, second: Tensor) -> Tensor:
    """Return W[g,o,i,t] = sum over m, v of second[g,o,m,v] first[g,m,i,t-v]."""
    # Along a dimension where one kernel has a single tap, the sum over v is a plain product. Where that holds for all
    # dimensions one contraction over m does it. Otherwise torch convolves: padding by the whole kernel less one tap and
    # flipping it turn its correlation into the full convolution, of size a + b - 1.
    groups, out, _, *size_b = second.shape
    columns, size_a = first.shape[2], first.shape[3:]
    if all(1 in pair for pair in zip(size_a, size_b, strict=True)):
        product = torch.einsum("gomv,gmiu->goivu", second.flatten(3), first.flatten(3))
        size = [a * b for a, b in zip(size_a, size_b, strict=True)]
        if all(b == 1 for b in size_b) or all(a == 1 for a in size_a):
            return product.reshape(groups, out, columns, *size)
        return _interleave(product, size_a, size_b)
    full = [b - 1 for b in size_b]
    run = (F.conv1d, F.conv2d, F.conv3d)[len(size_b) - 1]
    # (i, g m, *a) with (g o, m, *b) in g groups gives (i, g o, *(a + b - 1)): the inputs of the first are the batch.
    flipped = second.flip(list(range(3, second.dim()))).flatten(0, 1)
    images = first.transpose(1, 2).transpose(0, 1).flatten(1, 2)
    response: Tensor = run(images, flipped, padding=full, groups=groups)
    return response.unflatten(1, (groups, out)).permute(1, 2, 0, *range(3, 3 + len(size_b)))


def _interleave(product: Tensor, size_a: Sequence[int], size_b: Sequence[int]) -> Tensor:
    """Bring (g, o, i, prod b, prod a) to (g, o, i, b0 a0, b1 a1, ...); one of each pair is 1."""
    dims = len(size_a)
    product = product.unflatten(4, tuple(size_a)).unflatten(3, tuple(size_b))
    order = [axis for dim in range(dims) for axis in (3 + dim, 3 + dims + dim)]
    product = product.permute(0, 1, 2, *order)
    return product.reshape(*product.shape[:3], *(a * b for a, b in zip(size_a, size_b, strict=True)))


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
        return compose_features(parts)
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
    # (g, s, r, *k) and I_n make (g, s n, r n, *k); channel (c, b) is number c n + b, as the split has it.
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
    dtype = first.weight.dtype
    weight = _contract(first.weight[None, ..., None], second.weight[None, ..., None], dtype)[0, ..., 0]
    bias = _carry_bias(first.bias, second.weight, second.bias)
    return Linear(weight, bias=None if bias is None else bias.to(dtype))


def _carry_bias(bias: Tensor | None, matrix: Tensor, own: Tensor | None) -> Tensor | None:
    if bias is None:
        return own
    carried = matrix.double() @ bias.double()
    return carried if own is None else carried + own.double()
