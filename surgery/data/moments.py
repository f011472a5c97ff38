"""Second moments of operators' inputs, by which the error of an operator's *output* follows from its weights alone.

A column x holds the n values that one output is computed from: y = W x. The moments are m = E[x] and C = E[x x^T]. The
mean square of the output W x is tr(W C W^T), and the mean square of its error D x is tr(D C D^T) for D = W - W'.

    Linear      columns are tokens, n = I
    Conv        columns are the patches of each group, n = I K, in the order (channel, taps) of the kernel; padded as
                the operator pads, so that borders are included as they are
    Embedding   columns are one-hot, so C is diagonal: the share of each entry

If n is above a limit (lower for patches), C is approximated. For a convolution it becomes the Kronecker product of a
matrix of channels and a matrix of taps, each averaged over the other (Grosse and Martens 2016, arXiv 1602.01407, do so
for gradients). For a linear layer only the diagonal is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.algebra.operators import Operator
from surgery.data.columns import Columns, read_columns
from surgery.data.masks import visible_rows
from surgery.errors import InputError
from surgery.solvers.weighted import Metric

__all__ = ["Accumulator", "Moments", "layout_bytes"]

_PATCHES = 2304  # the largest n of patches with one matrix: a 3x3 convolution of 256 channels


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of ``count`` columns that an operator reads: mean (groups, n), and C as a metric, both in float64.

    ``sensitivity`` G (groups, O, O), where it was collected, says how much an error of the operator's output changes
    the model's output: by about tr(G E) for an error with second moment E.
    """

    count: int
    mean: Tensor
    metric: Metric
    sensitivity: Tensor | None = None

    def narrow(self) -> Moments:
        """Return the moments in float32, which is enough to compare errors."""
        seen = None if self.sensitivity is None else self.sensitivity.float()
        return Moments(self.count, self.mean.float(), self.metric.narrow(), seen)

    @property
    def dense(self) -> bool:
        """Whether C is stored as one matrix (groups, n, n), and is neither approximated nor diagonal (embeddings)."""
        return self.metric.factors[0].shape[1:] == (self.mean.shape[1],) * 2

    @property
    def second(self) -> Tensor:
        """C as one tensor (groups, n, n), however it is stored."""
        groups, n = self.mean.shape
        return self.metric.times(torch.eye(n, dtype=self.mean.dtype, device=self.mean.device).expand(groups, n, n))

    @property
    def centred(self) -> Metric:
        """The covariance ``C - m m^T``, by which errors count if a bias absorbs their mean."""
        # C = A (x) B with channels A and taps B: the mean, as a matrix M (channels, taps), is taken out of each factor:
        # A - M M^T / taps, and B tr(A) - M^T M, whose trace is then scaled to the number of taps again.
        taps = self.metric.taps
        if len(self.metric.factors) == 1:
            return Metric((_centre(self.metric.factors[0], self.mean.unsqueeze(1)),), taps)
        channels, kernel = self.metric.factors
        mean = self.mean.unflatten(1, (-1, taps))
        scale = _trace(channels)
        channels = _centre(channels, mean.mT / math.sqrt(taps))
        kernel = _centre(kernel * scale, mean)
        return Metric((channels, kernel * (taps / _trace(kernel).clamp(min=torch.finfo(kernel.dtype).tiny))), taps)

    def centred_energy(self, difference: Tensor, sensitivity: Tensor | None = None) -> Tensor:
        """Return ``tr(D Cov D^T)`` of (groups, O, n), or ``tr(G D Cov D^T)`` with a sensitivity G."""
        if len(self.metric.factors) > 1:
            return self.centred.energy(difference, sensitivity)
        # Where C is one matrix, D C D^T - (D m)(D m)^T saves a covariance as large as C.
        shift = difference @ self.mean.unsqueeze(-1)
        other = shift if sensitivity is None else sensitivity @ shift
        return (self.metric.energy(difference, sensitivity) - (shift * other).sum()).clamp(min=0)

    def output_error(self, difference: Tensor, kernel: Tensor, *, centred: bool = False) -> float:
        """Return the output's relative error ``sqrt(tr(D C D^T) / tr(W C W^T))``, of kernels (groups, O, I, *size).

        ``centred`` leaves the mean of D x out of the error, as a corrected bias does, but not out of the scale. The
        error is 0 if the kernel's output is 0.
        """
        metric = self.centred if centred else self.metric
        scale = self.metric.energy(kernel.detach().double().flatten(2))
        if not scale > 0:
            return 0.0
        return math.sqrt(float(metric.energy(difference.detach().double().flatten(2)) / scale))


