"""Composition of two convolutions A, then B: the one convolution that they are, or the reason why they are not one.

They are one when, along each dimension,

- one of them is trivial there (kernel 1, stride 1, no padding): the other's geometry holds;
- or B does not pad: taps add up, ``t = u dA + v sA dB``, with stride sA sB and A's padding;
- or A is a bare stride (kernel 1, no padding): B's geometry scaled by sA.

B's zero padding puts zeros where A would have put its bias, so that a biased A under a zero-padded B is refused.
Groups: both are written with gcd(gA, gB) groups, as block-diagonal kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.algebra.operators import Conv, Geometry, PaddingMode
from surgery.errors import Refusal

__all__ = ["compose_convolutions"]


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
    kernel = _convolve_kernels(
        _stuff(_regroup(first.kernel.double(), groups), [a for a, _ in steps]),
        _stuff(_regroup(second.kernel.double(), groups), [b for _, b in steps]),
    )
    dtype = first.weight.dtype
    return Conv.from_kernel(kernel.to(dtype), geometry, None if bias is None else bias.to(dtype))


def _merge_bias(first: Conv, second: Conv) -> Tensor | Refusal | None:
    if first.bias is None or not bool(first.bias.any()):
        return second.bias
    if second.geometry.padded and second.geometry.padding_mode == "zeros":
        return Refusal("the first convolution has a bias and the second pads with zeros, so the border differs")
    if second.geometry.transposed and not second.pointwise:
        return Refusal("the first convolution has a bias and the second is transposed, so the border differs")
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
