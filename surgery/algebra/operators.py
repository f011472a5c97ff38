"""Operators: one linear map on activations as a frozen value, with its weights, its run and its costs.

Every operator shows its weight in one canonical layout, the *kernel*. Its shape is
``(groups, out_channels / groups, in_channels / groups, *kernel_size)``. The kernel of a linear layer has one group and
no kernel dimensions. Factorizations and composition work on kernels, so that grouped and transposed convolutions are
not special cases for them.

What two operators must have in common is a value, too: the *form*, which is all of an operator but its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Conv", "Embedding", "Form", "Geometry", "Layout", "Linear", "Operator", "PaddingMode", "Shape"]

Shape: TypeAlias = tuple[int, ...]
Layout: TypeAlias = Literal["out_in", "in_out"]  # how a graph stores the weight of a linear layer; GPT-2 has the second
PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]  # torch's own names


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input: one entry for each kernel dimension.

    ``padding`` holds (before, after) pairs, since ``padding='same'`` is asymmetric for even kernels.
    """

    stride: Shape
    padding: tuple[tuple[int, int], ...]
    dilation: Shape
    output_padding: Shape
    transposed: bool = False
    padding_mode: PaddingMode = "zeros"

    @classmethod
    def pointwise(cls, dims: int) -> Geometry:
        """Return the geometry of a 1x1 convolution over ``dims`` spatial dimensions."""
        return cls((1,) * dims, ((0, 0),) * dims, (1,) * dims, (0,) * dims)

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    def along(self, dims: Collection[int]) -> Geometry:
        """Return the part of this geometry that acts along ``dims``; trivial along the others."""
        keep = [i in dims for i in range(self.dims)]
        return replace(
            self,
            stride=tuple(s if k else 1 for s, k in zip(self.stride, keep, strict=True)),
            padding=tuple(p if k else (0, 0) for p, k in zip(self.padding, keep, strict=True)),
            dilation=tuple(d if k else 1 for d, k in zip(self.dilation, keep, strict=True)),
            output_padding=tuple(o if k else 0 for o, k in zip(self.output_padding, keep, strict=True)),
        )

    @property
    def symmetric(self) -> bool:
        """Whether each padding pair has equal sides, so that torch's integer padding can say it."""
        return all(before == after for before, after in self.padding)

    @property
    def padded(self) -> bool:
        """Whether any side of the input is padded."""
        return any(before or after for before, after in self.padding)

    def out_size(self, size: Shape, kernel_size: Shape) -> Shape:
        """Return the spatial output size for a spatial input size."""
        # Example of 3 taps, stride 2, padding 1 and 1: 7 places give (7 + 2 - 2 - 1) // 2 + 1 = 4. Transposed, 4 places
        # give (4 - 1) * 2 - 2 + 2 + 0 + 1 = 7 again.
        span = [d * (k - 1) for d, k in zip(self.dilation, kernel_size, strict=True)]
        pads = [before + after for before, after in self.padding]
        if self.transposed:
            return tuple(
                (n - 1) * s - p + e + o + 1
                for n, s, p, e, o in zip(size, self.stride, pads, span, self.output_padding, strict=True)
            )
        return tuple((n + p - e - 1) // s + 1 for n, s, p, e in zip(size, self.stride, pads, span, strict=True))


@dataclass(frozen=True)
class Form:
    """All of an operator but its numbers: operators of equal forms differ in their weights alone.

    ``kernel`` is the shape of the kernel. ``geometry`` is None for operators that are not convolutions, and
    ``padding_index`` for those that are not embeddings. ``kind`` is the operator's class.
    """

    kind: type[Operator]
    kernel: Shape
    geometry: Geometry | None = None
    padding_index: int | None = None
    biased: bool = False

    @property
    def unbiased(self) -> Form:
        """The form of the same operator without its bias."""
        return replace(self, biased=False)

    @property
    def reading(self) -> Form:
        """What an operator reads: equal for operators that differ in their outputs and biases only (0 outputs)."""
        groups, _, *rest = self.kernel
        return replace(self, kernel=(groups, 0, *rest), biased=False)


@dataclass(frozen=True, eq=False)
class Operator:
    """Base of all operators: a weight tensor, and a bias tensor or None."""

    weight: Tensor
    bias: Tensor | None = field(default=None, kw_only=True)

    @property
    def kernel(self) -> Tensor:
        """The weight as (groups, out / groups, in / groups, *kernel_size)."""
        raise TypeError(f"{type(self).__name__} has no kernel")

    @property
    def form(self) -> Form:
        """All but the numbers."""
        return Form(type(self), tuple(self.kernel.shape), biased=self.bias is not None)

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions of the activations: 1 to 3 for a convolution, 0 for all others."""
        return 0

    @property
    def reads_indices(self) -> bool:
        """Whether the input is whole numbers, which choose rows of a table, and not activations."""
        return False

    @property
    def expressible(self) -> bool:
        """Whether the arguments of torch's own layer can say all of the form."""
        return True

    @property
    def description(self) -> str:
        """The operator in words, as ``Conv2d 3x3 /2 groups=4`` or ``Linear``."""
        return type(self).__name__

    @property
    def in_channels(self) -> int:
        """Number of input channels (features)."""
        groups, _, per_group = self.kernel.shape[:3]
        return groups * per_group

    @property
    def out_channels(self) -> int:
        """Number of output channels (features)."""
        return self.kernel.shape[0] * self.kernel.shape[1]

    @property
    def parameters(self) -> int:
        """Number of parameters, the bias included."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def with_bias(self, bias: Tensor | None) -> Operator:
        """Return the same operator with another bias."""
        return replace(self, bias=bias)

    def with_kernel(self, kernel: Tensor) -> Operator:
        """Return the same operator with another kernel, of its own kernel's shape but for the number of outputs.

        The bias stays: drop it first where that number changes.
        """
        raise TypeError(f"{type(self).__name__} has no kernel")

    def to(self, **kwargs: Any) -> Operator:
        """Return the same operator with its tensors moved or cast as by ``Tensor.to``."""
        return replace(
            self, weight=self.weight.to(**kwargs), bias=None if self.bias is None else self.bias.to(**kwargs)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operator to activations."""
        raise TypeError(f"{type(self).__name__} cannot run")

    def out_shape(self, shape: Shape) -> Shape:
        """Return the output shape for an input shape."""
        raise TypeError(f"{type(self).__name__} has no output shape")

    def macs(self, shape: Shape) -> int:
        """Return the multiply-accumulates at an input shape (the bias is not counted)."""
        raise TypeError(f"{type(self).__name__} has no cost")


@dataclass(frozen=True, eq=False)
class Linear(Operator):
    """``y = x W^T + b``: weight (out_features, in_features), input (..., in_features)."""

    @property
    def kernel(self) -> Tensor:
        """The weight as (1, out_features, in_features)."""
        return self.weight.unsqueeze(0)

    def with_kernel(self, kernel: Tensor) -> Linear:
        """Return the layer with the weight of a kernel (1, out_features, in_features)."""
        return replace(self, weight=kernel[0])

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to (..., in_features)."""
        return F.linear(x, self.weight, self.bias)

    def out_shape(self, shape: Shape) -> Shape:
        """Return (..., out_features)."""
        return (*shape[:-1], self.weight.shape[0])

    def macs(self, shape: Shape) -> int:
        """Return rows times the size of the weight."""
        return math.prod(shape[:-1]) * self.weight.numel()


@dataclass(frozen=True, eq=False)
class Embedding(Operator):
    """Rows of a table: weight (entries, features), whole numbers (...) as input, output (..., features).

    This is a linear map of one-hot vectors, and so a kernel with one input channel an entry; it multiplies nothing.
    The row ``padding_index`` gets no gradient.
    """

    padding_index: int | None = None

    @property
    def form(self) -> Form:
        """All but the numbers."""
        return replace(super().form, padding_index=self.padding_index)

    @property
    def reads_indices(self) -> bool:
        """True: the input is row numbers."""
        return True

    @property
    def kernel(self) -> Tensor:
        """The weight as (1, features, entries)."""
        return self.weight.t().unsqueeze(0)

    def with_kernel(self, kernel: Tensor) -> Embedding:
        """Return the table of a kernel (1, features, entries)."""
        return replace(self, weight=kernel[0].t())

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to whole numbers (...) below the number of entries."""
        return F.embedding(x, self.weight, self.padding_index)

    def out_shape(self, shape: Shape) -> Shape:
        """Return (..., features)."""
        return (*shape, self.weight.shape[1])

    def macs(self, shape: Shape) -> int:
        """Return 0: rows are looked up."""
        return 0


@dataclass(frozen=True, eq=False)
class Conv(Operator):
    """A convolution over 1, 2 or 3 dimensions, grouped or not, transposed or not.

    The weight has torch's layout: (out, in / groups, *kernel_size), or (in, out / groups, *kernel_size) if transposed.
    Inputs are (batch, in, *size) or (in, *size).
    """

    geometry: Geometry
    groups: int = 1

    @classmethod
    def from_kernel(cls, kernel: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Conv:
        """Build the convolution whose canonical kernel this is; source of the layout: torch's documentation."""
        if geometry.transposed:
            kernel = kernel.transpose(1, 2)
        groups, rows, *rest = kernel.shape
        return cls(kernel.reshape(groups * rows, *rest).contiguous(), geometry, groups, bias=bias)

    @property
    def kernel(self) -> Tensor:
        """The weight as (groups, out / groups, in / groups, *kernel_size)."""
        grouped = self.weight.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2) if self.geometry.transposed else grouped

    def with_kernel(self, kernel: Tensor) -> Conv:
        """Return the convolution with the weight of a kernel (groups, out / groups, in / groups, *kernel_size)."""
        return Conv.from_kernel(kernel, self.geometry, self.bias)

    @property
    def form(self) -> Form:
        """All but the numbers."""
        return replace(super().form, geometry=self.geometry)

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions."""
        return self.geometry.dims

    @property
    def description(self) -> str:
        """The convolution in words."""
        g = self.geometry
        words = [f"Conv{'Transpose' if g.transposed else ''}{g.dims}d", "x".join(map(str, self.kernel_size))]
        if set(g.stride) != {1}:
            words.append("/" + ",".join(map(str, g.stride if len(set(g.stride)) > 1 else g.stride[:1])))
        if self.groups > 1:
            words.append(f"groups={self.groups}")
        return " ".join(words)

    @property
    def kernel_size(self) -> Shape:
        """The spatial size of the kernel."""
        return tuple(self.weight.shape[2:])

    @property
    def pointwise(self) -> bool:
        """Whether this is a 1x1 convolution that visits each position once, in place."""
        return all(k == 1 for k in self.kernel_size) and self.geometry == replace(
            Geometry.pointwise(self.geometry.dims),
            dilation=self.geometry.dilation,
            transposed=self.geometry.transposed,
            padding_mode=self.geometry.padding_mode,
        )

    @property
    def expressible(self) -> bool:
        """Whether torch's arguments can say this padding: equal sides, or what ``padding='same'`` means."""
        # "same" puts the larger half behind. Example of 4 taps: 3 places, 1 before and 2 after.
        spans = [d * (k - 1) for d, k in zip(self.geometry.dilation, self.kernel_size, strict=True)]
        same = tuple((span // 2, span - span // 2) for span in spans)
        plain = not self.geometry.transposed and set(self.geometry.stride) == {1}
        return self.geometry.symmetric or (plain and self.geometry.padding == same)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to (batch, in, *size) or (in, *size)."""
        g, dims = self.geometry, self.geometry.dims
        if g.transposed:
            run_transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
            padding = [before for before, _ in g.padding]
            return run_transposed(
                x, self.weight, self.bias, g.stride, padding, g.output_padding, self.groups, g.dilation
            )
        padding = [before for before, _ in g.padding]
        if g.padding_mode != "zeros" or not g.symmetric:
            mode = "constant" if g.padding_mode == "zeros" else g.padding_mode
            # ``F.pad`` takes the last dimension first: the padding ((1, 2), (3, 4)) is the list 3, 4, 1, 2.
            x = F.pad(x, [side for pair in reversed(g.padding) for side in pair], mode=mode)
            padding = [0] * dims
        run = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return run(x, self.weight, self.bias, g.stride, padding, g.dilation, self.groups)

    def out_shape(self, shape: Shape) -> Shape:
        """Return (batch, out, *out_size), or without the batch for an unbatched input."""
        dims = self.geometry.dims
        return (*shape[: -1 - dims], self.out_channels, *self.geometry.out_size(shape[-dims:], self.kernel_size))

    def macs(self, shape: Shape) -> int:
        """Return the multiply-accumulates: each kernel tap at each output (transposed: input) position."""
        dims = self.geometry.dims
        positions = shape[-dims:] if self.geometry.transposed else self.out_shape(shape)[-dims:]
        return math.prod(shape[: -1 - dims]) * math.prod(positions) * self.weight.numel()
