"""``depthwise``: network decoupling, a sum of r pairs of a pointwise and a depthwise convolution.

    W (o, I, K) ~ sum_t  D (o, t, K)  P (o, t, I)        for each output channel o: an SVD of its I x K matrix

    Conv   for t = 1 .. r:  1x1 convolution I -> O, then k x k depthwise on O with the geometry;  the sum of all

This is the only form with branches. Parameters g O r (I + K). It is exact at r = min(I, K), and optimal for each output
channel (Eckart-Young). Guo et al. 2018, "Network Decoupling" (arXiv 1808.05517).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.algebra import Branches, Conv, Geometry, Operator, Shape, Step
from surgery.errors import Refusal
from surgery.factorizations.base import MatrixFactorization, Ranks

__all__ = ["Depthwise"]


class Depthwise(MatrixFactorization):
    """Sums of pointwise and depthwise convolutions."""

    name = "depthwise"

    def refuse(self, operator: Operator) -> Refusal | None:
        """Refuse linear and 1x1 layers, and convolutions with one input channel a group."""
        _, _, columns, *size = operator.kernel.shape
        if math.prod(size) == 1:
            return Refusal("it has a single kernel position, which leaves nothing to a depthwise convolution")
        if columns == 1:
            return Refusal("it has one input channel in each group, so it is depthwise already")
        return None

    def rank_names(self, kernel: Shape) -> tuple[str, ...]:
        """Return ("pairs",)."""
        return ("pairs",)

    def tensor(self, kernel: Tensor) -> Tensor:
        """Return (g O, I, K): one matrix for each output channel."""
        return kernel.flatten(3).flatten(0, 1)

    def shapes(self, kernel: Shape, ranks: Ranks) -> tuple[Shape, ...]:
        """Return (g, O, I, 1...) and (g O, 1, 1, *k) for each pair in turn."""
        # Example of 64 -> 128, 3 x 3, with two pairs: twice 128 x 64 and 128 x 1 x 3 x 3, 18,688 numbers for 73,728.
        groups, out, columns, *size = kernel
        ones = (1,) * len(size)
        return ((groups, out, columns, *ones), (groups * out, 1, 1, *size)) * ranks[0]

    def geometries(self, geometry: Geometry, kernel: Shape, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return a trivial geometry, then the whole one, for each pair in turn."""
        return (Geometry.pointwise(geometry.dims), geometry) * ranks[0]

    def conv_steps(self, operator: Conv, factors: Sequence[Tensor], ranks: Ranks) -> tuple[Step, ...]:
        """Return the branches; a single pair needs no sum."""
        convs = [step for step in super().conv_steps(operator, factors, ranks) if isinstance(step, Operator)]
        rows = tuple((convs[i], convs[i + 1]) for i in range(0, len(convs), 2))
        return rows[0] if len(rows) == 1 else (Branches(rows),)

    def factors(self, cores: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return column t of left and row t of right for each pair."""
        # (g O, I, r) and (g O, r, K)
        left, right = cores
        parts = [part for t in range(ranks[0]) for part in (left[:, :, t], right[:, t])]
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes(kernel, ranks), strict=True))

    def cores(self, factors: Sequence[Tensor], kernel: Shape, ranks: Ranks) -> list[Tensor]:
        """Return left (g O, I, r) and right (g O, r, K)."""
        # (g, O, I, 1..) -> (g O, I), r of them along the last axis; (g O, 1, 1, *k) -> (g O, K), along the middle one.
        left = torch.stack([part.flatten(0, 1).flatten(1) for part in factors[::2]], -1)
        return [left, torch.stack([part.flatten(1) for part in factors[1::2]], 1)]