def _centre(factor: Tensor, rows: Tensor) -> Tensor:
    """Return the factor, dense or diagonal, minus ``rows^T rows`` for rows (groups, r, m)."""
    return factor - rows.square().sum(1) if factor.dim() == 2 else factor - rows.mT @ rows


def _trace(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def _whole(columns: int, taps: int, limit: int) -> bool:
    """Whether C is stored as one matrix; for larger patches a matrix costs more than it improves."""
    return columns <= (min(limit, _PATCHES) if taps > 1 else limit)


def layout_bytes(operator: Operator, limit: int) -> int:
    """Return the bytes that an operator's C takes if a matrix may have at most ``limit`` columns."""
    groups, _, channels, *size = operator.kernel.shape
    taps = math.prod(size)
    n = channels * taps
    if operator.reads_indices:
        return 8 * n
    if _whole(n, taps, limit):
        return 8 * groups * n * n
    return 8 * groups * ((channels**2 if channels <= limit else channels) + (taps**2 if taps > 1 else 0))


class Accumulator:
    """Sums the moments of one operator's columns over all its calls.

    ``limit`` is the largest n, or number of channels, for which a matrix is stored. At most ``rows`` columns of each
    input are used, at random positions that ``seed`` decides.
    """

    def __init__(self, operator: Operator, *, limit: int, rows: int, seed: int = 0) -> None:
        groups, _, channels, *size = operator.kernel.shape
        self._operator, self._rows = operator.to(device="meta"), rows
        self._taps, self.count = math.prod(size), 0
        n = channels * self._taps
        self._whole = _whole(n, self._taps, limit)
        self._generator = torch.Generator().manual_seed(seed)
        self._mean = torch.zeros(groups, n, dtype=torch.float64, device=operator.weight.device)
        # ``_first`` sums x x^T: as one matrix, as its diagonal, or for channels alone, in which case ``_second`` sums
        # the same for taps.
        wide = channels if operator.reads_indices or channels > limit else 0
        side = n if self._whole else channels
        self._first = self._mean.new_zeros((groups, side) if wide else (groups, side, side))
        split = not self._whole and self._taps > 1
        self._second = self._mean.new_zeros(groups, self._taps, self._taps) if split else None

    def add(self, x: Tensor, masks: Sequence[Tensor] = ()) -> None:
        """Add the columns of one input of the operator at the positions that the masks (N, T) show."""
        if self._operator.reads_indices:
            visible = visible_rows(masks, x.shape)
            x = x.flatten() if visible is None else x.flatten()[visible]
            shares = torch.bincount(x, minlength=self._first.shape[1]).to(torch.float64)
            self._first += shares
            self._mean += shares
            self.count += x.numel()
            return
        for block in read_columns(self._operator, x, rows=self._rows, generator=self._generator, masks=masks):
            self._add_block(block)

    def _add_block(self, block: Columns) -> None:
        """Add (groups, rows, n)."""
        self.count += block.shape[1]
        self._mean += block.sum(1, dtype=torch.float64)
        if self._whole:
            self._first += block.mT @ block
            return
        # C is the Kronecker product of two factors: x as X (channels, taps) adds X X^T to one and X^T X to the other.
        split = block.unflatten(2, (-1, self._taps))
        rows = split.mT.flatten(1, 2)
        self._first += rows.square().sum(1, dtype=torch.float64) if self._first.dim() == 2 else rows.mT @ rows
        if self._second is not None:
            taps = split.flatten(1, 2)
            self._second += taps.mT @ taps

    def moments(self) -> Moments:
        """Return the moments of all that was added.

        Raises:
            InputError: nothing was added, or values are not finite.
        """
        if not self.count:
            raise InputError("no calibration input reached the operator")
        if not bool(torch.isfinite(self._mean).all()) or not bool(torch.isfinite(self._first).all()):
            raise InputError("its inputs have values that are not finite", next_step="check the data")
        if self._second is None:
            factors: tuple[Tensor, ...] = (self._first / self.count,)
        else:
            tiny = torch.finfo(torch.float64).tiny
            channels = self._first / (self.count * self._taps)
            factors = channels, self._second * (self._taps / _trace(self._second).clamp(min=tiny))
        return Moments(self.count, self._mean / self.count, Metric(factors, self._taps))
